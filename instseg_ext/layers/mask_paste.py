"""Paste box-shaped mask probabilities into the image, in bounded memory.

Shapes: N masks of m x m, H x W image.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from instseg_ext.layers.mask_ops import chunk_slices, masks_per_chunk

__all__ = ["iter_pasted_masks"]

_FLOAT_BYTES = 20  # per pixel: two coordinates, the value, the comparison, some slack


@torch.no_grad()
def _paste(masks: Tensor, boxes: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
    """Sample masks on a window of the image.

    Args:
        masks: (n, m, m) float32.
        boxes: (n, 4) float32, XYXY, image pixels.
        rows: [start, end) of the window.
        cols: [start, end) of the window.

    Returns:
        (n, rows, cols) float32; zero outside the box.
    """
    x0, y0, x1, y1 = boxes.split(1, dim=1)
    y = torch.arange(*rows, device=boxes.device, dtype=torch.float32) + 0.5
    x = torch.arange(*cols, device=boxes.device, dtype=torch.float32) + 0.5
    y = (y - y0) / (y1 - y0) * 2 - 1
    x = (x - x0) / (x1 - x0) * 2 - 1
    shape = (len(masks), y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def _window(box: Tensor, image_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows and columns [start, end) that the mask of ``box`` can reach."""
    x0, y0, x1, y1 = box.tolist()
    height, width = image_size
    # Outside the box a probability mask falls below one half; detectron2 keeps one pixel more, too.
    rows = max(int(y0) - 1, 0), min(int(-(-y1 // 1)) + 1, height)
    cols = max(int(x0) - 1, 0), min(int(-(-x1 // 1)) + 1, width)
    return rows, cols


def iter_pasted_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    budget_mb: float = 256,
    *,
    reuse: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield full-image masks in chunks whose working memory stays under a budget.

    The values are those of detectron2's ``paste_masks_in_image``.

    Args:
        masks: (N, m, m) probabilities of any float dtype, each filling its box.
        boxes: (N, 4) XYXY, image pixels, inside the image.
        image_size: (H, W).
        threshold: inclusive lower bound of a mask pixel, positive.
        budget_mb: MiB for coordinates, values and masks of one chunk together.
        reuse: each chunk overwrites the one before.

    Yields:
        ``(slice, masks)`` with ``masks`` (n, H, W) bool, in order, covering N.
    """
    height, width = image_size
    masks, boxes = masks.detach().float(), boxes.detach().float()
    plane = 3 * height * width  # the mask, the copies that encoding and the caller make
    on_cpu = boxes.device.type == "cpu"
    # On the CPU one window after the other, on other devices all masks of a chunk at once.
    per_mask = plane if on_cpu else plane + _FLOAT_BYTES * height * width
    float_budget = budget_mb * 2**20 / 2
    size = masks_per_chunk(per_mask, budget_mb / 2 if on_cpu else budget_mb)
    buffer = None
    for index in chunk_slices(len(masks), size):
        part, part_boxes = masks[index], boxes[index]
        if buffer is None or not reuse:
            shape = (len(part), height, width)
            buffer = torch.empty(shape, dtype=torch.bool, device=boxes.device)
        out = buffer[: len(part)].zero_()
        if on_cpu:
            groups = [
                (slice(i, i + 1), *_window(part_boxes[i], image_size)) for i in range(len(part))
            ]
        else:
            groups = [(slice(0, len(part)), (0, height), (0, width))]
            float_budget = budget_mb * 2**20
        for which, rows, cols in groups:
            row_bytes = _FLOAT_BYTES * (which.stop - which.start) * max(1, cols[1] - cols[0])
            step = max(1, int(float_budget // row_bytes))
            for start in range(rows[0], rows[1], step):
                end = min(start + step, rows[1])
                value = _paste(part[which], part_boxes[which], (start, end), cols)
                out[which, start:end, cols[0] : cols[1]] = value >= threshold
        yield index, out
