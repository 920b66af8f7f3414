"""Greedy suppression of boxes within their class."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import nms

__all__ = ["class_nms"]

# Boxes that are looked at first, as a multiple of the detections wanted.
_FIRST_LOOK = 2


def class_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float, max_detections: int
) -> Tensor:
    """Return the best boxes that no better box of their class overlaps too much.

    Whether a box survives depends on better boxes alone. So they are looked at from the best one
    down, until enough have survived.

    Args:
        boxes: (n, 4) XYXY, finite.
        scores: (n,) float.
        classes: (n,) integer, not negative.
        threshold: a box goes when its IoU with a better one is higher.
        max_detections: most boxes to return.

    Returns:
        (m,) int64 rows, by falling score.
    """
    order = scores.sort(descending=True, stable=True).indices
    if not len(order):
        return order
    look = min(len(order), _FIRST_LOOK * max_detections)
    while True:
        rows = order[:look]
        # Each class is moved to a place of its own. Float32, in which torchvision does that, would
        # round the boxes of the last classes to hundredths of a pixel.
        apart = boxes[rows].double()
        extent = apart.amax() - apart.amin() + 1
        apart += (classes[rows] * extent)[:, None]
        kept = nms(apart, scores[rows].double(), threshold)[:max_detections]
        if len(kept) == max_detections or look == len(order):
            return rows[kept]
        look = min(len(order), 4 * look)
