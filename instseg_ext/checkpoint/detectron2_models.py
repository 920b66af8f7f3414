"""Which R-CNN of the model zoo, or which model of PointRend's project, a detectron2 file holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from instseg_ext.checkpoint.family import Shapes, Variant
from instseg_ext.checkpoint.resnet_rules import ResNetFacts, resnet_facts

__all__ = ["describe_model"]

_SCHEDULES = "detectron2's schedules cannot be told apart: all of them are this model."
# Of files that look like any other: detectron2's comparisons with Detectron.
_OLD_REGIONS = (
    "A file of detectron2's Detectron1-Comparisons looks the same and needs the keys "
    "{keys}; with others it runs and loses accuracy."
)
# What the larger models change in the config of the smallest.
_DEEPER: dict[ResNetFacts, tuple[Any, ...]] = {
    ResNetFacts(50): (),
    ResNetFacts(101): ("MODEL.RESNETS.DEPTH", 101),
    ResNetFacts(101, 32, 8): (
        *("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NUM_GROUPS", 32),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.STRIDE_IN_1X1", False),
        *("MODEL.PIXEL_STD", [57.375, 57.12, 58.395]),
    ),
}
# Configs of other data than COCO, by what the model predicts and its number of classes.
_BY_CLASSES = {
    ("masks", 8): ("MaskRCNN/mask_rcnn_R_50_FPN_cityscapes", "Cityscapes"),
    ("masks", 1203): ("MaskRCNN/mask_rcnn_R_50_FPN_1x_lvis_v1", "LVIS version 1"),
    ("masks", 1230): ("MaskRCNN/mask_rcnn_R_50_FPN_1x_lvis_v0.5", "LVIS version 0.5"),
    ("PointRend masks", 8): ("PointRend/pointrend_rcnn_R_50_FPN_1x_cityscapes", "Cityscapes"),
}
_SEMANTIC = "PointRend/pointrend_semantic_R_101_FPN_1x_cityscapes"
_MASK_HEAD = "roi_heads.mask_head."
# What a model predicts beside boxes, by a name that only such models have, to the config of its
# smallest model with FPN.
_HEADS = {
    "PointRend masks": (
        f"{_MASK_HEAD}coarse_head.prediction.weight",
        "PointRend/pointrend_rcnn_R_50_FPN_1x_coco",
    ),
    "implicit PointRend masks": (
        f"{_MASK_HEAD}parameter_head.prediction.weight",
        "PointRend/implicit_pointrend_R_50_FPN_1x_coco",
    ),
    "masks": (f"{_MASK_HEAD}predictor.weight", "MaskRCNN/mask_rcnn_R_50_FPN_1x"),
    "keypoints": (
        "roi_heads.keypoint_head.score_lowres.weight",
        "MaskRCNN/keypoint_rcnn_R_50_FPN_1x",
    ),
}
_BOXES = ("boxes alone", "MaskRCNN/faster_rcnn_R_50_FPN_1x")
# What detectron2 compared with Detectron, to the configs' nodes beside that of boxes.
_OLD_HEADS = {
    _BOXES[0]: (),
    "masks": ("ROI_MASK_HEAD",),
    "keypoints": ("ROI_KEYPOINT_HEAD",),
}
# Necks without a pyramid have a config for masks; that for boxes is the same without them.
_C4, _DC5 = ("MaskRCNN/mask_rcnn_R_50_C4_1x", "MaskRCNN/mask_rcnn_R_50_DC5_1x")


@dataclass(frozen=True)
class _Neck:
    """What carries the regions: ``FPN``, ``C4`` or ``DC5``, and the ResNet below."""

    name: str
    facts: ResNetFacts


def describe_model(shapes: Shapes) -> Variant:
    """Tell which model a file of detectron2 holds.

    Args:
        shapes: by name, old names of PointRend replaced.
    """
    if any(name.startswith("sem_seg_head.") for name in shapes):
        return _describe_semantic(shapes)
    neck, (head, config) = _neck(shapes), _head(shapes)
    classifier = shapes.get("roi_heads.box_predictor.cls_score.bias")
    # The last class is the background.
    num_classes = classifier[0] - 1 if classifier else None
    notes: tuple[str, ...] = (_SCHEDULES,)
    opts = _DEEPER.get(neck.facts)
    if neck.name == "FPN":
        config, data = _BY_CLASSES.get((head, num_classes), (config, ""))
        if data:
            notes += (
                f"{num_classes} classes are taken for those of {data}: a file of other data needs "
                "--config.",
            )
        elif neck.facts == ResNetFacts(50) and head in _OLD_HEADS:
            notes += (_OLD_REGIONS.format(keys=_old_keys(head)),)
        fits = "roi_heads.box_head.fc2.weight" in shapes
    else:
        config = _C4 if neck.name == "C4" else _DC5
        fits = head in ("masks", _BOXES[0])
        fits &= neck.name == "C4" or "roi_heads.box_head.fc2.weight" in shapes
    # Files of Fast R-CNN have no RPN: regions come from elsewhere, which no config provides for.
    fits &= "proposal_generator.rpn_head.objectness_logits.weight" in shapes
    text = f"R-CNN, {neck.facts.text}, {neck.name or 'an unknown neck'}, {head}"
    if not fits or not neck.name or opts is None or num_classes is None:
        return Variant(text, num_classes=num_classes)
    opts += _own_keys(shapes, neck, head) + _agnostic_keys(shapes, head, num_classes)
    return Variant(text, config, opts, notes, num_classes)


def _neck(shapes: Shapes) -> _Neck:
    if "backbone.fpn_output2.weight" in shapes:
        return _Neck("FPN", resnet_facts(shapes))
    if "roi_heads.res5.0.conv1.weight" in shapes:
        moved = {
            f"backbone.{name.removeprefix('roi_heads.')}": shape
            for name, shape in shapes.items()
            if name.startswith("roi_heads.res5.")
        }
        return _Neck("C4", resnet_facts({**shapes, **moved}, "backbone."))
    name = "DC5" if "backbone.res5.0.conv1.weight" in shapes else ""
    return _Neck(name, resnet_facts(shapes, "backbone."))


def _head(shapes: Shapes) -> tuple[str, str]:
    """Return what the model predicts, and the config of its smallest model with FPN."""
    for head, (name, config) in _HEADS.items():
        if name in shapes:
            return head, config
    return _BOXES


def _own_keys(shapes: Shapes, neck: _Neck, head: str) -> tuple[Any, ...]:
    """Return the keys that differ from the config and that shapes tell, but for the backbone's."""
    if neck.name != "FPN" and head == _BOXES[0]:
        return ("MODEL.MASK_ON", False)
    if head == "keypoints":
        # of a transposed convolution: input channels come first
        points = shapes[_HEADS[head][0]][1]
        return ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", points) if points != 17 else ()
    return ()


def _agnostic_keys(shapes: Shapes, head: str, num_classes: int) -> tuple[Any, ...]:
    """Return the keys of predictors that have one box, or one mask, for all classes."""
    opts: tuple[Any, ...] = ()
    if num_classes == 1:
        return opts
    if shapes.get("roi_heads.box_predictor.bbox_pred.bias") == (4,):
        opts += ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    if head == "masks" and shapes[_HEADS[head][0]][0] == 1:
        opts += ("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True)
    return opts


def _old_keys(head: str) -> str:
    """Return the keys, as they are typed, for the regions of Detectron's models."""
    return " ".join(
        f"MODEL.{node}.POOLER_TYPE ROIAlign MODEL.{node}.POOLER_SAMPLING_RATIO 2"
        for node in ("ROI_BOX_HEAD", *_OLD_HEADS[head])
    )


def _describe_semantic(shapes: Shapes) -> Variant:
    facts = resnet_facts(shapes)
    predictor = shapes.get("sem_seg_head.point_head.predictor.bias")
    text = f"semantic PointRend, {facts.text}" if predictor else f"semantic FPN, {facts.text}"
    num_classes = predictor[0] if predictor else None
    if not predictor or facts not in (ResNetFacts(50), ResNetFacts(101)):
        return Variant(text, num_classes=num_classes)
    opts = () if facts.depth == 101 else ("MODEL.RESNETS.DEPTH", facts.depth)
    return Variant(text, _SEMANTIC, opts, num_classes=num_classes)
