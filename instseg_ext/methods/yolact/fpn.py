"""YOLACT's feature pyramid.

It differs from detectron2's: the top-down maps are resized bilinearly to the exact size of the
finer map, so that no image needs padding; a ReLU follows the output convolutions; and the two
coarsest levels come from the coarsest output, after its ReLU, without a ReLU of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.methods.yolact.convs import build_conv
from instseg_ext.modeling.darknet import build_darknet53_backbone
from instseg_ext.modeling.deform_resnet import build_instseg_resnet_backbone
from instseg_ext.modeling.mobilenet import build_mobilenetv2_backbone

__all__ = ["YOLACTFPN", "build_yolact_fpn_backbone"]

_BOTTOM_UPS = {
    "resnet": build_instseg_resnet_backbone,
    "darknet53": build_darknet53_backbone,
    "mobilenetv2": build_mobilenetv2_backbone,
}


class YOLACTFPN(Backbone):
    """A trunk with the pyramid of Sec. 4 of arXiv:1904.02689 on it.

    Levels are named as detectron2 names them: ``p<l>`` has stride ``2 ** l``. The two halves of the
    pyramid, ``top_down`` and ``levels``, can be called by themselves: between them lie the maps
    that a video model may carry over from one frame to the next.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        *,
        out_channels: int = 256,
        num_downsamples: int = 2,
    ) -> None:
        """Create the convolutions.

        Args:
            bottom_up: the trunk; its features, fine to coarse, each have twice the stride of the
                one before.
            out_channels: channels of every level.
            num_downsamples: further levels, each a strided convolution of the level before it.

        Raises:
            ValueError: if the strides of the trunk's features do not double.
        """
        super().__init__()
        self.bottom_up = bottom_up
        shapes = bottom_up.output_shape()
        self.in_features = tuple(shapes)
        strides = [shape.stride for shape in shapes.values()]
        first = strides[0].bit_length() - 1
        if strides != [2 ** (first + i) for i in range(len(strides))]:
            raise ValueError(
                "YOLACT's pyramid needs OUT_FEATURES of its trunk whose strides double from one to "
                f"the next; those of {', '.join(shapes)} are {strides}."
            )
        self.merged_levels = tuple(range(first, first + len(strides)))
        top = self.merged_levels[-1]
        self.further_levels = tuple(range(top + 1, top + 1 + num_downsamples))
        for shape, level in zip(shapes.values(), self.merged_levels, strict=True):
            self.add_module(f"fpn_lateral{level}", build_conv(shape.channels, out_channels, 1))
            self.add_module(f"fpn_output{level}", build_conv(out_channels, out_channels, relu=True))
        for level in self.further_levels:
            self.add_module(
                f"fpn_downsample{level}", build_conv(out_channels, out_channels, stride=2)
            )
        levels = (*self.merged_levels, *self.further_levels)
        self._out_features = [f"p{level}" for level in levels]
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels of an image batch (N, C, H, W), as ``levels`` does."""
        return self.levels(self.top_down(self.bottom_up(x)))

    def top_down(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Reduce the trunk's features to one width and add to each the coarser ones.

        Args:
            features: by name, (N, C_l, H_l, W_l).

        Returns:
            The merged maps, fine to coarse, each (N, D, H_l, W_l).
        """
        merged: list[Tensor] = []
        pairs = zip(self.in_features, self.merged_levels, strict=True)
        for name, level in reversed(list(pairs)):
            x = self.get_submodule(f"fpn_lateral{level}")(features[name])
            if merged:
                size = x.shape[-2:]
                x = x + F.interpolate(merged[0], size=size, mode="bilinear", align_corners=False)
            merged.insert(0, x)
        return merged

    def levels(self, merged: Sequence[Tensor]) -> dict[str, Tensor]:
        """Turn merged maps into pyramid levels.

        Args:
            merged: what ``top_down`` returned.

        Returns:
            The levels by name, each (N, D, H_l, W_l), sizes halved and rounded up from one to the
            next of the further ones; the merged ones are not negative, the further ones may be.
        """
        results = {}
        for level, x in zip(self.merged_levels, merged, strict=True):
            results[f"p{level}"] = self.get_submodule(f"fpn_output{level}")(x)
        for level in self.further_levels:
            x = results[f"p{level - 1}"]
            results[f"p{level}"] = self.get_submodule(f"fpn_downsample{level}")(x)
        return results


@BACKBONE_REGISTRY.register()
def build_yolact_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> YOLACTFPN:
    """Build the trunk that ``MODEL.YOLACT.BOTTOM_UP`` names, and YOLACT's pyramid on it.

    The pyramid is as wide as ``MODEL.FPN.OUT_CHANNELS``. It builds on all features of the trunk,
    the ``OUT_FEATURES`` of the trunk's own node: ``MODEL.FPN.IN_FEATURES`` would have to change
    with ``BOTTOM_UP`` and is not read. It ends at the coarsest level in
    ``MODEL.YOLACT.IN_FEATURES``, or that of the trunk: parameters of further ones would get no
    gradient, which DistributedDataParallel refuses.

    Raises:
        ValueError: if ``MODEL.YOLACT.BOTTOM_UP`` is unknown or the features do not fit.
    """
    kind = check_choice("MODEL.YOLACT.BOTTOM_UP", cfg.MODEL.YOLACT.BOTTOM_UP, _BOTTOM_UPS)
    bottom_up = _BOTTOM_UPS[kind](cfg, input_shape)
    top = max(shape.stride for shape in bottom_up.output_shape().values()).bit_length() - 1
    # What is no level at all, the model refuses.
    numbers = [name[1:] for name in cfg.MODEL.YOLACT.IN_FEATURES]
    coarsest = max((int(number) for number in numbers if number.isdecimal()), default=top)
    return YOLACTFPN(
        bottom_up,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        num_downsamples=max(0, coarsest - top),
    )
