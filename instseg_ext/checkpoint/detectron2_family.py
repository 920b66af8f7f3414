"""detectron2's own files: R-CNN models and the ImageNet weights of their backbones.

Names stay as they are; only the ImageNet weights that came from Caffe2 have names of another
style.
"""

from __future__ import annotations

from collections.abc import Collection

from instseg_ext.checkpoint.family import Family, Shapes, Variant, register_family
from instseg_ext.checkpoint.keymap import COUNTERS, Drop, KeyMap, Rename
from instseg_ext.checkpoint.resnet_rules import ResNetFacts, resnet_facts

__all__ = ["DETECTRON2"]

_CLASSIFIER = "classifier of ImageNet"
_COMPUTED = "values that the config gives"

_MODEL_RULES = (
    Drop("pixel_{p:mean|std}", _COMPUTED),
    Drop("proposal_generator.anchor_generator.{p*}", _COMPUTED),
    Rename("{part:backbone|proposal_generator|roi_heads}.{p*}", "{part}.{p}"),
)
_BACKBONE_RULES = (
    Drop("stem.fc.{p*}", _CLASSIFIER),
    Rename("stem.{p*}", "stem.{p}"),
    Rename("res{a}.{p*}", "res{a}.{p}"),
)
# Caffe2's names. Its affine layers hold scale and shift alone: the statistics are in them already.
_AFFINE = (("s", "weight"), ("b", "bias"), ("gamma", "weight"), ("beta", "bias"))
_BRANCHES = (("1", "shortcut"), ("2a", "conv1"), ("2b", "conv2"), ("2c", "conv3"))


def _caffe2_convolution(weight: str, affine: str, target: str) -> tuple[Rename, ...]:
    """Return the rules for a convolution and the affine layer behind it."""
    return (
        Rename(f"{weight}_w", f"{target}.weight"),
        *(Rename(f"{affine}_{old}", f"{target}.norm.{new}") for old, new in _AFFINE),
    )


_CAFFE2_RULES = (
    Drop("fc1000_{p:w|b}", _CLASSIFIER),
    Drop("pred_{p:w|b}", _CLASSIFIER),
    Drop("conv1_b", "a bias before a norm, which detectron2 does not read"),
    *_caffe2_convolution("conv1", "res_conv1_bn", "stem.conv1"),
    *(
        rule
        for old, new in _BRANCHES
        for rule in _caffe2_convolution(
            f"res{{a}}_{{b}}_branch{old}", f"res{{a}}_{{b}}_branch{old}_bn", f"res{{a}}.{{b}}.{new}"
        )
    ),
)
_NOTE = "detectron2's schedules cannot be told apart: all of them are this model."
_RESNEXT_OPTS = (
    *("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NUM_GROUPS", 32),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.STRIDE_IN_1X1", False),
    *("MODEL.PIXEL_STD", [57.375, 57.12, 58.395]),
)
# What the model zoo's Mask R-CNNs with FPN change in the config of the smallest.
_ZOO = {
    ResNetFacts(50): (),
    ResNetFacts(101): ("MODEL.RESNETS.DEPTH", 101),
    ResNetFacts(101, 32, 8): _RESNEXT_OPTS,
}


def _claims(names: Collection[str]) -> bool:
    return (
        any(name.startswith(("proposal_generator.", "roi_heads.")) for name in names)
        or "stem.conv1.weight" in names
        or "res2_0_branch2a_w" in names
    )


def _describe(shapes: Shapes) -> Variant:
    if "stem.conv1.weight" in shapes:
        facts = resnet_facts(shapes, "")
        return Variant(f"{facts.text} for ImageNet, without classifier", backbone_only=True)
    facts = resnet_facts(shapes)
    classifier = shapes.get("roi_heads.box_predictor.cls_score.bias")
    parts = {
        "mask head": "roi_heads.mask_head.predictor.weight" in shapes,
        "FPN": "backbone.fpn_output2.weight" in shapes,
        "box head of two layers": "roi_heads.box_head.fc2.weight" in shapes,
    }
    fits = facts in _ZOO and all(parts.values())
    return Variant(
        f"R-CNN, {facts.text}, {', '.join(part for part, there in parts.items() if there)}",
        "MaskRCNN/mask_rcnn_R_50_FPN_1x" if fits else "",
        _ZOO[facts] if fits else (),
        (_NOTE,) if fits else (),
        # The last class is the background.
        classifier[0] - 1 if classifier else None,
    )


DETECTRON2 = register_family(
    Family(
        name="detectron2",
        summary="detectron2's model zoo",
        key_map=KeyMap((COUNTERS, *_MODEL_RULES, *_BACKBONE_RULES, *_CAFFE2_RULES)),
        claims=_claims,
        describe=_describe,
    )
)
