"""Tensor functions on stacks of full-image masks: boxes, COCO run lengths, memory arithmetic.

Shapes: N masks, H x W image pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg_ext.structures.rle import encode_masks

__all__ = [
    "RLEList",
    "chunk_slices",
    "count_pixels",
    "empty_boxes",
    "encode_rle",
    "masks_per_chunk",
    "tight_boxes",
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


def count_pixels(masks: Tensor) -> Tensor:
    """Count the pixels of each mask.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N,) int64 on the device of ``masks``.
    """
    flat = masks.flatten(1).contiguous()
    pixels = flat.shape[1]
    aligned = pixels and pixels % 8 == 0 and flat.storage_offset() % 8 == 0
    if flat.device.type != "cpu" or not aligned:
        return flat.sum(dim=1)
    # Torch widens every pixel to eight bytes before it sums. Here eight pixels are one number, of
    # which 255 can be added before a byte of the sum overflows.
    lanes = flat.view(torch.int64).split(255, dim=1)
    sums = torch.stack([lane.sum(dim=1) for lane in lanes], dim=1)
    return sums.view(torch.uint8).sum(dim=1, dtype=torch.int64)


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
        rows, cols = (torch.from_numpy(pixels.any(axis=axis)) for axis in (2, 1))
    else:
        rows, cols = masks.any(dim=2), masks.any(dim=1)
    y0, y1 = _first_and_end(rows)
    x0, x1 = _first_and_end(cols)
    boxes = torch.stack([x0, y0, x1, y1], dim=1).to(torch.float32)
    return boxes * rows.any(dim=1, keepdim=True)


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
