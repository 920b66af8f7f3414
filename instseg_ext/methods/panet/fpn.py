"""PANet's backbone: detectron2's pyramid with a second path, bottom-up, on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor

from instseg_ext.modeling.deform_resnet import build_instseg_resnet_backbone

__all__ = ["PANetFPN", "build_panet_fpn_backbone"]


class PANetFPN(FPN):
    """A feature pyramid P with bottom-up path augmentation N (Sec. 3.1 of arXiv:1803.01534).

    The finest N is the finest P. Each further one is ``out(down(N_i) + P_(i+1))``, where both are
    3x3 convolutions with norm and ReLU and ``down`` has stride 2; one more level, for the RPN, is
    every second pixel of the coarsest N. Levels keep detectron2's names: ``p<l>`` has stride
    ``2 ** l``.

    Note:
        The convolutions of the path have biases also in front of a norm. A group norm spans several
        channels and does not cancel them, and the published weights contain them. Without a norm
        the authors' code has no ReLU either; here, as in the paper, there always is one.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        *,
        norm: str = "",
        **options: Any,
    ) -> None:
        """Create the convolutions.

        Args:
            bottom_up: the trunk.
            in_features: its features to build on, fine to coarse.
            out_channels: channels of every level.
            norm: normalisation of pyramid and path.
            **options: further arguments of detectron2's ``FPN``, without ``top_block``.
        """
        super().__init__(bottom_up, in_features, out_channels, norm=norm, **options)
        strides = [shape.stride for shape in super().output_shape().values()]
        self.levels = tuple(stride.bit_length() - 1 for stride in strides)
        for level in self.levels[:-1]:
            for name, stride in ((f"pan_down{level}", 2), (f"pan_out{level + 1}", 1)):
                conv = Conv2d(
                    out_channels,
                    out_channels,
                    3,
                    stride=stride,
                    padding=1,
                    norm=get_norm(norm, out_channels),
                    activation=F.relu_,
                )
                c2_xavier_fill(conv)
                self.add_module(name, conv)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels and strides of all levels, fine to coarse."""
        shapes = super().output_shape()
        top = self.levels[-1]
        channels = shapes[f"p{top}"].channels
        return {**shapes, f"p{top + 1}": ShapeSpec(channels=channels, stride=2 ** (top + 1))}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels of an image batch.

        Args:
            x: (N, 3, H, W), H and W multiples of the trunk's stride.

        Returns:
            The levels by name, each (N, D, H / stride, W / stride), the last rounded up. All but
            the first are not negative.
        """
        results = super().forward(x)
        finest, *further = self.levels
        finished = results[f"p{finest}"]
        for level in further:
            down = self.get_submodule(f"pan_down{level - 1}")(finished)
            finished = self.get_submodule(f"pan_out{level}")(down + results[f"p{level}"])
            results[f"p{level}"] = finished
        results[f"p{self.levels[-1] + 1}"] = F.max_pool2d(finished, 1, stride=2)
        return results


@BACKBONE_REGISTRY.register()
def build_panet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PANetFPN:
    """Build a ResNet and PANet's two paths from the keys of ``build_resnet_fpn_backbone``."""
    node = cfg.MODEL.FPN
    return PANetFPN(
        build_instseg_resnet_backbone(cfg, input_shape),
        node.IN_FEATURES,
        node.OUT_CHANNELS,
        norm=node.NORM,
        fuse_type=node.FUSE_TYPE,
    )
