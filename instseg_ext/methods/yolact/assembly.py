"""Masks as combinations of prototypes, cut to their boxes.

Shape shorthand: k prototypes of h x w, n masks. Boxes are XYXY, normalised by the network input.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assemble_logits", "box_windows", "cropped_masks"]


def box_windows(boxes: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tell which rows and columns of a mask belong to its box, padded by one pixel.

    Column j belongs to a box from x1 to x2, in pixels, when ``x1 - 1 <= j < x2 + 1``: the index
    itself is compared, not the pixel's centre, and nothing is rounded. Rows likewise.

    Args:
        boxes: (n, 4) float; corners may be swapped or outside the image.
        size_hw: (h, w) of the masks.

    Returns:
        ``(rows, cols)``: (n, h) and (n, w) bool. A pixel is inside when both its row and its column
        are. No pixel is inside a box with NaN.
    """
    spans = [_span(boxes[:, axis::2].float(), size_hw[1 - axis]) for axis in (1, 0)]
    return spans[0], spans[1]


def _span(ends: Tensor, length: int) -> Tensor:
    """Return the (n, length) bool of one axis; ``ends`` is (n, 2), in any order."""
    ends = ends * length
    index = torch.arange(length, dtype=ends.dtype, device=ends.device)
    return (index >= ends.amin(1, keepdim=True) - 1) & (index < ends.amax(1, keepdim=True) + 1)


def assemble_logits(prototypes: Tensor, coefficients: Tensor) -> Tensor:
    """Combine prototypes linearly (Eq. 1 of arXiv:1904.02689, before the sigmoid).

    Args:
        prototypes: (k, h, w) float, of one image.
        coefficients: (n, k) float; n may be 0.

    Returns:
        (n, h, w) float32, also under autocast.
    """
    with torch.autocast(prototypes.device.type, enabled=False):
        logits = coefficients.float() @ prototypes.float().flatten(1)
    return logits.unflatten(1, prototypes.shape[1:])


def cropped_masks(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """Assemble masks and clear what lies outside their boxes.

    Args:
        prototypes: (k, h, w) float, of one image.
        coefficients: (n, k) float; n may be 0.
        boxes: (n, 4) float.

    Returns:
        (n, h, w) float32 probabilities, exactly 0 outside the windows of `box_windows`.
    """
    logits = assemble_logits(prototypes, coefficients)
    rows, cols = box_windows(boxes, tuple(logits.shape[1:]))
    # Below all numbers instead of times zero after the sigmoid: all in one buffer, with or without
    # gradients, and infinite logits outside the box do no harm.
    outside = ~(rows[:, :, None] & cols[:, None, :])
    return logits.masked_fill_(outside, -torch.inf).sigmoid_()
