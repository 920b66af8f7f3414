"""Which anchors are responsible for which objects.

Shape shorthand: P anchors, G ground-truth objects, C crowds, K foreground classes. All boxes are
normalised by the network input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from instseg_ext.methods.yolact.box_coding import to_corners

__all__ = ["AnchorTargets", "MatchOptions", "match_anchors"]

_NEUTRAL = -1


@dataclass(frozen=True)
class MatchOptions:
    """Thresholds of the assignment.

    Attributes:
        pos_iou: an anchor is positive from this IoU with an object on.
        neg_iou: it is background below this IoU with every object, and neutral in between.
        crowd_ioa: it is neutral instead of background when a crowd covers more than this share of
            its area.
    """

    pos_iou: float = 0.5
    neg_iou: float = 0.4
    crowd_ioa: float = 0.7


class AnchorTargets(NamedTuple):
    """What the anchors of one image should predict.

    Attributes:
        labels: (P,) int64: class in [0, K), K for background, -1 for neutral anchors, which join
            no loss.
        matched: (P,) int64: the object whose class, box and mask a positive anchor has; elsewhere
            the object of largest IoU, 0 if there is none.
    """

    labels: Tensor
    matched: Tensor


@torch.no_grad()
def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    crowd_boxes: Tensor,
    *,
    num_classes: int,
    options: MatchOptions,
) -> AnchorTargets:
    """Assign objects to the anchors of one image.

    An anchor belongs to the object of largest IoU, of equal ones to the first. Beyond that every
    object owns the anchor it overlaps most, however little, whatever else that anchor overlaps
    (`_owned_anchors` tells what happens when two want the same one). A positive anchor stays so
    inside a crowd.

    Args:
        anchors: (P, 4) float32, centre and size.
        gt_boxes: (G, 4) float32 XYXY, without crowds; G may be 0.
        gt_classes: (G,) int64 in [0, K).
        crowd_boxes: (C, 4) float32 XYXY; C may be 0.
        num_classes: K.
        options: thresholds.

    Returns:
        See `AnchorTargets`.

    Raises:
        ValueError: if there are more objects than anchors.

    Note:
        This is the rule of the authors' code since August 2019. Their first published weights were
        trained with an earlier one.
    """
    corners = to_corners(anchors)
    areas = _areas(corners)
    if len(gt_boxes):
        targets = _match_objects(corners, areas, gt_boxes, gt_classes, num_classes, options)
    else:
        matched = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        targets = AnchorTargets(torch.full_like(matched, num_classes), matched)
    if len(crowd_boxes):
        covered = (_intersections(crowd_boxes, corners) / areas).amax(dim=0) > options.crowd_ioa
        background = targets.labels == num_classes
        targets.labels.masked_fill_(covered & background, _NEUTRAL)
    return targets


def _match_objects(
    corners: Tensor,
    areas: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    num_classes: int,
    options: MatchOptions,
) -> AnchorTargets:
    """Assign at least one object; ``corners`` and ``areas`` are those of the anchors."""
    if len(gt_boxes) > len(corners):
        raise ValueError(
            f"An image has {len(gt_boxes)} objects but the network input has room for only "
            f"{len(corners)} anchors, and each object needs one of its own."
        )
    overlaps = _intersections(gt_boxes, corners)
    overlaps /= (_areas(gt_boxes)[:, None] + areas).sub_(overlaps)
    best, matched = overlaps.max(dim=0)

    owned = _owned_anchors(overlaps)
    best[owned] = torch.inf
    matched[owned] = torch.arange(len(gt_boxes), device=matched.device)

    labels = gt_classes[matched]
    labels.masked_fill_(best < options.pos_iou, _NEUTRAL)
    labels.masked_fill_(best < options.neg_iou, num_classes)
    return AnchorTargets(labels, matched)


def _areas(boxes: Tensor) -> Tensor:
    """Return the (n,) areas of (n, 4) XYXY boxes."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _intersections(boxes: Tensor, corners: Tensor) -> Tensor:
    """Return the (G, P) areas common to boxes and anchors, both XYXY.

    One coordinate at a time: a last dimension of two would hinder vectorised loops.
    """
    left, top, right, bottom = boxes.T[:, :, None].unbind()
    anchor_left, anchor_top, anchor_right, anchor_bottom = corners.T.contiguous().unbind()
    width = torch.minimum(right, anchor_right).sub_(torch.maximum(left, anchor_left)).clamp_(min=0)
    height = torch.minimum(bottom, anchor_bottom).sub_(torch.maximum(top, anchor_top))
    return width.mul_(height.clamp_(min=0))


def _owned_anchors(overlaps: Tensor) -> Tensor:
    """Give every object one anchor of its own.

    The rule: of all pairs of a free object and a free anchor take the one of largest IoU, of equal
    ones the first object and then the first anchor, until no object is free. Its outcome does not
    depend on the order in which objects ask: let each ask for its best anchor, let an anchor keep
    the best of those that ask, and let the others ask for their next best. When all best anchors
    differ, as they mostly do, nothing is left to do after the first look.

    Args:
        overlaps: (G, P) IoU with G <= P; refused pairs are set to minus infinity.

    Returns:
        (G,) int64, all different.
    """
    value, anchor = overlaps.max(dim=1)
    index = torch.arange(len(overlaps), device=overlaps.device)
    while True:
        same = anchor[:, None] == anchor
        first = (value > value[:, None]) | ((value == value[:, None]) & (index < index[:, None]))
        refused = (same & first).any(dim=1).nonzero().squeeze(1)
        if not len(refused):
            return anchor
        overlaps[refused, anchor[refused]] = -torch.inf
        value[refused], anchor[refused] = overlaps[refused].max(dim=1)
