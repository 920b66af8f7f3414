"""The FCIS authors' MXNet files: their models, and the ImageNet ResNets they start from.

Names are ``arg:<layer>_<parameter>`` and, for statistics of norms, ``aux:...``. Four things are in
another order than here: input channels are RGB, the background is the first class, the anchors of
one aspect ratio stand together, and objectness has a logit for each of its two classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from instseg_ext.checkpoint import (
    ConversionError,
    Drop,
    Family,
    KeyMap,
    Rename,
    Shapes,
    Variant,
    anchors_by_size,
    check_whole,
    foreground_minus_background,
    resnet_facts,
    resnet_shapes,
)
from instseg_ext.checkpoint.keymap import Mapped

__all__ = ["FAMILIES"]

_CELLS = 7 * 7
# Score maps of a class: outside and inside, one for each cell.
_MAPS = 2 * _CELLS
_RPN, _HEADS = "proposal_generator.rpn_head", "roi_heads"


# --- layouts -------------------------------------------------------------------------------------


def _bgr(weights: Tensor) -> Tensor:
    """Turn the input channels of the first convolution, (out, 3, h, w)."""
    return weights.flip(1)


def _background_last(predictor: Tensor) -> Tensor:
    """Move the maps of the first class behind the others; (98 (K + 1), ...) weights or bias.

    Raises:
        ConversionError: if there are not 98 rows per class.
    """
    if not predictor.dim() or len(predictor) % _MAPS:
        raise ConversionError(
            f"fcis_cls_seg is {list(predictor.shape)}: it must have {_MAPS} rows per class."
        )
    return predictor.roll(-_MAPS, dims=0)


def _without_background_box(predictor: Tensor) -> Tensor:
    """Leave out the boxes of the background, which are never read; (392, ...) weights or bias.

    Raises:
        ConversionError: if there are boxes of more than background and foreground.
    """
    boxes = 4 * _CELLS
    if not predictor.dim() or len(predictor) != 2 * boxes:
        raise ConversionError(
            f"fcis_bbox is {list(predictor.shape)}: it must have {2 * boxes} rows."
        )
    return predictor[boxes:].contiguous()


# --- names ---------------------------------------------------------------------------------------

# Blocks by their name: letters, but in the long stages of ResNet-101 and 152 a, b1, b2, ...
_BLOCKS = {letter: str(number) for number, letter in enumerate("abcdef")} | {"b{n}": "{n}"}
_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_NORM = {
    "arg:{}_gamma": "weight",
    "arg:{}_beta": "bias",
    "aux:{}_moving_mean": "running_mean",
    "aux:{}_moving_var": "running_var",
}


def _layer(
    source: str, target: str, transform: Callable[[Tensor], Tensor] | None = None
) -> tuple[Rename, ...]:
    return tuple(
        Rename(f"arg:{source}_{kind}", f"{target}.{kind}", transform) for kind in ("weight", "bias")
    )


def _convolution(
    source: str, norm: str, target: str, transform: Callable[[Tensor], Tensor] | None = None
) -> tuple[Rename, ...]:
    """Return the rules for a convolution without bias and the norm behind it."""
    return (
        Rename(f"arg:{source}_weight", f"{target}.weight", transform),
        *(Rename(old.format(norm), f"{target}.norm.{new}") for old, new in _NORM.items()),
    )


def _resnet_rules(prefix: str) -> tuple[Rename | Drop, ...]:
    rules: list[Rename | Drop] = [*_convolution("conv1", "bn_conv1", f"{prefix}stem.conv1", _bgr)]
    for block, number in _BLOCKS.items():
        for branch, conv in _BRANCHES.items():
            place = f"{{s}}{block}_branch{branch}"
            rules += _convolution(f"res{place}", f"bn{place}", f"{prefix}res{{s}}.{number}.{conv}")
    return (*rules, Drop("arg:fc1000_{p*}", "ImageNet classifier"))


_HEAD_RULES = (
    Drop("arg:{layer*}_test", "boxes multiplied by the scale of their targets, as decoding does"),
    *_layer("rpn_conv_3x3", f"{_RPN}.conv"),
    *_layer("rpn_cls_score", f"{_RPN}.objectness_logits", foreground_minus_background),
    *_layer("rpn_bbox_pred", f"{_RPN}.anchor_deltas", anchors_by_size),
    *_layer("conv_new_1", f"{_HEADS}.conv_new"),
    *_layer("fcis_cls_seg", f"{_HEADS}.cls_seg", _background_last),
    *_layer("fcis_bbox", f"{_HEADS}.bbox", _without_background_box),
)
_BACKBONE = KeyMap(_resnet_rules(""))


class _ModelOrBackbone(KeyMap):
    """Rules that give a backbone alone the names that it has without a model."""

    def apply(self, state_dict: Mapping[str, Any]) -> Mapped:
        """Rename a state dict; see `KeyMap.apply`."""
        if _is_model(state_dict):
            return super().apply(state_dict)
        return _BACKBONE.apply(state_dict)


def _is_model(names: Collection[str]) -> bool:
    return "arg:fcis_cls_seg_weight" in names


# --- models --------------------------------------------------------------------------------------

# Depth and anchors per cell.
_CONFIGS = {
    (101, 9): "FCIS/fcis_R_101_sbd",
    (101, 12): "FCIS/fcis_R_101_ohem_coco",
    (50, 12): "FCIS/fcis_R_50_ohem_coco",
}
# Boxes as in the authors' code.
_OPTS = ("MODEL.FCIS.LEGACY_BOXES", True)
_NOTE = (
    "the weights want MODEL.FCIS.LEGACY_BOXES True, the authors' boxes, which a config given with "
    "--config does not get by itself"
)
_TURNED = "the first convolution was turned from RGB to BGR"
_INPUT = (
    "The weights want INPUT.FORMAT BGR, MODEL.PIXEL_MEAN [103.06, 115.9, 123.15], MODEL.PIXEL_STD "
    "[1.0, 1.0, 1.0] and MODEL.RESNETS.STRIDE_IN_1X1 True."
)


def _describe(shapes: Shapes) -> Variant:
    if "stem.conv1.weight" in shapes:
        return _describe_backbone(shapes)
    facts = resnet_facts(shapes, "backbone.")
    anchors = shapes.get(f"{_RPN}.objectness_logits.bias", (0,))[0]
    maps = shapes.get(f"{_HEADS}.cls_seg.bias")
    config = _CONFIGS.get((facts.depth, anchors), "")
    return Variant(
        f"FCIS, {facts.text}, {anchors} anchors per cell",
        config,
        _OPTS if config else (),
        (_TURNED, _NOTE),
        # The last class is the background.
        maps[0] // _MAPS - 1 if maps else None,
    )


def _describe_backbone(shapes: Shapes) -> Variant:
    facts = resnet_facts(shapes, "")
    if not facts.depth:
        raise ConversionError(
            "the ResNet in the file has the blocks of none of 18, 34, 50, 101, 152 layers."
        )
    check_whole(f"{facts.text} of MXNet", shapes, resnet_shapes({"DEPTH": facts.depth}))
    return Variant(
        f"{facts.text} for ImageNet, without classifier",
        notes=(_TURNED, _INPUT),
        backbone_only=True,
    )


def _claims(names: Collection[str]) -> bool:
    return _is_model(names) or {"arg:bn_conv1_gamma", "arg:res2a_branch1_weight"} <= set(names)


FAMILIES = (
    Family(
        "fcis-mxnet",
        "the FCIS authors' MXNet code, and ImageNet ResNets as it names them",
        _ModelOrBackbone((*_resnet_rules("backbone."), *_HEAD_RULES)),
        _claims,
        _describe,
    ),
)
