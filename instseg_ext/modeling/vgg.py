"""The VGG trunk (arXiv:1409.1556) up to its fifth stage, without the pool after it.

``fc6`` and ``fc7`` belong to the RoI heads of the methods that use this trunk.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from fvcore.nn import weight_init
from torch import Tensor
from torch.nn import functional as F

from instseg_ext.modeling.staged import check_out_features, freeze, stages_up_to

__all__ = ["VGG", "build_vgg16_backbone"]

STAGES = ("conv1", "conv2", "conv3", "conv4", "conv5")
# Channels of each stage as multiples of the first one's.
_WIDENING = (1, 2, 4, 8, 8)


class VGG(Backbone):
    """Stages of 3x3 convolutions with ReLU, halved in between by max pooling.

    Layers are named ``conv{stage}_{i}``, both counted from 1; a stage's feature is taken after its
    last ReLU, has stride ``2 ** (stage - 1)`` and is named ``conv{stage}``.

    Args:
        in_channels: channels of the image.
        convs_per_stage: (2, 2, 3, 3, 3) is VGG-16, (1, 1, 2, 2, 2) is VGG-11 ("A").
        width: channels of the first stage, 64 in the paper.
        norm: normalisation after each convolution, as detectron2's ``get_norm`` names it; "" for
            none, as in the paper.
        ceil_mode: whether pooling keeps the last row and column of an odd size.
        out_features: names of the features wanted; stages after the last of them are not built.
        freeze_at: the first so many stages are not trained.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        convs_per_stage: Sequence[int] = (2, 2, 3, 3, 3),
        width: int = 64,
        norm: str = "",
        ceil_mode: bool = True,
        out_features: Sequence[str] = ("conv5",),
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        built = stages_up_to(STAGES, out_features)
        self.convs_per_stage = tuple(convs_per_stage[: len(built)])
        self.ceil_mode = ceil_mode
        for stage, convs in enumerate(self.convs_per_stage):
            channels = width * _WIDENING[stage]
            for i in range(1, convs + 1):
                conv = Conv2d(
                    in_channels,
                    channels,
                    kernel_size=3,
                    padding=1,
                    norm=get_norm(norm, channels),
                    activation=F.relu_,
                )
                weight_init.c2_msra_fill(conv)
                if stage < freeze_at:
                    freeze(conv)
                self.add_module(f"{STAGES[stage]}_{i}", conv)
                in_channels = channels
        self._out_features = [name for name in built if name in out_features]
        self._out_feature_channels = dict(zip(built, (width * w for w in _WIDENING), strict=False))
        self._out_feature_strides = {name: 2**stage for stage, name in enumerate(built)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of an image batch.

        Args:
            x: (N, C, H, W).

        Returns:
            The wanted features by name, each (N, channels, H / stride, W / stride), rounded up
            with ``ceil_mode`` and down without.
        """
        features = {}
        for stage, convs in enumerate(self.convs_per_stage):
            if stage > 0:
                x = F.max_pool2d(x, kernel_size=2, stride=2, ceil_mode=self.ceil_mode)
            for i in range(1, convs + 1):
                x = self.get_submodule(f"{STAGES[stage]}_{i}")(x)
            if STAGES[stage] in self._out_features:
                features[STAGES[stage]] = x
        return features


@BACKBONE_REGISTRY.register()
def build_vgg16_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG:
    """Build VGG-16 from ``MODEL.VGG`` and ``MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        ValueError: if ``MODEL.VGG.OUT_FEATURES`` is empty or names an unknown feature.
    """
    node = cfg.MODEL.VGG
    return VGG(
        in_channels=input_shape.channels,
        width=node.WIDTH,
        norm=node.NORM,
        ceil_mode=node.CEIL_MODE,
        out_features=check_out_features("MODEL.VGG.OUT_FEATURES", node.OUT_FEATURES, STAGES),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
