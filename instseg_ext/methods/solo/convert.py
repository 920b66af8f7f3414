"""Checkpoints of others that hold SOLO models: the authors', MMDetection's, AdelaiDet's.

No tensor changes: mask channel k = i * S + j, the order of classes and the layout of offsets are
the same everywhere. One table of names per code base; which model it is, is read from the renamed
tensors and so is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from instseg_ext.checkpoint import (
    COUNTERS,
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


def _openmmlab_map(blocks: Mapping[str, str], predictors: Mapping[str, str]) -> KeyMap:
    """Return the map of a model written with OpenMMLab's blocks.

    Args:
        blocks: convolution with norm, name in the file to name here.
        predictors: plain convolutions, likewise.
    """
    return KeyMap(
        (
            COUNTERS,
            *resnet_rules("backbone.", "backbone.bottom_up."),
            *fpn_rules("neck.", "backbone."),
            *(rule for names in blocks.items() for rule in block_rules(*names)),
            *(Rename(f"{old}.{{p*}}", f"{new}.{{p}}") for old, new in predictors.items()),
        )
    )


_AUTHORS = _openmmlab_map(
    {
        "bbox_head.cate_convs.{q}": "head.category_tower.{q}",
        "bbox_head.kernel_convs.{q}": "head.kernel_tower.{q}",
        "bbox_head.ins_convs.{q}": "head.mask_tower.{q}",
        "bbox_head.ins_convs_{axis:x|y}.{q}": "head.mask_tower_{axis}.{q}",
        "mask_feat_head.convs_all_levels.{m}.conv{q}": "head.mask_features.levels.{m}.{q}",
        "mask_feat_head.conv_pred.0": "head.mask_features.pred",
    },
    {
        "bbox_head.{kind:solo|dsolo}_cate": "head.category_pred",
        "bbox_head.solo_kernel": "head.kernel_pred",
        "bbox_head.solo_ins_list.{l}": "head.mask_pred.{l}",
        "bbox_head.dsolo_ins_list_{axis:x|y}.{l}": "head.mask_pred_{axis}.{l}",
    },
)

_MMDETECTION = _openmmlab_map(
    {
        "mask_head.cls_convs.{q}": "head.category_tower.{q}",
        "mask_head.kernel_convs.{q}": "head.kernel_tower.{q}",
        "mask_head.mask_convs.{q}": "head.mask_tower.{q}",
        "mask_head.mask_convs_{axis:x|y}.{q}": "head.mask_tower_{axis}.{q}",
        "mask_head.mask_feature_head.convs_all_levels.{m}.conv{q}": (
            "head.mask_features.levels.{m}.{q}"
        ),
        "mask_head.mask_feature_head.conv_pred": "head.mask_features.pred",
    },
    {
        "mask_head.conv_cls": "head.category_pred",
        "mask_head.conv_kernel": "head.kernel_pred",
        "mask_head.conv_mask_list.{l}": "head.mask_pred.{l}",
        "mask_head.conv_mask_list_{axis:x|y}.{l}": "head.mask_pred_{axis}.{l}",
    },
)


def _adelaidet_map() -> KeyMap:
    """Return the map of AdelaiDet, where a tower is a list of convolution, norm, ReLU."""
    rules = [COUNTERS, Rename("backbone.{p*}", "backbone.{p}")]
    for old, new in (("cate", "category"), ("kernel", "kernel")):
        rules += [
            Rename(f"ins_head.{old}_tower.{{3*q}}.weight", f"head.{new}_tower.{{q}}.weight"),
            Rename(f"ins_head.{old}_tower.{{3*q+1}}.{{p*}}", f"head.{new}_tower.{{q}}.norm.{{p}}"),
            Rename(f"ins_head.{old}_pred.{{p*}}", f"head.{new}_pred.{{p}}"),
        ]
    for old, new in (
        ("convs_all_levels.{m}.conv{q}", "levels.{m}.{q}"),
        ("conv_pred", "pred"),
    ):
        rules += [
            Rename(f"mask_head.{old}.0.weight", f"head.mask_features.{new}.weight"),
            Rename(f"mask_head.{old}.1.{{p*}}", f"head.mask_features.{new}.norm.{{p}}"),
        ]
    return KeyMap(rules)


def _starts_with(*prefixes: str) -> Callable[[Collection[str]], bool]:
    return lambda names: any(name.startswith(prefixes) for name in names)


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadFacts:
    """What the shapes of a head tell.

    Attributes:
        kind: ``vanilla``, ``decoupled``, ``decoupled_light`` or ``SOLOv2``.
        num_convs: convolutions per tower.
        width: channels of the towers.
        kernel_dim: E; 0 where there are no kernels.
        deform_towers: deformable convolutions of the towers: ``none``, ``last``, ``all`` or
            ``some``.
        deform_masks: deformable convolutions in the mask features.
        modulated: they are of version 2.
    """

    kind: str
    num_convs: int
    width: int
    kernel_dim: int = 0
    deform_towers: str = "none"
    deform_masks: bool = False
    modulated: bool = False

    @property
    def text(self) -> str:
        """In words."""
        names = {
            "vanilla": "SOLO",
            "decoupled": "Decoupled SOLO",
            "decoupled_light": "Decoupled-Light SOLO",
        }
        words = [names.get(self.kind, self.kind), f"{self.num_convs} x {self.width} per tower"]
        if self.kernel_dim:
            words.append(f"{self.kernel_dim} kernel channels")
        if self.deform_towers != "none" or self.deform_masks:
            places = [f"{self.deform_towers} tower convolutions"] * (self.deform_towers != "none")
            places += ["mask features"] * self.deform_masks
            words.append(
                f"deformable convolution v{2 if self.modulated else 1} in {' and '.join(places)}"
            )
        return ", ".join(words)


_SOLO = HeadFacts("vanilla", 7, 256)
_DECOUPLED = HeadFacts("decoupled", 7, 256)
_LIGHT = HeadFacts("decoupled_light", 4, 256)
_LIGHT_DCN = HeadFacts("decoupled_light", 4, 256, deform_towers="last")
_V2 = HeadFacts("SOLOv2", 4, 512, 256)
_V2_DCN = HeadFacts("SOLOv2", 4, 512, 256, "all", deform_masks=True, modulated=True)
_V2_LIGHT = HeadFacts("SOLOv2", 2, 256, 128)
_V2_LIGHT_DCN = HeadFacts("SOLOv2", 3, 256, 128, "last")
_V2_LIGHT_DCN2 = HeadFacts("SOLOv2", 3, 256, 128, "last", modulated=True)
_R18, _R34, _R50, _R101 = (ResNetFacts(depth) for depth in (18, 34, 50, 101))

_CONFIGS = {
    (_SOLO, _R50): "SOLO/solo_R_50_FPN_3x",
    (_SOLO, _R101): "SOLO/solo_R_101_FPN_3x",
    (_DECOUPLED, _R50): "SOLO/decoupled_solo_R_50_FPN_3x",
    (_DECOUPLED, _R101): "SOLO/decoupled_solo_R_101_FPN_3x",
    (_LIGHT, _R50): "SOLO/decoupled_solo_light_R_50_FPN_3x",
    (_LIGHT_DCN, ResNetFacts(50, deform="v1")): "SOLO/decoupled_solo_light_dcn_R_50_FPN_3x",
    (_V2, _R18): "SOLO/solov2_R_18_FPN_1x",
    (_V2, _R34): "SOLO/solov2_R_34_FPN_1x",
    (_V2, _R50): "SOLO/solov2_R_50_FPN_3x",
    (_V2, _R101): "SOLO/solov2_R_101_FPN_3x",
    (_V2_DCN, ResNetFacts(101, deform="v2")): "SOLO/solov2_R_101_DCN_FPN_3x",
    (_V2_DCN, ResNetFacts(101, 64, 4, "v2")): "SOLO/solov2_X_101_DCN_FPN_3x",
    (_V2_LIGHT, _R18): "SOLO/solov2_light_448_R_18_FPN_3x",
    (_V2_LIGHT, _R34): "SOLO/solov2_light_448_R_34_FPN_3x",
    (_V2_LIGHT, _R50): "SOLO/solov2_light_448_R_50_FPN_3x",
    (_V2_LIGHT_DCN, ResNetFacts(50, deform="v1")): "SOLO/solov2_light_512_dcn_R_50_FPN_3x",
    # MMDetection's model of that name: deformable convolution v2, shown smaller images (below).
    (_V2_LIGHT_DCN2, ResNetFacts(50, deform="v2")): "SOLO/solov2_light_512_dcn_R_50_FPN_3x",
}
_OPTS = {
    _V2_LIGHT_DCN2: (
        *("MODEL.RESNETS.DEFORM_MODULATED", True),
        *("MODEL.SOLO.DEFORM.MODULATED", True),
        *("INPUT.MAX_SIZE_TRAIN", 768),
        *("INPUT.MIN_SIZE_TEST", 448),
        *("INPUT.MAX_SIZE_TEST", 768),
    )
}
_ADELAIDET_CONFIGS = {
    (_V2, _R50): "SOLO/solov2_adelaidet_R_50_FPN_3x",
    (_V2, _R101): "SOLO/solov2_adelaidet_R_101_FPN_3x",
}
# Published with both schedules.
_BOTH_SCHEDULES = (
    "SOLO/solo_R_50_FPN_3x",
    "SOLO/decoupled_solo_R_50_FPN_3x",
    "SOLO/solov2_R_50_FPN_3x",
)


def head_facts(shapes: Shapes) -> HeadFacts:
    """Read the facts of a head with our names."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    kind = "vanilla"
    if has("head.kernel_"):
        kind = "SOLOv2"
    elif has("head.mask_tower_"):
        kind = "decoupled"
    elif has("head.mask_pred_"):
        kind = "decoupled_light"
    tower = [name for name in shapes if _in_tower(name, ".weight")]
    offsets = [name for name in shapes if _in_tower(name, ".offset.weight")]
    mask_offsets = [
        name
        for name in shapes
        if name.startswith("head.mask_features.") and name.endswith(".offset.weight")
    ]
    found = {name.split(".")[2] for name in offsets}
    where = {0: "none", len(tower): "all"}.get(len(found), "some")
    if found == {str(len(tower) - 1)} and len(tower) > 1:
        where = "last"
    return HeadFacts(
        kind,
        len(tower),
        shapes[tower[0]][0] if tower else 0,
        shapes.get("head.kernel_pred.weight", (0,))[0],
        where,
        bool(mask_offsets),
        # 27 channels for a 3x3 kernel: two offsets and a factor per tap.
        any(shapes[name][0] == 27 for name in [*offsets, *mask_offsets]),
    )


def _in_tower(name: str, ending: str) -> bool:
    """Tell whether ``name`` is ``head.category_tower.{q}`` with that ending."""
    parts = name.removesuffix(ending).split(".")
    return name.endswith(ending) and len(parts) == 3 and parts[1] == "category_tower"


def _describe_with(
    configs: Mapping[tuple[HeadFacts, ResNetFacts], str],
) -> Callable[[Shapes], Variant]:
    def describe(shapes: Shapes) -> Variant:
        head, backbone = head_facts(shapes), resnet_facts(shapes)
        config = configs.get((head, backbone), "")
        notes = ()
        if config in _BOTH_SCHEDULES:
            notes = (
                "the weights do not tell the 3x from the 1x schedule: "
                f"{config.replace('3x', '1x')} is the same model.",
            )
        return Variant(
            f"{head.text}, {backbone.text}",
            config,
            _OPTS.get(head, ()),
            notes,
            shapes.get("head.category_pred.bias", (None,))[0],
        )

    return describe


FAMILIES = (
    Family(
        "solo-authors",
        "the SOLO authors' repository, a fork of MMDetection 1",
        _AUTHORS,
        _starts_with("bbox_head.solo_", "bbox_head.dsolo_"),
        _describe_with(_CONFIGS),
    ),
    Family(
        "solo-mmdet",
        "SOLO of MMDetection 2 and 3",
        _MMDETECTION,
        _starts_with("mask_head.conv_cls.", "mask_head.conv_mask_list", "mask_head.conv_kernel."),
        _describe_with(_CONFIGS),
    ),
    Family(
        "adelaidet",
        "SOLOv2 of AdelaiDet",
        _adelaidet_map(),
        _starts_with("ins_head."),
        _describe_with(_ADELAIDET_CONFIGS),
    ),
)
