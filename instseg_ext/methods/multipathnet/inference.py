"""From probabilities and boxes to detections that know their proposal.

Shapes: R regions, K classes, D detections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

__all__ = ["DetectionOptions", "best_boxes", "detect", "vote_boxes"]


@dataclass(frozen=True)
class DetectionOptions:
    """What becomes a detection.

    Attributes:
        min_score: below or at it a box is left out.
        nms_iou: overlap above which the lower of two boxes of a class is dropped.
        limit: detections of an image, -1 for all.
        vote_iou: overlap above which a class's box takes part in a detected one; None: boxes stay.
        vote_power: exponent of the scores by which they are weighted.
    """

    min_score: float = 0.0
    nms_iou: float = 0.3
    limit: int = 100
    vote_iou: float | None = None
    vote_power: float = 1.0


@torch.no_grad()
def detect(
    boxes: Tensor,
    probs: Tensor,
    proposal_index: Tensor,
    image_size: tuple[int, int],
    options: DetectionOptions,
) -> Instances:
    """Suppress and rank the boxes of an image.

    Args:
        boxes: (R, 4 K), or (R, 4) for all classes, network input.
        probs: (R, K + 1), background last.
        proposal_index: (R,) int64, the proposal that each row comes from.
        image_size: of the network input; boxes are clipped to it.
        options: see there.

    Returns:
        ``pred_boxes``, ``scores``, ``pred_classes`` and ``proposal_index``, by falling score. Rows
        with a value that is not finite give none.
    """
    finite = boxes.isfinite().all(dim=1) & probs.isfinite().all(dim=1)
    boxes, probs, proposal_index = boxes[finite], probs[finite, :-1], proposal_index[finite]
    clipped = Boxes(boxes.reshape(-1, 4))
    clipped.clip(image_size)
    boxes = clipped.tensor.view(len(probs), boxes.shape[1] // 4, 4)
    rows, classes = (probs > options.min_score).nonzero(as_tuple=True)
    scores = probs[rows, classes]
    boxes = boxes[rows, classes if boxes.shape[1] > 1 else torch.zeros_like(classes)]
    keep = batched_nms(boxes, scores, classes, options.nms_iou)
    if options.limit >= 0:
        keep = keep[: options.limit]
    found = boxes[keep]
    if options.vote_iou is not None:
        found = vote_boxes(found, classes[keep], boxes, scores, classes, options)
    return Instances(
        image_size,
        pred_boxes=Boxes(found),
        scores=scores[keep],
        pred_classes=classes[keep],
        proposal_index=proposal_index[rows[keep]],
    )


def vote_boxes(
    found: Tensor,
    found_classes: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    options: DetectionOptions,
) -> Tensor:
    """Average the boxes of a class around each detection; scores are left alone.

    Args:
        found: (D, 4) detections.
        found_classes: (D,).
        boxes: (R, 4) all boxes.
        scores: (R,).
        classes: (R,).
        options: the overlap and the exponent.

    Returns:
        (D, 4).
    """
    near = pairwise_iou(Boxes(found), Boxes(boxes)) > options.vote_iou
    near &= found_classes[:, None] == classes
    weights = scores.pow(options.vote_power) * near
    total = weights.sum(dim=1, keepdim=True)
    # a box without extent overlaps nothing, not even itself
    return torch.where(total > 0, weights @ boxes / total.clamp(min=1e-12), found)


def best_boxes(boxes: Tensor, probs: Tensor) -> Tensor:
    """Return (R, 4) the box of the best foreground class of each region, for the next round.

    Args:
        boxes: (R, 4 K) or (R, 4).
        probs: (R, K + 1), background last.
    """
    boxes = boxes.view(len(boxes), boxes.shape[1] // 4, 4)
    if boxes.shape[1] == 1:
        return boxes[:, 0]
    best = probs[:, :-1].argmax(dim=1)
    return boxes[torch.arange(len(boxes), device=boxes.device), best]
