"""Draw the soft masks of boxes into an image, or into a window of it.

A drawing is a product of one matrix per axis: ``rows @ mask @ cols``. Outside its box it is zero,
and the outermost cells go on to the edge of the box.

Shapes: n masks of m x m cells, H x W image, h x w window of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["axis_weights", "hat_weights", "pixel_boxes", "render_masks"]


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
        points: (..., P) float.
        length: number of samples. Beyond them there are zeros.

    Returns:
        (..., P, length).
    """
    samples = torch.arange(length, device=points.device, dtype=points.dtype)
    return (1 - (points[..., None] - samples).abs()).clamp_(min=0)


def axis_weights(
    low: Tensor, high: Tensor, size: int, start: int, end: int, *, corner_aligned: bool
) -> Tensor:
    """Return what each cell counts in each pixel along one axis.

    Args:
        low: (n,) float, where the boxes begin; pixel p reaches from p to p + 1.
        high: (n,) float, where they end.
        size: m cells.
        start: first pixel.
        end: one past the last pixel.
        corner_aligned: see ``render_masks``.

    Returns:
        (n, end - start, m); zero for pixels that are not wholly inside the box.
    """
    shift = 0.0 if corner_aligned else 0.5
    pixels = torch.arange(start, end, device=low.device, dtype=low.dtype)
    low, high = low[:, None], high[:, None]
    ratio = size / (high - low).clamp(min=1e-6)
    cells = ((pixels - low + shift) * ratio - shift).clamp_(0, size - 1)
    inside = (pixels >= low) & (pixels <= high - 1)
    return hat_weights(cells, size) * inside[..., None]


def render_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: Sequence[int],
    *,
    corner_aligned: bool,
    window: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Draw soft masks in their boxes.

    Two rules are in use. MNC keeps the boxes as they are and puts the corner of a cell where its
    value belongs: pixel x shows the mask at (x - x1) * m / w. FCIS rounds the boxes and puts the
    value in the middle of a cell, ((x - x1) + 1/2) * m / w - 1/2, as ``cv2.resize`` does.

    Note:
        Where one index is that of the last cell, MNC's code interpolates along neither axis; here
        it still does along the other one.

    Args:
        masks: (n, m, m) in [0, 1], any float dtype.
        boxes: (n, 4) XYXY, image pixels, continuous; may reach beyond the image.
        image_size: (H, W).
        corner_aligned: MNC's rule, else FCIS's.
        window: (x1, y1, x2, y2) in whole pixels, the part to draw; None for the whole image.

    Returns:
        (n, h, w) float32 on the device of ``masks``, zero outside the boxes. All at once: large
        images are for the caller to draw in parts.
    """
    masks, boxes = masks.float(), boxes.float()
    if not corner_aligned:
        boxes = pixel_boxes(boxes)
    left, top, right, bottom = window or (0, 0, int(image_size[1]), int(image_size[0]))
    x1, y1, x2, y2 = boxes.unbind(1)
    size = masks.shape[-1]
    rows = axis_weights(y1, y2, size, top, bottom, corner_aligned=corner_aligned)
    cols = axis_weights(x1, x2, size, left, right, corner_aligned=corner_aligned)
    return rows @ masks @ cols.mT
