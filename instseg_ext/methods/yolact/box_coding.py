"""Boxes as the prediction head sees them: relative to an anchor.

Boxes are (..., 4) XYXY, anchors (..., 4) centre x, centre y, width, height, both normalised by the
network input; leading dimensions broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode", "encode", "to_corners"]

# Divisors that bring the four numbers to comparable spreads ("variances" in SSD's terms).
_CENTER_SPREAD = 0.1
_SIZE_SPREAD = 0.2

# Far below a pixel of any input. Keeps the logarithm of an empty box finite.
_SMALLEST = 1e-6


def to_corners(anchors: Tensor) -> Tensor:
    """Turn centres and sizes into XYXY.

    Args:
        anchors: (..., 4) centre and size.

    Returns:
        (..., 4) XYXY.
    """
    centers, sizes = anchors[..., :2], anchors[..., 2:]
    return torch.cat([centers - sizes / 2, centers + sizes / 2], dim=-1)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Express boxes relative to anchors (Eq. 2 of arXiv:1512.02325, scaled).

    Args:
        boxes: (..., 4) float32. Sides of less than a millionth of the input count as that, so that
            the result is finite.
        anchors: (..., 4) float32.

    Returns:
        (..., 4) float32: offsets of the centre in tenths of the anchor's size, and logarithms of
        the ratios of the sizes times five.
    """
    centers, sizes = anchors[..., :2], anchors[..., 2:]
    offsets = ((boxes[..., :2] + boxes[..., 2:]) / 2 - centers) / (_CENTER_SPREAD * sizes)
    ratios = (boxes[..., 2:] - boxes[..., :2]).clamp(min=_SMALLEST) / sizes
    return torch.cat([offsets, ratios.log() / _SIZE_SPREAD], dim=-1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Invert `encode`.

    Args:
        deltas: (..., 4) float of any precision; computed in that of the anchors.
        anchors: (..., 4) float32.

    Returns:
        (..., 4) float32 XYXY, not clipped; infinite where an exponential overflows.
    """
    deltas = deltas.to(anchors.dtype)
    centers = anchors[..., :2] + deltas[..., :2] * _CENTER_SPREAD * anchors[..., 2:]
    sizes = anchors[..., 2:] * (deltas[..., 2:] * _SIZE_SPREAD).exp()
    low = centers - sizes / 2
    return torch.cat([low, low + sizes], dim=-1)
