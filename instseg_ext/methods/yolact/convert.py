"""Checkpoints of others that hold YOLACT models: the authors', and those of YolactEdge.

YolactEdge has the authors' names but for its pyramid, which it cut in two. The authors' first class
is the background, ours the last; all other tensors go over as they are: channels of anchors, boxes
and prototypes have one order everywhere, and images are RGB.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from instseg_ext.checkpoint import (
    COUNTERS,
    ConversionError,
    Drop,
    Family,
    KeyMap,
    Rename,
    Shapes,
    Variant,
    resnet_facts,
    shapes_of,
)
from instseg_ext.checkpoint.keymap import Mapped

__all__ = ["FAMILIES", "ModelFacts", "model_facts"]

_BOTTOM_UP = "backbone.bottom_up."
_DEFORMABLE_STAGES = tuple(f"{_BOTTOM_UP}res{stage}." for stage in (3, 4, 5))
_BOXES, _CLASSES = "head.box_pred", "head.class_pred"


# --- names ---------------------------------------------------------------------------------------

_PARAMETERS = "{p:weight|bias}"
_NORM = "{p:weight|bias|running_mean|running_var}"


def _convolutions(names: Mapping[str, str]) -> tuple[Rename, ...]:
    """Return the rules for plain convolutions, name in the file to name here."""
    return tuple(Rename(f"{old}.{_PARAMETERS}", f"{new}.{{p}}") for old, new in names.items())


def _with_norm(convolution: str, norm: str, target: str) -> tuple[Rename, ...]:
    """Return the rules for a convolution and the norm behind it."""
    return (
        Rename(f"{convolution}.weight", f"{target}.weight"),
        Rename(f"{norm}.{_NORM}", f"{target}.norm.{{p}}"),
    )


def _resnet_rules() -> tuple[Rename, ...]:
    """Return the rules of a ResNet, of which some 3x3 convolutions may be deformable."""
    there, here = "backbone.layers.{a}.{b}", f"{_BOTTOM_UP}res{{a+2}}.{{b}}"
    return (
        *_with_norm("backbone.conv1", "backbone.bn1", f"{_BOTTOM_UP}stem.conv1"),
        *_with_norm(f"{there}.conv{{c}}", f"{there}.bn{{c}}", f"{here}.conv{{c}}"),
        *_with_norm(f"{there}.downsample.0", f"{there}.downsample.1", f"{here}.shortcut"),
        # A deformable convolution has a bias, although a norm follows.
        Rename(f"{there}.conv2.bias", f"{here}.conv2.bias"),
        *_convolutions({f"{there}.conv2.conv_offset_mask": f"{here}.conv2_offset"}),
    )


def _darknet_rules(source: str = "", target: str = "") -> tuple[Rename, ...]:
    """Return the rules of a DarkNet, in which a stage begins with its strided convolution.

    Args:
        source: prefix in the file; empty for a backbone alone.
        target: prefix here, likewise.
    """
    there, here = f"{source}layers.{{a}}", f"{target}stage{{a+1}}"
    return (
        *_with_norm(f"{source}_preconv.0", f"{source}_preconv.1", f"{target}stem"),
        *_with_norm(f"{there}.0.0", f"{there}.0.1", f"{here}.0"),
        *_with_norm(
            f"{there}.{{b}}.conv{{c}}.0", f"{there}.{{b}}.conv{{c}}.1", f"{here}.{{b}}.conv{{c}}"
        ),
    )


def _mobilenet_rules() -> tuple[Rename | Drop, ...]:
    """Return the rules of MobileNetV2; the layers of a block are numbered through."""
    there, here = "backbone.layers.{a}.{b}.conv", f"{_BOTTOM_UP}stage{{a}}.{{b}}"
    first, first_here = "backbone.layers.1.0.conv", f"{_BOTTOM_UP}stage1.0"
    return (
        *_with_norm("backbone.layers.0.0", "backbone.layers.0.1", f"{_BOTTOM_UP}stem.conv1"),
        # The only block that does not widen.
        *_with_norm(f"{first}.0.0", f"{first}.0.1", f"{first_here}.depthwise"),
        *_with_norm(f"{first}.1", f"{first}.2", f"{first_here}.project"),
        Drop("backbone.layers.{a:7|8}.{p*}", "layers behind the last that the pyramid reads"),
        *_with_norm(f"{there}.0.0", f"{there}.0.1", f"{here}.expand"),
        *_with_norm(f"{there}.1.0", f"{there}.1.1", f"{here}.depthwise"),
        *_with_norm(f"{there}.2", f"{there}.3", f"{here}.project"),
    )


def _pyramid_rules(laterals: str, outputs: str) -> tuple[Rename, ...]:
    """Return the rules of the pyramid, whose levels are stored from the coarsest to the finest.

    Args:
        laterals: module of the 1x1 convolutions in the file.
        outputs: module of the 3x3 convolutions.
    """
    levels = (5, 4, 3)
    return _convolutions(
        {f"{laterals}.lat_layers.{n}": f"backbone.fpn_lateral{p}" for n, p in enumerate(levels)}
        | {f"{outputs}.pred_layers.{n}": f"backbone.fpn_output{p}" for n, p in enumerate(levels)}
        | {f"{outputs}.downsample_layers.{{n}}": "backbone.fpn_downsample{n+6}"}
    )


# Version 1.0 saved modules that its own loader skips.
_UNREAD = (
    Drop("backbone.layer{n}.{p*}", "duplicates that version 1.0 saved"),
    Drop("fpn.downsample_layers.{n+2}.{p*}", "layers that version 1.0 saved and nothing reads"),
)
_HEAD_RULES = _convolutions(
    {
        # ReLUs and the upsampling have numbers, too.
        "proto_net.0": "head.protonet.conv1",
        "proto_net.2": "head.protonet.conv2",
        "proto_net.4": "head.protonet.conv3",
        "proto_net.8": "head.protonet.conv4",
        "proto_net.10": "head.protonet.pred",
        "prediction_layers.0.upfeature.0": "head.shared_conv",
        "prediction_layers.0.bbox_layer": _BOXES,
        "prediction_layers.0.conf_layer": _CLASSES,
        "prediction_layers.0.mask_layer": "head.coefficient_pred",
        "semantic_seg_conv": "head.semantic",
        "maskiou_net.maskiou_net.10": "head.mask_iou.pred",
        "maskiou_net.maskiou_net.{2*n}": "head.mask_iou.conv{n+1}",
    }
)
_RULES = (
    *_UNREAD,
    COUNTERS,
    *_resnet_rules(),
    *_darknet_rules("backbone.", _BOTTOM_UP),
    *_pyramid_rules("fpn", "fpn"),
    *_HEAD_RULES,
)
_EDGE_RULES = (
    Drop(
        "{part:flow_net|flow_net_pre_convs|spa}.{p*}",
        "layers for frames between a video's key frames",
    ),
    *_RULES,
    *_pyramid_rules("fpn_phase_1", "fpn_phase_2"),
    *_mobilenet_rules(),
)


class _BackgroundLast(KeyMap):
    """Rules after which the background is no longer the first class but the last.

    The class predictor has a block of channels per anchor. How long a block is, only the box
    predictor tells: the transform of a rule, which sees one tensor, cannot roll it.
    """

    def apply(self, state_dict: Mapping[str, Any]) -> Mapped:
        """Rename a state dict and move the background; see `KeyMap.apply`."""
        mapped = super().apply(state_dict)
        anchors = _anchors_per_cell(shapes_of(mapped.weights))
        for name in (f"{_CLASSES}.weight", f"{_CLASSES}.bias"):
            if name in mapped.weights:
                mapped.weights[name] = _first_to_last(mapped.weights[name], anchors)
        return mapped


def _first_to_last(classes: Tensor, anchors: int) -> Tensor:
    """Move the first channel of each anchor behind its others.

    Raises:
        ConversionError: if the channels cannot be shared out among the anchors.
    """
    if not anchors:
        raise ConversionError(
            "prediction_layers.0.bbox_layer.weight is missing or has not 4 channels per anchor: "
            "nobody knows how many anchors prediction_layers.0.conf_layer serves."
        )
    if not classes.dim() or len(classes) % anchors:
        raise ConversionError(
            f"prediction_layers.0.conf_layer is {list(classes.shape)}, whose channels cannot be "
            f"shared out among the {anchors} anchors of prediction_layers.0.bbox_layer."
        )
    return classes.unflatten(0, (anchors, -1)).roll(-1, dims=1).flatten(0, 1)


# --- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What the shapes of a model tell.

    Attributes:
        backbone: in words, such as ``"ResNet-50"``.
        deform_interval: every how many blocks of res3 to res5 are deformable, counted from the
            first; 0 for none, -1 for another choice of blocks.
        anchors: per cell.
        prototypes: prototype masks.
        width: channels of the shared convolution.
        mask_iou: it predicts the IoU of its masks.
    """

    backbone: str
    deform_interval: int = 0
    anchors: int = 3
    prototypes: int = 32
    width: int = 256
    mask_iou: bool = False

    @property
    def text(self) -> str:
        """In words."""
        interval = self.deform_interval
        deform = {0: "", -1: " with deformable convolution at no regular interval"}.get(
            interval, f" with deformable convolution at interval {interval}"
        )
        return (
            f"{'YOLACT++' if self.mask_iou else 'YOLACT'}, {self.backbone}{deform}, "
            f"{self.anchors} anchors per cell, {self.prototypes} prototypes"
        )


_R50, _R101 = ModelFacts("ResNet-50"), ModelFacts("ResNet-101")
_CONFIGS = {
    _R50: "YOLACT/yolact_R_50_550",
    _R101: "YOLACT/yolact_R_101_550",
    ModelFacts("DarkNet-53"): "YOLACT/yolact_D_53_550",
    replace(_R50, deform_interval=1, anchors=9, mask_iou=True): "YOLACT/yolact_plus_R_50_550",
    replace(_R101, deform_interval=3, anchors=9, mask_iou=True): "YOLACT/yolact_plus_R_101_550",
}
_EDGE_CONFIGS = {
    _R50: "YOLACT/yolact_edge_R_50_550",
    _R101: "YOLACT/yolact_edge_R_101_550",
    ModelFacts("MobileNetV2"): "YOLACT/yolact_edge_M_V2_550",
}
_PASCAL_CLASSES = 20
_PASCAL = {"YOLACT/yolact_R_50_550": "YOLACT/yolact_R_50_550_sbd"}
_PASCAL_NOTE = (
    "20 classes are taken for those of Pascal, whose model has anchors of other sizes: a file of "
    "another data set of 20 classes needs --config {0}."
)
_SIZES = {"YOLACT/yolact_R_101_550": ("YOLACT/yolact_R_101_400", "YOLACT/yolact_R_101_700")}
_SIZE_NOTE = (
    "the weights do not tell the size of the images: a file for 400 or 700 pixels (yolact_im400, "
    "yolact_im700) needs --config {0} or --config {1}."
)
_DARKNET_NOTE = (
    "The weights want INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [0.0, 0.0, 0.0] and MODEL.PIXEL_STD "
    "[255.0, 255.0, 255.0]."
)


def model_facts(shapes: Shapes) -> ModelFacts:
    """Read the facts of a model with our names."""
    return ModelFacts(
        _backbone(shapes),
        _deform_interval(shapes),
        _anchors_per_cell(shapes),
        _channels(shapes, "head.protonet.pred"),
        _channels(shapes, "head.shared_conv"),
        "head.mask_iou.pred.weight" in shapes,
    )


def _channels(shapes: Shapes, layer: str) -> int:
    """Return what a convolution puts out, 0 if there is none of that name."""
    return next(iter(shapes.get(f"{layer}.weight", ())), 0)


def _anchors_per_cell(shapes: Shapes) -> int:
    """Return the number of anchors, 0 if the box predictor does not tell."""
    anchors, rest = divmod(_channels(shapes, _BOXES), 4)
    return 0 if rest else anchors


def _backbone(shapes: Shapes) -> str:
    """Name the backbone, in words."""
    if f"{_BOTTOM_UP}stem.weight" in shapes:
        return "DarkNet-53"
    if f"{_BOTTOM_UP}stage1.0.depthwise.weight" in shapes:
        return "MobileNetV2"
    # Which convolutions are deformable is told apart: not all need be.
    return replace(resnet_facts(shapes), deform="").text


def _deform_interval(shapes: Shapes) -> int:
    """Find the interval of the deformable blocks, see `ModelFacts`."""
    offsets = ".conv2_offset.weight"
    found = {name.removesuffix(offsets) for name in shapes if name.endswith(offsets)}
    if not found:
        return 0
    numbers = {}
    for name in shapes:
        block = name.removesuffix(".conv2.weight")
        if block != name and block.startswith(_DEFORMABLE_STAGES):
            numbers[block] = int(block.rpartition(".")[2])
    for interval in range(1, max(numbers.values(), default=0) + 2):
        if found == {block for block, number in numbers.items() if number % interval == 0}:
            return interval
    return -1


def _describe(shapes: Shapes, configs: Mapping[ModelFacts, str]) -> Variant:
    facts = model_facts(shapes)
    config, notes = configs.get(facts, ""), ()
    channels = _channels(shapes, _CLASSES)
    num_classes = channels // facts.anchors - 1 if channels else None
    if config in _PASCAL and num_classes == _PASCAL_CLASSES:
        config, notes = _PASCAL[config], (_PASCAL_NOTE.format(config),)
    elif config in _SIZES:
        notes = (_SIZE_NOTE.format(*_SIZES[config]),)
    return Variant(facts.text, config, notes=notes, num_classes=num_classes)


def _describe_authors(shapes: Shapes) -> Variant:
    if "stem.weight" in shapes:
        return Variant(
            "DarkNet-53 for ImageNet",
            "YOLACT/yolact_D_53_550",
            notes=(_DARKNET_NOTE,),
            backbone_only=True,
        )
    return _describe(shapes, _CONFIGS)


def _describe_edge(shapes: Shapes) -> Variant:
    return _describe(shapes, _EDGE_CONFIGS)


def _is_detector(names: Collection[str]) -> bool:
    return any(name.startswith("prediction_layers.") for name in names)


def _claims_edge(names: Collection[str]) -> bool:
    """Look for the halves of the pyramid, and for the backbone that the authors do not have."""
    mobilenet = "backbone.layers.1.0.conv.0.0.weight" in names and _is_detector(names)
    return mobilenet or any(name.startswith("fpn_phase_") for name in names)


def _claims_authors(names: Collection[str]) -> bool:
    """Look for the predictors, or for the stem of the DarkNet that the authors start from."""
    return "_preconv.0.weight" in names or (_is_detector(names) and not _claims_edge(names))


FAMILIES = (
    Family(
        "yolact",
        "the YOLACT authors' repository, and its DarkNet-53 for ImageNet",
        _BackgroundLast((*_RULES, *_darknet_rules())),
        _claims_authors,
        _describe_authors,
    ),
    Family(
        "yolact-edge",
        "YolactEdge",
        _BackgroundLast(_EDGE_RULES),
        _claims_edge,
        _describe_edge,
    ),
)
