"""Tensor functions on stacks of full-image masks: boxes, COCO run lengths, memory arithmetic.

Shapes: N masks, H x W image pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from instseg_ext.structures.rle import encode_masks, tight_box

__all__ = [
    "RLEList",
    "above",
    "chunk_slices",
    "count_pixels",
    "empty_boxes",
    "encode_rle",
    "masks_per_chunk",
    "mass_centers",
    "tight_boxes",
    "tight_boxes_within",
]


class RLEList(list):
    """A list of COCO RLE dictionaries that can be indexed as tensor fields of ``Instances`` are.

    ``Instances[keep]`` hands ``keep`` (bool or integer tensor, array, list, slice, int) to every
    field; a plain list refuses tensors.
    """

    def __getitem__(self, item: Any) -> Any:
        """Return one dictionary for an int, an ``RLEList`` for everything else."""
        if isinstance(item, int | np.integer):
            return super().__getitem__(int(item))
        if isinstance(item, slice):
            return RLEList(super().__getitem__(item))
        index = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
        if index.ndim == 0:
            return super().__getitem__(int(index))
        if index.dtype == bool:
            if len(index) != len(self):
                raise IndexError(f"boolean index of length {len(index)} for {len(self)} masks")
            index = np.flatnonzero(index)
        return RLEList(super(RLEList, self).__getitem__(int(i)) for i in index)


def empty_boxes(device: torch.device | str = "cpu") -> Tensor:
    """Return the boxes of no mask: (0, 4) float32."""
    return torch.zeros((0, 4), dtype=torch.float32, device=device)


def _first_and_end(hit: Tensor) -> tuple[Tensor, Tensor]:
    """First True and one past the last along dim 1 of (N, L) bool; no True gives (0, L)."""
    hit = hit.to(torch.uint8)  # argmax is not defined for bool on every device
    first = hit.argmax(dim=1)
    end = hit.shape[1] - hit.flip(1).argmax(dim=1)
    return first, end


def above(values: Tensor, threshold: float, out: Tensor | None = None) -> Tensor:
    """Compare with a threshold.

    Args:
        values: float, without gradient.
        threshold: strict lower bound, rounded to the precision of ``values``.
        out: bool of the same shape, overwritten; a new tensor if None.

    Returns:
        bool, where ``values`` is strictly greater; NaN is not.
    """
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return torch.gt(values, threshold, out=out)
    # NumPy is many times faster at this: torch does not vectorise the narrowing to bool.
    out = torch.empty(values.shape, dtype=torch.bool) if out is None else out
    np.greater(values.detach().numpy(), np.float32(threshold), out=out.numpy())
    return out


def _add_bytes(words: Tensor, dim: int) -> Tensor:
    """Add zeros and ones that are packed eight to a number, each byte position for itself.

    Torch widens bytes before it sums them, which takes many times as long as reading them. 255
    packed numbers can be added before a byte of the sum overflows.

    Args:
        words: int64 view of bytes that are 0 or 1.
        dim: dimension that vanishes.

    Returns:
        int64 of the remaining shape, with a last dimension of 8 for the bytes of a word.
    """
    sums = torch.stack([part.sum(dim=dim) for part in words.split(255, dim=dim)])
    return sums.unsqueeze(-1).view(torch.uint8).sum(dim=0, dtype=torch.int64)


def count_pixels(masks: Tensor) -> Tensor:
    """Count the pixels of each mask.

    Args:
        masks: (N, H, W) or (N, H * W) bool.

    Returns:
        (N,) int64 on the device of ``masks``.
    """
    flat = masks.flatten(1).contiguous()
    pixels = flat.shape[1]
    aligned = pixels and pixels % 8 == 0 and flat.storage_offset() % 8 == 0
    if flat.device.type != "cpu" or not aligned:
        return flat.sum(dim=1)
    return _add_bytes(flat.view(torch.int64), dim=1).sum(dim=1)


def mass_centers(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute where the pixels of each mask are on average.

    Args:
        masks: (N, H, W) bool.

    Returns:
        Mean row index and mean column index, (N,) float64, 0 for an empty mask, and the pixel
        count, (N,) int64. Sums are exact: those of a large mask exceed the integers of float32.
    """
    num, height, width = masks.shape
    if masks.device.type != "cpu" or not masks.numel():
        rows, columns = masks.sum(dim=2), masks.sum(dim=1)
        sum_y = (rows * torch.arange(height, device=masks.device)).sum(dim=1)
    else:
        # A block of eight rows is a whole number of words, whatever the width. Row 8 b + r is
        # counted in two parts: b from the blocks' totals, r from the blocks laid on each other.
        blocks = -(-height // 8)
        masks = F.pad(masks, (0, 0, 0, 8 * blocks - height)) if height % 8 else masks.contiguous()
        # A slice of other masks may begin in the middle of a word.
        masks = masks.clone() if masks.storage_offset() % 8 else masks
        words = masks.view(num, blocks, 8 * width).view(torch.int64)
        per_block = _add_bytes(words, dim=2).sum(dim=2)
        overlaid = _add_bytes(words, dim=1).view(num, 8, width)
        columns = overlaid.sum(dim=1)
        sum_y = 8 * (per_block * torch.arange(blocks)).sum(dim=1)
        sum_y += (overlaid.sum(dim=2) * torch.arange(8)).sum(dim=1)
    sum_x = (columns * torch.arange(width, device=masks.device)).sum(dim=1)
    area = columns.sum(dim=1)
    divisor = area.clamp(min=1).double()
    return sum_y.double() / divisor, sum_x.double() / divisor, area


def tight_boxes(masks: Tensor) -> Tensor:
    """Return the tightest box around each mask.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 4) float32, XYXY, ``(xmin, ymin, xmax + 1, ymax + 1)`` so that width times height counts
        pixels; zeros for an empty mask. On the device of ``masks``.
    """
    if masks.shape[0] == 0 or masks.shape[1] == 0 or masks.shape[2] == 0:
        return torch.zeros((masks.shape[0], 4), dtype=torch.float32, device=masks.device)
    if masks.device.type == "cpu":
        pixels = masks.numpy()  # many times faster at this than the reductions of torch
        rows, cols = pixels.any(axis=2), pixels.any(axis=1)
        y0, x0 = rows.argmax(axis=1), cols.argmax(axis=1)
        y1 = rows.shape[1] - rows[:, ::-1].argmax(axis=1)
        x1 = cols.shape[1] - cols[:, ::-1].argmax(axis=1)
        boxes = np.stack([x0, y0, x1, y1], axis=1).astype(np.float32)
        return torch.from_numpy(boxes * rows.any(axis=1, keepdims=True))
    rows, cols = masks.any(dim=2), masks.any(dim=1)
    y0, y1 = _first_and_end(rows)
    x0, x1 = _first_and_end(cols)
    boxes = torch.stack([x0, y0, x1, y1], dim=1).to(torch.float32)
    return boxes * rows.any(dim=1, keepdim=True)


def tight_boxes_within(masks: Tensor, windows: Sequence[tuple[int, int, int, int]]) -> Tensor:
    """Return the tightest box around each mask, which is empty outside of a window.

    The CPU reads the windows alone. Other devices read all pixels of all masks in one step: many
    small steps would take longer.

    Args:
        masks: (N, H, W) bool.
        windows: N times (x1, y1, x2, y2), whole pixels, in the image.

    Returns:
        As ``tight_boxes``.
    """
    if masks.device.type != "cpu":
        return tight_boxes(masks)
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    for box, mask, (x1, y1, x2, y2) in zip(boxes, masks.numpy(), windows, strict=True):
        found = tight_box(mask[y1:y2, x1:x2])
        if found is not None:
            box[:] = found[0] + x1, found[1] + y1, found[2] + x1, found[3] + y1
    return torch.from_numpy(boxes)


def encode_rle(masks: Tensor) -> RLEList:
    """Encode masks as compressed COCO RLE.

    Only the tight box of each mask is scanned, see ``structures.rle``.

    Args:
        masks: (N, H, W) bool, any device, any strides.

    Returns:
        N dictionaries ``{"size": [H, W], "counts": str}``; ``counts`` is ASCII text, ready for
        JSON, and pycocotools accepts it as it is.
    """
    return RLEList(encode_masks(masks))


def masks_per_chunk(bytes_per_mask: int, budget_mb: float) -> int:
    """Return how many masks fit a budget of ``budget_mb`` MiB, at least one."""
    return max(1, int(budget_mb * 2**20) // max(1, bytes_per_mask))


def chunk_slices(num: int, size: int) -> Iterable[slice]:
    """Yield consecutive slices of at most ``size`` that cover ``range(num)``."""
    for start in range(0, num, size):
        yield slice(start, min(start + size, num))
