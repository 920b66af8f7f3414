"""detectron2's own files: R-CNN and PointRend models and the ImageNet weights of their backbones.

Names stay as they are, but for those of the first PointRend models and of the ImageNet weights that
came from Caffe2.
"""

from __future__ import annotations

from collections.abc import Collection

from instseg_ext.checkpoint.detectron2_models import describe_model
from instseg_ext.checkpoint.family import Family, Shapes, Variant, register_family
from instseg_ext.checkpoint.keymap import COUNTERS, Drop, KeyMap, Rename
from instseg_ext.checkpoint.resnet_rules import resnet_facts

__all__ = ["DETECTRON2"]

_CLASSIFIER = "classifier of ImageNet"
_COMPUTED = "values that the config gives"

# The two heads of the first PointRend stood beside the mask head, and then its layers had other
# names.
_COARSE, _POINT = "roi_heads.mask_head.coarse_head.", "roi_heads.mask_head.point_head."
_FIRST_POINTREND_RULES = (
    Rename("roi_heads.mask_coarse_head.coarse_mask_fc{n}.{p*}", f"{_COARSE}fc{{n}}.{{p}}"),
    Rename("roi_heads.mask_coarse_head.{p*}", f"{_COARSE}{{p}}"),
    Rename("roi_heads.mask_point_head.{p*}", f"{_POINT}{{p}}"),
    Rename(f"{_COARSE}coarse_mask_fc{{n}}.{{p*}}", f"{_COARSE}fc{{n}}.{{p}}"),
)
_MODEL_RULES = (
    Drop("pixel_{p:mean|std}", _COMPUTED),
    Drop("proposal_generator.anchor_generator.{p*}", _COMPUTED),
    *_FIRST_POINTREND_RULES,
    Rename("{part:backbone|proposal_generator|roi_heads|sem_seg_head}.{p*}", "{part}.{p}"),
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


def _claims(names: Collection[str]) -> bool:
    return (
        any(
            name.startswith(("proposal_generator.", "roi_heads.", "sem_seg_head."))
            for name in names
        )
        or "stem.conv1.weight" in names
        or "res2_0_branch2a_w" in names
    )


def _describe(shapes: Shapes) -> Variant:
    if "stem.conv1.weight" in shapes:
        facts = resnet_facts(shapes, "")
        return Variant(f"{facts.text} for ImageNet, without classifier", backbone_only=True)
    return describe_model(shapes)


DETECTRON2 = register_family(
    Family(
        name="detectron2",
        summary="detectron2's model zoo and its PointRend project",
        key_map=KeyMap((COUNTERS, *_MODEL_RULES, *_BACKBONE_RULES, *_CAFFE2_RULES)),
        claims=_claims,
        describe=_describe,
    )
)
