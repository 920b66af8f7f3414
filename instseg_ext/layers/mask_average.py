"""Weighted averages of soft masks that are drawn in their boxes, tile by tile of the image.

In each tile the masks that reach it are drawn once, whatever the number of averages they count in;
then every average is a sum over few of them. Nothing that is computed on the way has the size of
the image.

Shapes: C masks of m x m with a box each, D averages, H x W image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from instseg_ext.layers.mask_ops import above
from instseg_ext.layers.mask_render import column_factors, pixel_boxes, row_factors

__all__ = ["AverageOptions", "MaskAverages"]

_SMALLEST_TILE = 64  # pixels
# Tiles along a side of an image, on the CPU. More of them take more steps, fewer draw more beside
# the boxes.
_CPU_TILES = 10


@dataclass(frozen=True)
class AverageOptions:
    """How masks are drawn and averaged.

    Attributes:
        corner_aligned: see ``render_masks``.
        voter_threshold: masks become one where they are greater, zero elsewhere, before they are
            averaged; None for soft masks.
        mask_threshold: results tell where the average is greater; None for the averages.
    """

    corner_aligned: bool
    voter_threshold: float | None = None
    mask_threshold: float | None = None


class MaskAverages:
    """The averages of an image.

    Attributes:
        windows: for each average (x1, y1, x2, y2), whole pixels outside of which it is zero; empty
            if its masks lie beside the image.
    """

    def __init__(
        self,
        boxes: Tensor,
        masks: Tensor,
        weights: Tensor,
        image_size: Sequence[int],
        options: AverageOptions,
        budget_mb: float,
    ) -> None:
        """Copy to the host what the work is planned by; nothing else is read back from the device.

        Args:
            boxes: (C, 4) float32 XYXY, image pixels, continuous.
            masks: (C, m, m) float32.
            weights: (D, C) float32; a mask counts where its weight is positive.
            image_size: (H, W).
            options: how to draw and average.
            budget_mb: MiB of working memory.
        """
        self._options, self._budget = options, int(budget_mb * 2**20)
        self._boxes = boxes if options.corner_aligned else pixel_boxes(boxes)
        self._masks, self._image_size = masks, tuple(image_size)
        self._weights, self._host_weights = weights, weights.cpu().numpy()
        reach = boxes.cpu().numpy()
        reach = np.concatenate([np.floor(reach[:, :2]), np.ceil(reach[:, 2:])], axis=1)
        height, width = image_size
        self._reach = np.clip(reach, 0, [width, height, width, height]).astype(np.int64)
        self.windows = [self._window(row) for row in self._host_weights]

    def _window(self, weights: np.ndarray) -> tuple[int, int, int, int]:
        """Return the pixels that masks of positive weight, (C,), can reach."""
        voters = self._reach[weights > 0]
        if not len(voters):
            return (0, 0, 0, 0)
        return (*voters[:, :2].min(axis=0).tolist(), *voters[:, 2:].max(axis=0).tolist())

    def fill(self, rows: slice, planes: Tensor) -> None:
        """Write averages.

        What is known of all masks goes to the device in one copy, what is known of those in a band
        of tiles in one copy each: that of a whole image could be large.

        Args:
            rows: of the averages, n.
            planes: (n, H, W) of zeros; bool with a mask threshold, else float32.
        """
        options, device = self._options, self._boxes.device
        weights = self._host_weights[rows]
        used = np.flatnonzero((weights > 0).any(axis=0))
        plan = _Plan(weights[:, used], self._reach[used], self._image_size, self._side(len(used)))
        (index,), reached = _upload([[used], [tile.rows for tile in plan.columns]], device)
        boxes, masks, values = self._boxes[index], self._masks[index], self._weights[rows][:, index]
        columns = _Columns(boxes, masks.shape[-1], options.corner_aligned, self._budget // 4)
        for top, bottom, band, tiles in plan.bands():
            (index,), *steps = _upload([[band], *(tile.arrays for tile in tiles)], device)
            lines = row_factors(
                masks[index], boxes[index], top, bottom, corner_aligned=options.corner_aligned
            )
            for tile, (entries, places, found, first, pairs, where) in zip(
                tiles, steps, strict=True
            ):
                span = plan.columns[tile.number]
                factors = columns.factors(span.start, span.end, reached[tile.number])
                drawn = lines.index_select(0, entries) @ factors.index_select(0, places)
                if options.voter_threshold is not None:
                    drawn.gt_(options.voter_threshold)
                # A product with the mostly empty matrix would take many times as long.
                sums = F.embedding_bag(
                    pairs,
                    drawn.flatten(1),
                    first,
                    mode="sum",
                    per_sample_weights=values.take(where),
                ).unflatten(1, drawn.shape[1:])
                if options.mask_threshold is not None:
                    sums = above(sums, options.mask_threshold)
                _write(planes, found, (slice(top, bottom), slice(span.start, span.end)), sums)

    def _side(self, num: int) -> int:
        """Return the side of the tiles for so many masks."""
        # What is drawn may take half of the budget. Other devices are best at few large steps.
        side = (self._budget / 8 / max(num, 1)) ** 0.5
        if self._boxes.device.type == "cpu":
            height, width = self._image_size
            side = min(side, (height * width) ** 0.5 / _CPU_TILES)
        return max(_SMALLEST_TILE, int(side))


class _Span(NamedTuple):
    """Tiles of one column or row of tiles.

    Attributes:
        start: first pixel along the axis.
        end: one past the last pixel.
        rows: (n,) int64, the masks that reach it, rising.
    """

    start: int
    end: int
    rows: np.ndarray


class _Tile(NamedTuple):
    """What is done in a tile.

    Attributes:
        number: of its column of tiles.
        arrays: int64: of the n masks that reach the tile, their entries in the band and their
            places in the column of tiles, (n,) each; of the d averages that have some of these,
            their rows and where their masks begin in what follows, (d,) each; these masks as
            entries of the n, and the places of their weights in the flat matrix, (p,) each.
    """

    number: int
    arrays: tuple[np.ndarray, ...]


class _Plan:
    """Which masks are drawn in which tile, and which averages they count in; all on the host.

    Attributes:
        columns: the columns of tiles that masks reach.
    """

    def __init__(
        self, weights: np.ndarray, reach: np.ndarray, image_size: tuple[int, ...], tile: int
    ) -> None:
        """Find which masks reach which column of tiles.

        Args:
            weights: (D, n).
            reach: (n, 4) int, the pixels of each mask.
            image_size: (H, W).
            tile: side of a tile.
        """
        self._weights, self._reach = weights, reach
        self._height, self._side = image_size[0], tile
        self.columns = list(_spans(reach[:, 0], reach[:, 2], tile, image_size[1]))
        self._reached = np.zeros((len(self.columns), len(reach)), dtype=bool)
        for reached, column in zip(self._reached, self.columns, strict=True):
            reached[column.rows] = True
        # Where a mask stands among those that reach a column of tiles.
        self._place = self._reached.cumsum(axis=1) - 1

    def bands(self) -> Iterator[tuple[int, int, np.ndarray, list[_Tile]]]:
        """Yield start, end, masks and tiles of each row of tiles that masks reach."""
        for top, bottom, band in _spans(
            self._reach[:, 1], self._reach[:, 3], self._side, self._height
        ):
            yield top, bottom, band, list(self._tiles(band))

    def _tiles(self, band: np.ndarray) -> Iterator[_Tile]:
        """Yield the tiles that some of these masks, (n,) rising, reach."""
        for number, (reached, place) in enumerate(zip(self._reached, self._place, strict=True)):
            entries = np.flatnonzero(reached[band])
            if not len(entries):
                continue
            masks = band[entries]
            rows, pairs = self._weights[:, masks].nonzero()
            found, first = np.unique(rows, return_index=True)
            where = rows * len(self._reach) + masks[pairs]
            yield _Tile(number, (entries, place[masks], found, first, pairs, where))


class _Columns:
    """What the cells of the masks count in each column, tile by tile; kept while memory allows."""

    def __init__(self, boxes: Tensor, size: int, corner_aligned: bool, most_bytes: int) -> None:
        self._boxes, self._size, self._corner_aligned = boxes, size, corner_aligned
        self._bytes_left = most_bytes
        self._kept: dict[int, Tensor] = {}

    def factors(self, start: int, end: int, rows: Tensor) -> Tensor:
        """Return the (n, k, end - start) factors of some masks, always the same for a start."""
        if start in self._kept:
            return self._kept[start]
        factors = column_factors(
            self._boxes[rows], self._size, start, end, corner_aligned=self._corner_aligned
        )
        if factors.nbytes <= self._bytes_left:
            self._bytes_left -= factors.nbytes
            self._kept[start] = factors
        return factors


def _spans(low: np.ndarray, high: np.ndarray, tile: int, length: int) -> Iterator[_Span]:
    """Yield the tiles along one axis that are reached.

    Args:
        low: (n,) int, first pixels.
        high: (n,) int, one past the last pixels.
        tile: side of a tile.
        length: of the axis.
    """
    for start in range(0, length, tile):
        end = min(start + tile, length)
        rows = np.flatnonzero((low < end) & (high > start))
        if len(rows):
            yield _Span(start, end, rows)


def _upload(groups: Sequence[Sequence[np.ndarray]], device: torch.device) -> list[list[Tensor]]:
    """Bring groups of int64 arrays to a device, all in one copy; the CPU takes them as they are."""
    flat = [array for group in groups for array in group]
    if device.type == "cpu":
        tensors = iter([torch.from_numpy(array) for array in flat])
    else:
        joined = torch.from_numpy(np.concatenate(flat)).to(device)
        tensors = iter(joined.split([len(array) for array in flat]))
    return [list(islice(tensors, len(group))) for group in groups]


def _write(planes: Tensor, rows: Tensor, where: tuple[slice, slice], values: Tensor) -> None:
    """Write (n, h, w) values into a part of some planes."""
    if planes.device.type == "cpu":  # NumPy writes whole lines at once
        planes.numpy()[rows.numpy(), where[0], where[1]] = values.numpy()
    else:
        planes[rows, where[0], where[1]] = values
