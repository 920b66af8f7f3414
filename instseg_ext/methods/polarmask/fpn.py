"""PolarMask's feature pyramid: detectron2's, with two more levels made from its last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from instseg_ext.config import check_choice
from instseg_ext.modeling.deform_resnet import build_instseg_resnet_backbone

__all__ = ["PolarMaskFPN", "build_polarmask_resnet_fpn_backbone"]

_TOP_LEVELS = ("p6", "p7")


class PolarMaskFPN(FPN):
    """detectron2's pyramid with a padding of its own.

    The published models are trained and tested on batches padded to multiples of 128, the stride of
    their last level, while the pyramid itself needs no more than the stride of its trunk.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        *,
        size_divisibility: int,
        **options: Any,
    ) -> None:
        """Create the convolutions.

        Args:
            bottom_up: the trunk.
            in_features: its features to build on, fine to coarse.
            out_channels: channels of every level.
            size_divisibility: height and width of a batch are padded to multiples of it.
            **options: further arguments of detectron2's ``FPN``.

        Raises:
            ValueError: if a batch so padded does not fit the trunk's stride.
        """
        super().__init__(bottom_up, in_features, out_channels, **options)
        stride = bottom_up.output_shape()[in_features[-1]].stride
        if size_divisibility < 1 or size_divisibility % stride:
            raise ValueError(
                f"MODEL.POLARMASK.SIZE_DIVISIBILITY must be a multiple of {stride}, the stride of "
                f"{in_features[-1]}, not {size_divisibility}."
            )
        self._size_divisibility = size_divisibility


@BACKBONE_REGISTRY.register()
def build_polarmask_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PolarMaskFPN:
    """Build a ResNet and PolarMask's pyramid on the features ``MODEL.FPN.IN_FEATURES`` of it.

    p6 comes from p5, p7 from p6 after a ReLU; there are both or, if
    ``MODEL.POLARMASK.IN_FEATURES`` names neither, none.

    Raises:
        ValueError: if the levels do not fit, or ``MODEL.POLARMASK.SIZE_DIVISIBILITY`` does not.
    """
    bottom_up = build_instseg_resnet_backbone(cfg, input_shape)
    node = cfg.MODEL.FPN
    has_top = _check_levels(
        bottom_up.output_shape(), node.IN_FEATURES, cfg.MODEL.POLARMASK.IN_FEATURES
    )
    channels = node.OUT_CHANNELS
    return PolarMaskFPN(
        bottom_up,
        node.IN_FEATURES,
        channels,
        size_divisibility=cfg.MODEL.POLARMASK.SIZE_DIVISIBILITY,
        norm=node.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5") if has_top else None,
        fuse_type=node.FUSE_TYPE,
    )


def _check_levels(
    trunk: dict[str, ShapeSpec], fpn_features: Sequence[str], head_features: Sequence[str]
) -> bool:
    """Check that no parameter of the pyramid would be left without a gradient.

    DistributedDataParallel refuses such parameters.

    Args:
        trunk: features of the trunk.
        fpn_features: those the pyramid is built on.
        head_features: levels that the head reads; unknown ones the head refuses.

    Returns:
        Whether the pyramid has p6 and p7.
    """
    if not fpn_features:
        raise ValueError("MODEL.FPN.IN_FEATURES must name the features that the pyramid reads.")
    for name in fpn_features:
        check_choice("MODEL.FPN.IN_FEATURES", name, trunk)
    made = [f"p{trunk[name].stride.bit_length() - 1}" for name in fpn_features]
    has_top = any(name in head_features for name in _TOP_LEVELS)
    if has_top and made[-1] != "p5":
        raise ValueError(
            "MODEL.POLARMASK.IN_FEATURES with p6 or p7 needs a feature of stride 32 as the last of "
            f"MODEL.FPN.IN_FEATURES, which are {list(fpn_features)}."
        )
    if has_top and "p7" not in head_features:
        raise ValueError("MODEL.POLARMASK.IN_FEATURES must name p7 when it names p6.")
    read = {*head_features, "p5"} if has_top else {*head_features}
    unused = [name for name in made if name not in read]
    if unused:
        raise ValueError(
            f"MODEL.POLARMASK.IN_FEATURES leaves out {', '.join(unused)}, so that these levels "
            "would not be trained; name them, or leave their features out of MODEL.FPN.IN_FEATURES."
        )
    return has_top
