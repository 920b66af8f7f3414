"""Weighted averages of soft masks that are drawn in their boxes, tile by tile of the image.

In each tile the masks that reach it are drawn once, whatever the number of averages they count in;
then every average is a sum over few of them. Nothing that is computed on the way has the size of
the image.

Shapes: C masks of m x m with a box each, D averages, H x W image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        """Plan the work; the only copies from the device are made here.

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
        self._weights = weights.cpu().numpy()
        reach = boxes.cpu().numpy()
        reach = np.concatenate([np.floor(reach[:, :2]), np.ceil(reach[:, 2:])], axis=1)
        height, width = image_size
        self._reach = np.clip(reach, 0, [width, height, width, height]).astype(np.int64)
        self.windows = [self._window(row) for row in self._weights]

    def _window(self, weights: np.ndarray) -> tuple[int, int, int, int]:
        """Return the pixels that masks of positive weight, (C,), can reach."""
        voters = self._reach[weights > 0]
        if not len(voters):
            return (0, 0, 0, 0)
        return (*voters[:, :2].min(axis=0).tolist(), *voters[:, 2:].max(axis=0).tolist())

    def fill(self, rows: slice, planes: Tensor) -> None:
        """Write averages.

        Args:
            rows: of the averages, n.
            planes: (n, H, W) of zeros; bool with a mask threshold, else float32.
        """
        options, (height, width) = self._options, self._image_size
        used = np.flatnonzero((self._weights[rows] > 0).any(axis=0))
        weights, reach = self._weights[rows][:, used], self._reach[used]
        boxes, masks = self._boxes[self._index(used)], self._masks[self._index(used)]
        tile = self._tile(len(used))
        columns = _Columns(boxes, masks.shape[-1], options.corner_aligned, self._budget // 4)
        columns.split(reach, width, tile)
        for top, bottom, band in _spans(reach[:, 1], reach[:, 3], tile, height):
            index = self._index(band)
            lines = row_factors(
                masks[index], boxes[index], top, bottom, corner_aligned=options.corner_aligned
            )
            for left, right, entries, factors in columns.reached_by(band):
                drawn = lines.index_select(0, self._index(entries)) @ factors
                if options.voter_threshold is not None:
                    drawn.gt_(options.voter_threshold)
                found, sums = _weighted_sums(weights[:, band[entries]], drawn)
                if options.mask_threshold is not None:
                    sums = above(sums, options.mask_threshold)
                _write(planes, found, (slice(top, bottom), slice(left, right)), sums)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self._boxes.device)

    def _tile(self, num: int) -> int:
        """Return the side of the tiles for so many masks."""
        # What is drawn may take half of the budget. Other devices are best at few large steps.
        side = (self._budget / 8 / max(num, 1)) ** 0.5
        if self._boxes.device.type == "cpu":
            height, width = self._image_size
            side = min(side, (height * width) ** 0.5 / _CPU_TILES)
        return max(_SMALLEST_TILE, int(side))


class _Columns:
    """What the cells of the masks count in each column, tile by tile; kept while memory allows."""

    def __init__(self, boxes: Tensor, size: int, corner_aligned: bool, most_bytes: int) -> None:
        self._boxes, self._size, self._corner_aligned = boxes, size, corner_aligned
        self._bytes_left = most_bytes

    def split(self, reach: np.ndarray, width: int, tile: int) -> None:
        """Find which masks reach which tile.

        Args:
            reach: (n, 4) int, the pixels of each mask.
            width: of the image.
            tile: width of a tile.
        """
        self._tiles = list(_spans(reach[:, 0], reach[:, 2], tile, width))
        self._reached = np.zeros((len(self._tiles), len(reach)), dtype=bool)
        for reached, (_, _, rows) in zip(self._reached, self._tiles, strict=True):
            reached[rows] = True
        # Where a mask stands among those that reach a tile.
        self._place = self._reached.cumsum(axis=1) - 1
        self._kept: dict[int, Tensor] = {}

    def reached_by(self, band: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, Tensor]]:
        """Yield the tiles that some of these masks reach.

        Args:
            band: rows of masks, rising.

        Yields:
            First and one past the last column, the entries of ``band`` that reach the tile, and
            their (n, k, columns) factors.
        """
        for tile, (left, right, _) in enumerate(self._tiles):
            entries = np.flatnonzero(self._reached[tile, band])
            if not len(entries):
                continue
            factors = self._factors(tile)
            places = torch.from_numpy(self._place[tile, band[entries]])
            yield left, right, entries, factors.index_select(0, places.to(factors.device))

    def _factors(self, tile: int) -> Tensor:
        if tile in self._kept:
            return self._kept[tile]
        left, right, rows = self._tiles[tile]
        boxes = self._boxes[torch.from_numpy(rows).to(self._boxes.device)]
        factors = column_factors(
            boxes, self._size, left, right, corner_aligned=self._corner_aligned
        )
        if factors.nbytes <= self._bytes_left:
            self._bytes_left -= factors.nbytes
            self._kept[tile] = factors
        return factors


def _spans(
    low: np.ndarray, high: np.ndarray, tile: int, length: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield the tiles along one axis that are reached: start, end and the rows that reach them.

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
            yield start, end, rows


def _weighted_sums(weights: np.ndarray, drawn: Tensor) -> tuple[np.ndarray, Tensor]:
    """Add drawings up.

    Args:
        weights: (D, n).
        drawn: (n, h, w) float32.

    Returns:
        The d rows of ``weights`` that are not zero, and their (d, h, w) sums.
    """
    rows, entries = weights.nonzero()
    found, first = np.unique(rows, return_index=True)
    # A product with the mostly empty matrix would take many times as long.
    entries, first, values = (
        torch.from_numpy(x).to(drawn.device) for x in (entries, first, weights[rows, entries])
    )
    sums = F.embedding_bag(entries, drawn.flatten(1), first, mode="sum", per_sample_weights=values)
    return found, sums.unflatten(1, drawn.shape[1:])


def _write(planes: Tensor, rows: np.ndarray, where: tuple[slice, slice], values: Tensor) -> None:
    """Write (n, h, w) values into a part of some planes."""
    if planes.device.type == "cpu":  # NumPy writes whole lines at once
        planes.numpy()[rows, where[0], where[1]] = values.numpy()
    else:
        planes[torch.from_numpy(rows).to(planes.device), where[0], where[1]] = values
