"""Checkpoints of others that hold PolarMask or FCOS models, written with MMDetection 1.

The authors renamed their predictors from ``fcos_*`` to ``polar_*`` on the day they changed the
order of the rays (2019-11-12). Files with the old names are turned by a quarter, so that all models
here have one order, that of ``MODEL.POLARMASK.RAY_ORIGIN`` down. Names are a hint, no proof: the
proof is in `ray_order`. Nothing else changes; sides of boxes, classes and levels have one order
everywhere.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from instseg_ext.checkpoint import (
    COUNTERS,
    ConversionError,
    Family,
    KeyMap,
    Rename,
    ResNetFacts,
    Shapes,
    Variant,
    block_rules,
    fpn_rules,
    resnet_facts,
    resnet_rules,
)

__all__ = ["FAMILIES", "HeadFacts", "head_facts"]


# --- names ---------------------------------------------------------------------------------------


def _turn_rays(predictor: Tensor) -> Tensor:
    """Bring the rays from the order in use before 2019-11-12 into that in use since then.

    The old first ray points to the left, the new one down, where the old ray R / 4 points; both
    orders turn the same way.

    Args:
        predictor: (R, ...) weight or bias.

    Raises:
        ConversionError: if R rays have no quarter.
    """
    rays = len(predictor) if predictor.dim() else 0
    if not rays or rays % 4:
        raise ConversionError(
            f"bbox_head.fcos_mask is {list(predictor.shape)}: rays under this name are turned by a "
            "quarter, so their number must be divisible by 4."
        )
    return predictor.roll(-(rays // 4), dims=0)


_TURNED = (
    "the names fcos_* were in use until 2019-11-12, when rays began at the left; these were turned "
    "by a quarter and begin below."
)


def _tower_rules(old: str, new: str) -> tuple[Rename, ...]:
    there, here = f"bbox_head.{old}_convs", f"head.{new}_tower.{{q}}"
    return (
        *block_rules(f"{there}.{{q}}", here),
        # Deformable towers are lists of convolution, norm, ReLU.
        Rename(f"{there}.{{3*q}}.conv_offset_mask.{{p*}}", f"{here}.offset.{{p}}"),
        Rename(f"{there}.{{3*q}}.{{p:weight|bias}}", f"{here}.{{p}}"),
        Rename(f"{there}.{{3*q+1}}.{{p:weight|bias}}", f"{here}.norm.{{p}}"),
    )


_RULES = (
    COUNTERS,
    *resnet_rules("backbone.", "backbone.bottom_up."),
    Rename("neck.fpn_convs.3.conv.{p*}", "backbone.top_block.p6.{p}"),
    Rename("neck.fpn_convs.4.conv.{p*}", "backbone.top_block.p7.{p}"),
    *fpn_rules("neck.", "backbone.", first_level=3),
    *_tower_rules("cls", "cls"),
    *_tower_rules("reg", "box"),
    *_tower_rules("mask", "mask"),
    Rename("bbox_head.{kind:fcos|polar}_cls.{p*}", "head.cls_logits.{p}"),
    Rename("bbox_head.{kind:fcos|polar}_centerness.{p*}", "head.ctrness.{p}"),
    Rename("bbox_head.{kind:fcos|polar}_reg.{p*}", "head.box_pred.{p}"),
    Rename("bbox_head.polar_mask.{p*}", "head.ray_pred.{p}"),
    Rename("bbox_head.fcos_mask.{p*}", "head.ray_pred.{p}", _turn_rays, _TURNED),
    # FCOS has but one kind of scales.
    Rename("bbox_head.{kind:scales|scales_bbox}.{l}.scale", "head.scales_box.{l}.scale"),
    Rename("bbox_head.scales_mask.{l}.scale", "head.scales_ray.{l}.scale"),
)


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadFacts:
    """What the shapes of a head tell.

    Attributes:
        num_rays: 0 without rays, which is FCOS.
        num_convs: convolutions per tower.
        width: channels of the towers.
        deform: convolutions of the towers are deformable.
    """

    num_rays: int = 36
    num_convs: int = 4
    width: int = 256
    deform: bool = False

    @property
    def text(self) -> str:
        """In words."""
        words = [f"PolarMask, {self.num_rays} rays" if self.num_rays else "FCOS"]
        words.append(f"{self.num_convs} x {self.width} per tower")
        return ", ".join([*words, "all deformable"] if self.deform else words)


_HEAD, _DCN_HEAD, _FCOS_HEAD = HeadFacts(), HeadFacts(deform=True), HeadFacts(num_rays=0)
_R50, _R101, _X101 = ResNetFacts(50), ResNetFacts(101), ResNetFacts(101, 64, 4)
_R50_DCN, _R101_DCN = ResNetFacts(50, deform="v1"), ResNetFacts(101, deform="v1")
_X101_DCN = ResNetFacts(101, 64, 4, "v1")

_CONFIGS = {
    (_HEAD, _R50): "PolarMask/polarmask_R_50_768_1x",
    (_HEAD, _R101): "PolarMask/polarmask_R_101_768_1x",
    (_HEAD, _X101): "PolarMask/polarmask_X_101_768_1x",
    (_DCN_HEAD, _R50_DCN): "PolarMask/polarmask_R_50_DCN_768_1x",
    (_DCN_HEAD, _R101_DCN): "PolarMask/polarmask_R_101_DCN_768_1x",
    (_DCN_HEAD, _X101_DCN): "PolarMask/polarmask_X_101_DCN_768_1x",
    (_DCN_HEAD, ResNetFacts(101, deform="v2")): "PolarMask/polarmask_R_101_DCN_6x",
}
# All but the last were published for two sizes of images.
_SMALLER, _LARGER = "_768_1x", "_2x"
_SIZE_NOTE = (
    "the weights do not tell the size of the images: a file for 1333 x 800 pixels, as those of the "
    "2x schedule are, needs --config {0}."
)
_FCOS_CONFIG = "PolarMask/fcos_R_50_FPN_1x"
_FCOS_OPTS = {
    _R50: (),
    _R101: ("MODEL.RESNETS.DEPTH", 101),
    _X101: (
        *("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NUM_GROUPS", 64),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.STRIDE_IN_1X1", False),
        *("MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]),
        *("MODEL.PIXEL_STD", [58.395, 57.12, 57.375], "INPUT.FORMAT", "RGB"),
    ),
}


def head_facts(shapes: Shapes) -> HeadFacts:
    """Read the facts of a head with our names."""
    tower = "head.cls_tower."
    convs = [shapes[n] for n in shapes if n.startswith(tower) and n.endswith(".norm.weight")]
    return HeadFacts(
        next(iter(shapes.get("head.ray_pred.weight", ())), 0),
        len(convs),
        next(iter(convs[0]), 0) if convs else 0,
        any(name.startswith(tower) and name.endswith(".offset.weight") for name in shapes),
    )


def _describe(shapes: Shapes) -> Variant:
    head, backbone = head_facts(shapes), resnet_facts(shapes)
    text = f"{head.text}, {backbone.text}"
    num_classes = next(iter(shapes.get("head.cls_logits.bias", ())), None)
    if head == _FCOS_HEAD and backbone in _FCOS_OPTS:
        return Variant(text, _FCOS_CONFIG, _FCOS_OPTS[backbone], num_classes=num_classes)
    config, notes = _CONFIGS.get((head, backbone), ""), ()
    if config.endswith(_SMALLER):
        notes = (_SIZE_NOTE.format(config.replace(_SMALLER, _LARGER)),)
    return Variant(text, config, notes=notes, num_classes=num_classes)


def _claims(names: Collection[str]) -> bool:
    return any(name.startswith(("bbox_head.fcos_", "bbox_head.polar_")) for name in names)


FAMILIES = (
    Family(
        "polarmask",
        "the PolarMask authors' repository, a fork of MMDetection 1, and that one's FCOS",
        KeyMap(_RULES),
        _claims,
        _describe,
    ),
)
