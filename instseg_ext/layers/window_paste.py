"""Paste the masks of windows into the image, in bounded memory.

Windows of a scale are of one size and lie on a grid, so that few maps per axis serve all of them:
``mask = rows @ values @ cols.T``, cut where the values exceed the threshold.

Shapes: N windows, m x m cells, H x W image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instseg_ext.layers.mask_ops import above, chunk_slices, masks_per_chunk
from instseg_ext.layers.mask_resize import AxisMap, true_spans

__all__ = ["WindowAxis", "aligned_axis", "centred_axis", "corner_resize", "iter_window_masks"]


# Roundings of a value that is interpolated along both axes, with some slack, in units of its size.
_ROUNDING = 16 * 2.0**-24


@dataclass(frozen=True)
class WindowAxis:
    """How one axis of a window lies in the image.

    Attributes:
        start: first line of the image that the window fills.
        cells: from the m cells of the window to the P lines that it fills; P may be 0.
    """

    start: int
    cells: AxisMap

    @classmethod
    def of(cls, start: int, weights: Tensor) -> WindowAxis:
        """Make an axis of (P, m) float32 weights, each line's in one piece."""
        seen = weights > 0
        first = seen.to(torch.uint8).argmax(dim=1)
        last = weights.shape[1] - 1 - seen.flip(1).to(torch.uint8).argmax(dim=1)
        return cls(start, AxisMap(weights, first.tolist(), last.tolist()))

    def to(self, device: torch.device) -> WindowAxis:
        """Return the axis with its weights on ``device``."""
        cells = self.cells
        return WindowAxis(self.start, AxisMap(cells.weights.to(device), cells.first, cells.last))


def corner_resize(length: int, size: int) -> Tensor:
    """Return the matrix (size, length) float32 by which ``image.scale`` of Torch7 resizes an axis.

    Enlarging is linear and keeps the outer samples where they are; shrinking averages over the
    cells under each new one, by the fraction that they cover.
    """
    if size <= length:
        edges = torch.arange(size + 1, dtype=torch.float64) * (length / size)
        cells = torch.arange(length, dtype=torch.float64)
        covered = torch.minimum(edges[1:, None], cells + 1) - torch.maximum(edges[:-1, None], cells)
        return (covered.clamp(min=0) * (size / length)).float()
    source = torch.arange(size, dtype=torch.float64) * ((length - 1) / (size - 1))
    return _linear(source, length)


def _linear(source: Tensor, length: int) -> Tensor:
    """Return (P, length) float32 weights of linear interpolation at (P,) float64 positions."""
    source = source.clamp(0, length - 1)
    cells = torch.arange(length, dtype=torch.float64)
    return (1 - (source[:, None] - cells).abs()).clamp(min=0).float()


def centred_axis(start: float, end: float, cells: int, length: int) -> WindowAxis:
    """Lay ``cells`` evenly on [start, end); pixels take their value at their centre.

    Args:
        start: in pixels of the image; may lie outside.
        end: likewise.
        cells: of the window, m.
        length: of the image.

    Returns:
        The axis. Between the border of the window and the centre of its outermost cell, that cell
        counts alone.
    """
    first = min(max(0, math.ceil(start - 0.5)), length)
    last = max(first, min(length, math.ceil(end - 0.5)))
    centre = torch.arange(first, last, dtype=torch.float64) + 0.5
    return WindowAxis.of(first, _linear((centre - start) / (end - start) * cells - 0.5, cells))


def aligned_axis(start: float, size: int, cells: int, length: int) -> WindowAxis:
    """Lay ``cells`` on ``size`` whole pixels from ``start``, rounded down, as ``corner_resize``.

    Args:
        start: in pixels of the image; may lie outside.
        size: of the window, in pixels.
        cells: of the window, m.
        length: of the image.
    """
    begin = math.floor(start)
    first, last = min(max(begin, 0), length), min(max(begin + size, 0), length)
    weights = corner_resize(cells, size)[first - begin : max(first, last) - begin]
    return WindowAxis.of(first, weights)


@torch.no_grad()
def iter_window_masks(
    values: Callable[[slice], Tensor],
    rows: Sequence[WindowAxis],
    cols: Sequence[WindowAxis],
    image_size: tuple[int, int],
    threshold: float,
    budget_mb: float = 256,
    *,
    largest_chunk: int = 128,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield full-image masks in chunks whose working memory stays under a budget.

    Args:
        values: from a slice of the windows to their (n, m, m) values of any float dtype.
        rows: of each window, on the device of ``values``.
        cols: of each window, likewise.
        image_size: (H, W).
        threshold: strict lower bound of a mask pixel, any number; not-a-number is not above it.
        budget_mb: MiB for the masks of one chunk, their copies and one interpolated map.
        largest_chunk: windows to ask ``values`` for at once, at most.

    Yields:
        ``(slice, masks)`` with ``masks`` (n, H, W) bool, in order, covering N. Each chunk
        overwrites the one before.
    """
    height, width = image_size
    plane = 3 * height * width  # the mask, the copies that encoding and the caller make
    maps_mb = 8 * height * width / 2**20
    size = min(largest_chunk, masks_per_chunk(plane, budget_mb - maps_mb))
    buffer = None
    for index in chunk_slices(len(rows), size):
        part = values(index).float()
        if buffer is None:
            buffer = torch.empty((size, height, width), dtype=torch.bool, device=part.device)
        out = buffer[: len(part)].zero_()
        with torch.autocast(part.device.type, enabled=False):
            _fill(part, rows[index], cols[index], threshold, out)
        yield index, out


def _fill(
    values: Tensor,
    rows: Sequence[WindowAxis],
    cols: Sequence[WindowAxis],
    threshold: float,
    out: Tensor,
) -> None:
    """Write the masks of (n, m, m) float32 into ``out``, (n, H, W) bool and zero."""
    # A value that is the threshold everywhere must not exceed it by rounding.
    threshold += _ROUNDING * abs(threshold)
    # Weights are convex: where no cell that a pixel sees is above, the pixel is not.
    hit = (values > threshold).cpu().numpy()
    spans = zip(true_spans(hit.any(axis=2)), true_spans(hit.any(axis=1)), strict=True)
    for mask, value, row, col, span in zip(out, values, rows, cols, spans, strict=True):
        (top, bottom), (left, right) = row.cells.window(*span[0]), col.cells.window(*span[1])
        if span[0][0] == span[0][1] or top == bottom or left == right:
            continue
        low, high = row.cells.band(top, bottom)
        first, last = col.cells.band(left, right)
        block = row.cells.weights[top:bottom, low:high] @ value[low:high, first:last]
        block = block @ col.cells.weights[left:right, first:last].t()
        at_row, at_col = row.start + top, col.start + left
        above(
            block,
            threshold,
            out=mask[at_row : at_row + bottom - top, at_col : at_col + right - left],
        )
