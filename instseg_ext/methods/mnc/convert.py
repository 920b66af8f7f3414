"""The MNC authors' Caffe model, as HDF5 or as a caffemodel.

Layers are named ``layer/0`` (weights) and ``layer/1`` (bias); those of the second pass share the
parameters of the first. Three things are in another order than here: the background is the first
class, the anchors of one aspect ratio stand together, and objectness has a logit for each of its
two classes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from instseg_ext.checkpoint import (
    ConversionError,
    Drop,
    Family,
    KeyMap,
    Shapes,
    Variant,
    anchors_by_size,
    caffe_layer,
    foreground_minus_background,
)

__all__ = ["FAMILIES"]

_RPN = "proposal_generator.rpn_head"
# Standard deviations of the authors' box targets. Their snapshots hold the box layer multiplied by
# them; without, MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS (10, 10, 5, 5) decode it and training goes on.
_STDS = (0.1, 0.1, 0.2, 0.2)


def _background_last(predictor: Tensor) -> Tensor:
    """Move the first class behind the others; (K + 1, ...) weights or bias."""
    return predictor.roll(-1, dims=0)


def _boxes(predictor: Tensor) -> Tensor:
    """Move the background's box behind the others and take out the scale of the targets.

    It is kept: a region that stage 3 takes for background goes on to stage 4 with that box.

    Args:
        predictor: (4 (K + 1), ...) weights or bias, four rows per class.

    Raises:
        ConversionError: if there are not four rows per class.
    """
    if not predictor.dim() or len(predictor) % 4:
        raise ConversionError(
            f"bbox_pred is {list(predictor.shape)}: it must have 4 rows per class."
        )
    boxes = predictor.unflatten(0, (-1, 4)).roll(-1, dims=0)
    stds = torch.tensor(_STDS, device=boxes.device).view(4, *[1] * (predictor.dim() - 1))
    return (boxes / stds).flatten(0, 1)


_RULES = (
    Drop("{layer*}_ext/{n}", "the second pass, which shares the parameters of the first"),
    *caffe_layer("conv{a}_{b}", "backbone.conv{a}_{b}"),
    *caffe_layer("rpn_conv_3x3", f"{_RPN}.conv"),
    *caffe_layer("rpn_cls_score", f"{_RPN}.objectness_logits", foreground_minus_background),
    *caffe_layer("rpn_bbox_pred", f"{_RPN}.anchor_deltas", anchors_by_size),
    *caffe_layer("fc6_maskest", "roi_heads.mask_head.fc1"),
    *caffe_layer("mask_pred", "roi_heads.mask_head.predictor"),
    *caffe_layer("fc6", "roi_heads.box_tower.fc1"),
    *caffe_layer("fc7", "roi_heads.box_tower.fc2"),
    *caffe_layer("fc6_mask", "roi_heads.mask_tower.fc1"),
    *caffe_layer("fc7_mask", "roi_heads.mask_tower.fc2"),
    *caffe_layer("cls_score", "roi_heads.cls_score", _background_last),
    *caffe_layer("seg_cls_score", "roi_heads.seg_cls_score", _background_last),
    *caffe_layer("bbox_pred", "roi_heads.bbox_pred", _boxes),
)
_NOTES = (
    "bbox_pred was divided by the standard deviations of its targets, which decoding multiplies "
    "it by.",
    "the weights want MODEL.MNC.LEGACY_BOXES True, the authors' boxes, which a config given with "
    "--config does not get by itself",
    "the weights cannot tell how regions were warped in training: where masks matter to the last "
    "point, evaluate MODEL.MNC.EXT_WARP direct14, or MODEL.MNC.WARP_MODE maxsample, as well",
)


def _describe(shapes: Shapes) -> Variant:
    classifier = shapes.get("roi_heads.cls_score.bias")
    return Variant(
        "MNC, VGG-16",
        "MNC/mnc_VGG_16_sbd",
        ("MODEL.MNC.LEGACY_BOXES", True),
        _NOTES,
        # The last class is the background.
        classifier[0] - 1 if classifier else None,
    )


def _claims(names: Collection[str]) -> bool:
    return "fc6_maskest/0" in names


FAMILIES = (
    Family(
        "mnc-caffe",
        "the MNC authors' Caffe code",
        KeyMap(_RULES),
        _claims,
        _describe,
    ),
)
