"""Crops of full-image bit masks, resized as OpenCV does, without an image-sized mask per crop.

Shapes: M objects, H x W image, R boxes, S side of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["crop_masks"]


def _taps(start: Tensor, extent: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the two pixels that each sample of one axis lies between.

    Positions are computed in the frame of the box, where float32 has digits to spare.

    Args:
        start: (R,) int64, first pixel of the box.
        extent: (R,) int64, its pixels, at least 1.
        size: S.
        length: pixels of the image.

    Returns:
        (2, R, S) int64 pixels of the image and (2, R, S) float32 weights, 0 outside the image.
    """
    centre = torch.arange(size, dtype=torch.float32, device=start.device) + 0.5
    last = (extent - 1).to(torch.float32)[:, None]
    position = torch.minimum((centre * (extent[:, None] / size) - 0.5).clamp(min=0), last)
    low = position.floor()
    share = position - low
    pixel = start[:, None] + low.long()
    pixels = torch.stack([pixel, pixel + 1])
    inside = (pixels >= 0) & (pixels < length)
    return pixels.clamp(0, max(length - 1, 0)), torch.stack([1 - share, share]) * inside


@torch.no_grad()
def crop_masks(
    masks: Tensor, index: Tensor, boxes: Tensor, size: int, threshold: float = 0.4
) -> Tensor:
    """Crop masks by boxes of whole pixels and bring them to one size.

    The crop is interpolated bilinearly between centres of pixels and continued with its outermost
    pixels, as ``cv2.resize`` does with a copy of it. Only four pixels for each value are read.

    Args:
        masks: (M, H, W) bool.
        index: (R,) int64, the mask of each box.
        boxes: (R, 4) XYXY of whole pixels, x2 and y2 exclusive; at least one pixel wide and high.
            Outside the image the masks are zero.
        size: S.
        threshold: inclusive lower bound of the interpolated mask.

    Returns:
        (R, S, S) bool.
    """
    height, width = masks.shape[-2:]
    if not len(boxes) or not masks.numel():
        return torch.zeros((len(boxes), size, size), dtype=torch.bool, device=boxes.device)
    x1, y1, x2, y2 = boxes.long().unbind(dim=1)
    columns, weight_x = _taps(x1, x2 - x1, size, width)
    rows, weight_y = _taps(y1, y2 - y1, size, height)
    pixels, lines = masks.reshape(-1), (index[:, None] * height + rows) * width
    value = torch.zeros((len(boxes), size, size), dtype=torch.float32, device=boxes.device)
    for line, in_row in zip(lines, weight_y, strict=True):
        for column, in_column in zip(columns, weight_x, strict=True):
            place = line[:, :, None] + column[:, None, :]
            # Many times faster than indexing.
            pixel = pixels.index_select(0, place.flatten()).view_as(value)
            value += in_row[:, :, None] * in_column[:, None, :] * pixel
    return value >= threshold
