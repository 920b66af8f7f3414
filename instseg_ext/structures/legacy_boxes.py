"""Boxes that end in their last pixel, as the codes before detectron2 have them.

There, (x1, y1, x2, y2) is x2 - x1 + 1 pixels wide. With the last pixel added it is the continuous
box of detectron2, and anchors, decoding and overlaps agree. Where the habit cannot be undone like
that, the size of a pixel matters: proposals have pixels of the network input, detections those of
the original image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Frame", "add_last_pixel", "clip_to_pixels"]


@dataclass(frozen=True)
class Frame:
    """How the network input of an image relates to the original.

    Attributes:
        original_size: (H0, W0).
        pixel: side of an original pixel in pixels of the network input.
    """

    original_size: tuple[int, int]
    pixel: float

    @classmethod
    def of(cls, image_size: Sequence[int], original_size: Sequence[int], max_size: int) -> Frame:
        """Return the frame of an image whose sides were scaled by one factor, then rounded.

        Only one side still tells that factor, which the authors multiply boxes with: the longer one
        where it reached the limit, else the shorter one.

        Args:
            image_size: (H, W) of the network input without padding.
            original_size: (H0, W0).
            max_size: the limit of the longer side (``INPUT.MAX_SIZE_TEST``).
        """
        height, width = (int(side) for side in original_size)
        exact = max if max(image_size) == max_size else min
        return cls((height, width), exact(image_size) / exact(height, width))


def add_last_pixel(boxes: Tensor, pixel: float | Tensor) -> Tensor:
    """Return (N, 4) boxes that end ``pixel``, a number or (N,), further; negative: earlier."""
    step = torch.zeros_like(boxes)
    step[:, 2:] = pixel if isinstance(pixel, float | int) else pixel[:, None]
    return boxes + step


def clip_to_pixels(boxes: Tensor, size: tuple[float, float], pixel: float) -> Tensor:
    """Return boxes of which at least one pixel is left wherever they were.

    The first and the last pixel of a box are clipped, each to the image. A box beside the image
    becomes a strip along its border, where detectron2 drops it.

    Args:
        boxes: (..., 4) XYXY, continuous.
        size: (height, width) of the image, in the units of the boxes.
        pixel: side of a pixel, in the same units.
    """
    height, width = size
    low = boxes.new_tensor([0.0, 0.0, pixel, pixel])
    high = boxes.new_tensor([width - pixel, height - pixel, width, height])
    return torch.minimum(torch.maximum(boxes, low), high)
