"""Draw the soft masks of boxes into an image, or into a window of it.

A drawing is a matrix product ``rows @ cols`` of the masks along the rows of the window, and of what
each cell counts in each of its columns. It is zero outside the box.

Shapes: n masks of m x m cells, H x W image, h x w window of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["column_factors", "hat_weights", "pixel_boxes", "render_masks", "row_factors"]


def pixel_boxes(boxes: Tensor) -> Tensor:
    """Round the first and the last pixel of boxes, halves to even.

    Args:
        boxes: (n, 4) float XYXY, continuous.

    Returns:
        (n, 4) of whole numbers, continuous: the far sides are one past the last pixel.
    """
    return torch.cat([boxes[:, :2].round(), (boxes[:, 2:] - 1).round() + 1], dim=1)


def hat_weights(points: Tensor, length: int) -> Tensor:
    """Return what each of ``length`` samples at 0, 1, ... counts in a linear interpolation.

    Args:
        points: (n, P) float.
        length: number of samples. Beyond them there are zeros.

    Returns:
        (n, length, P).
    """
    samples = torch.arange(length, device=points.device, dtype=points.dtype)[:, None]
    away = (points[:, None] - samples).abs_()
    return torch.sub(1, away, out=away).clamp_(min=0)


def _axis(
    low: Tensor, high: Tensor, size: int, start: int, end: int, corner_aligned: bool
) -> tuple[Tensor, ...]:
    """Return what each cell counts in each pixel along one axis, zero outside the box.

    Args:
        low: (n,) float, where the boxes begin; pixel p reaches from p to p + 1.
        high: (n,) float, where they end.
        size: m cells.
        start: first pixel.
        end: one past the last pixel.
        corner_aligned: see ``render_masks``.

    Returns:
        (n, m, end - start) each. Centred: the linear weights, alone. Corner-aligned: these in
        pixels before the last cell, the nearest cell, and that in pixels of the last cell.
    """
    shift = 0.0 if corner_aligned else 0.5
    pixels = torch.arange(start, end, device=low.device, dtype=low.dtype)
    low, high = low[:, None], high[:, None]
    ratio = size / (high - low).clamp(min=1e-6)
    points = ((pixels - low + shift) * ratio - shift).clamp_(0, size - 1)
    # Far from all cells, so that none counts.
    points.masked_fill_((pixels < low) | (pixels > high - 1), -2.0)
    linear = hat_weights(points, size)
    if not corner_aligned:
        return (linear,)
    nearest = hat_weights(points.floor(), size)
    last = (points >= size - 1)[:, None]
    return linear * ~last, nearest, nearest * last


def row_factors(
    masks: Tensor, boxes: Tensor, start: int, end: int, *, corner_aligned: bool
) -> Tensor:
    """Return masks along rows of the image, (n, end - start, k); see ``column_factors``.

    Args:
        masks: (n, m, m) float32.
        boxes: (n, 4) float32 XYXY; whole pixels unless ``corner_aligned``.
        start: first row.
        end: one past the last row.
        corner_aligned: see ``render_masks``.
    """
    terms = _axis(boxes[:, 1], boxes[:, 3], masks.shape[1], start, end, corner_aligned)
    if not corner_aligned:
        return terms[0].mT @ masks
    linear, nearest, last = terms
    return torch.cat([term.mT @ masks for term in (linear, last, nearest - last)], dim=2)


def column_factors(
    boxes: Tensor, size: int, start: int, end: int, *, corner_aligned: bool
) -> Tensor:
    """Return what the k numbers of each row count in columns of the image.

    ``row_factors(...) @ column_factors(...)`` is the drawing. k is m, or 3 m if corners are
    aligned: pixels before the last cell along both axes, those of the last row of cells, and those
    of the last column are a product each.

    Args:
        boxes: as for ``row_factors``.
        size: m.
        start: first column.
        end: one past the last column.
        corner_aligned: see ``render_masks``.

    Returns:
        (n, k, end - start) float32.
    """
    terms = _axis(boxes[:, 0], boxes[:, 2], size, start, end, corner_aligned)
    return torch.cat(terms, dim=1) if corner_aligned else terms[0]


def render_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    *,
    corner_aligned: bool,
    window: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Draw soft masks in their boxes.

    Two rules are in use. FCIS rounds the boxes and puts the value of a cell in its middle: pixel x
    shows the mask at (x - x1 + 1/2) * m / w - 1/2, the outermost cells going on to the edge, as
    ``cv2.resize`` does. MNC keeps the boxes as they are and puts the value in the corner of the
    cell: pixel x shows the mask at (x - x1) * m / w. Where that is beyond the last value, along
    either axis, the nearest value before it is taken along both.

    Args:
        masks: (n, m, m) in [0, 1], any float dtype.
        boxes: (n, 4) XYXY, image pixels, continuous; may reach beyond the image.
        image_size: (H, W).
        corner_aligned: MNC's rule, else FCIS's.
        window: (x1, y1, x2, y2) in whole pixels, the part to draw; None for the whole image.

    Returns:
        (n, h, w) float32 on the device of ``masks``; zero for pixels that are not wholly inside the
        box. All at once: large images are for the caller to draw in parts.
    """
    left, top, right, bottom = window or (0, 0, int(image_size[1]), int(image_size[0]))
    with torch.autocast(masks.device.type, enabled=False):
        masks, boxes = masks.float(), boxes.float()
        if not corner_aligned:
            boxes = pixel_boxes(boxes)
        rows = row_factors(masks, boxes, top, bottom, corner_aligned=corner_aligned)
        size = masks.shape[-1]
        return rows @ column_factors(boxes, size, left, right, corner_aligned=corner_aligned)
