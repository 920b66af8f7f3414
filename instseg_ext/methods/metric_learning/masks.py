"""Masks of seeds in cells, and what becomes of them: parts, size, duplicates, merging.

Shape shorthand: h x w cells of an image, N = h w, S seeds, R masks that are left, D numbers of an
embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from instseg_ext.layers.mask_nms import mask_intersections
from instseg_ext.layers.mask_ops import chunk_slices, count_pixels, masks_per_chunk
from instseg_ext.methods.metric_learning.similarity import similarity, squared_distances

__all__ = [
    "FoundMasks",
    "MaskOptions",
    "SeedMasks",
    "choose_masks",
    "greedy_keep",
    "keep_parts",
    "merge_weights",
]

# Most MiB of the distances of some seeds to all cells, at one time.
_PIECE_MB = 32


@dataclass(frozen=True)
class MaskOptions:
    """What becomes of the masks of seeds; see the config keys of the same names."""

    min_cells: int = 16
    parts: str = "all"
    mask_nms: float = 0.5
    merge: bool = False
    merge_iou: float = 0.4
    merge_thresh: float = 0.2
    upsample: str = "centred"


class SeedMasks:
    """The masks of seeds: bool in cells, and maps to be resized, which are made when asked for.

    Attributes:
        binary: (S, N) bool.
    """

    def __init__(
        self,
        embeddings: Tensor,
        seeds: Tensor,
        radii: Tensor,
        size_hw: tuple[int, int],
        budget_mb: float,
    ) -> None:
        """Compare all cells with the seeds.

        Args:
            embeddings: (N, D) float32.
            seeds: (S,) int64 in [0, N).
            radii: (S,) float32: cells belong to a mask up to this squared distance.
            size_hw: (h, w).
            budget_mb: MiB of working memory.
        """
        self._embeddings, self._seeds, self._radii = embeddings, seeds, radii
        self._size = size_hw
        self.binary = torch.empty(
            (len(seeds), len(embeddings)), dtype=torch.bool, device=embeddings.device
        )
        # Larger pieces leave the caches.
        per_chunk = masks_per_chunk(12 * len(embeddings), min(budget_mb, _PIECE_MB))
        for rows in chunk_slices(len(seeds), per_chunk):
            torch.le(self._distances(rows), radii[rows, None], out=self.binary[rows])

    def _distances(self, rows: slice | Tensor) -> Tensor:
        return squared_distances(self._embeddings[self._seeds[rows]], self._embeddings)

    def maps(self, rows: Tensor, binary: Tensor, *, centred: bool = True) -> Tensor:
        """Return similarities to seeds, so stretched that a mask is where they are above one half.

        Args:
            rows: (n,) int64 in [0, S).
            binary: (n, N) bool, the masks, of which parts may have been taken away: there the map
                is zero.
            centred: similarities above tau are stretched by themselves, from [tau, 1] to [0.5, 1].
                Between a cell of similarity 1 and one of 0 the border of a mask is then in the
                middle, else it is nearer to the former the higher tau is.

        Returns:
            (n, h, w) float32.
        """
        tau = similarity(self._radii[rows, None])
        # Cells whose embeddings are not finite belong to no mask.
        maps = similarity(self._distances(rows)).nan_to_num_(nan=0.0)
        stretched = maps * (0.5 / tau)
        if centred:
            stretched = torch.where(maps < tau, stretched, 1 - (1 - maps) * (0.5 / (1 - tau)))
        maps = stretched * ~(self.binary[rows] & ~binary)
        return maps.unflatten(1, self._size)


def keep_parts(masks: Tensor, seeds: Tensor, size_hw: tuple[int, int], which: str) -> Tensor:
    """Keep one connected part of each mask (8 neighbours), on the CPU.

    Args:
        masks: (S, N) bool.
        seeds: (S,) int64, a cell of each.
        size_hw: (h, w).
        which: ``largest`` or ``seed``.

    Returns:
        (S, N) bool.
    """
    kept = np.empty(masks.shape, dtype=bool)
    pictures = masks.cpu().numpy().reshape(-1, *size_hw).astype(np.uint8)
    for row, (picture, seed) in enumerate(zip(pictures, seeds.tolist(), strict=True)):
        _, parts, stats, _ = cv2.connectedComponentsWithStats(picture)
        parts = parts.ravel()
        # Part 0 is what does not belong to the mask.
        areas = stats[1:, cv2.CC_STAT_AREA]
        part = parts[seed] if which == "seed" or not len(areas) else 1 + areas.argmax()
        kept[row] = (parts == part) & (part > 0)
    return torch.from_numpy(kept).to(masks.device)


def _ious(masks: Tensor, classes: Tensor, budget_mb: float) -> Tensor:
    """Return the (R, R) IoU of (R, N) masks; 0 where classes differ."""
    areas = count_pixels(masks)
    common = mask_intersections(masks, classes, budget_mb)
    return common / (areas[:, None] + areas - common).clamp(min=1)


def greedy_keep(ious: Tensor, threshold: float) -> list[int]:
    """Return the rows that no kept row before them overlaps by more than ``threshold``.

    Args:
        ious: (R, R) float32, rows by falling score.
        threshold: in [0, 1]; 1 keeps all.
    """
    if threshold >= 1:
        return list(range(len(ious)))
    over = (ious > threshold).cpu().numpy()
    left, kept = np.ones(len(over), dtype=bool), []
    for row in range(len(over)):
        if left[row]:
            kept.append(row)
            left &= ~over[row]
    return kept


def merge_weights(ious: Tensor, scores: Tensor, rows: Tensor, least_iou: float) -> Tensor:
    """Return how much each mask counts in the average that replaces each kept one.

    Args:
        ious: (R, R) float32.
        scores: (R,) float32.
        rows: (n,) int64, the kept ones.
        least_iou: masks of lower IoU do not count.

    Returns:
        (n, R) float32, rows with the sum 1.
    """
    weights = (ious[rows] >= least_iou) * scores
    return weights / weights.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class FoundMasks:
    """Masks that are left.

    Attributes:
        rows: (R,) int64, the seed of each, by falling score.
        maps: from a slice of the R masks to (n, h, w) float32; a mask is where they are above one
            half.
    """

    rows: Tensor
    maps: Callable[[slice], Tensor]


def choose_masks(
    masks: SeedMasks,
    seeds: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    size_hw: tuple[int, int],
    options: MaskOptions,
    limit: int,
    budget_mb: float,
) -> FoundMasks:
    """Drop small masks and duplicates, and merge if so configured.

    Args:
        masks: of all S seeds.
        seeds: (S,) int64 cells.
        scores: (S,) float32.
        classes: (S,) int64.
        size_hw: (h, w).
        options: see ``MaskOptions``.
        limit: most masks that are kept.
        budget_mb: MiB of working memory.
    """
    binary = masks.binary
    if options.parts != "all":
        binary = keep_parts(binary, seeds, size_hw, options.parts)
    rows = (count_pixels(binary) >= options.min_cells).nonzero()[:, 0]
    rows = rows[scores[rows].sort(descending=True, stable=True).indices]
    binary = binary[rows]
    kept = torch.arange(len(rows), device=rows.device)
    if options.mask_nms < 1 or options.merge:
        ious = _ious(binary, classes[rows], budget_mb)
        kept = kept[greedy_keep(ious, options.mask_nms)]
    kept = kept[:limit]
    if options.merge:
        weights = merge_weights(ious, scores[rows], kept, options.merge_iou)
        scale = 0.5 / options.merge_thresh

        def averages(some: slice) -> Tensor:
            return ((weights[some] @ binary.float()) * scale).unflatten(1, size_hw)

        return FoundMasks(rows[kept], averages)
    final, chosen, centred = binary[kept], rows[kept], options.upsample == "centred"
    return FoundMasks(chosen, lambda some: masks.maps(chosen[some], final[some], centred=centred))
