"""Greedy grouping of neighbouring segments into a tree, as selective search does.

The two most similar neighbours are joined, again and again, until one segment is left; every
segment that occurs on the way is a candidate.

Shapes: n segments that the tree grows from, B borders between two of them, F bins of histograms.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from instseg_ext.methods.sds.graph_segments import Edges

__all__ = ["Segments", "Tree", "describe_segments", "group_segments"]

_BINS = 25


@dataclass(frozen=True)
class Segments:
    """What grouping needs to know of n segments.

    Attributes:
        sizes: (n,) float64 pixels.
        boxes: (n, 4) float64 XYXY, far sides exclusive.
        histograms: (n, F) float32 of colours and of gradients, each of the two of sum 1.
        borders: (B, 2) int64 pairs of neighbours.
        contrasts: (B, 2) float64, the sum of the edges across each border and their number.
    """

    sizes: np.ndarray
    boxes: np.ndarray
    histograms: np.ndarray
    borders: np.ndarray
    contrasts: np.ndarray


@dataclass(frozen=True)
class Tree:
    """The segments that were made by joining, in the order of their making.

    Attributes:
        children: (n - 1, 2) int64; from n on, numbers mean earlier results.
        contrast: (n - 1,) float64 mean contrast of the border that vanished.
    """

    children: np.ndarray
    contrast: np.ndarray

    def parents(self) -> np.ndarray:
        """Return (2n - 1,) int64, what each one of the tree became part of, the root itself."""
        num = len(self.children) + 1
        parents = np.full(2 * num - 1, 2 * num - 2)
        parents[self.children] = num + np.arange(num - 1)[:, None]
        return parents

    def leaves(self) -> np.ndarray:
        """Return (2n - 1, n) bool, the segments that each one of the tree consists of."""
        num = len(self.children) + 1
        leaves = np.zeros((2 * num - 1, num), dtype=bool)
        leaves[np.arange(num), np.arange(num)] = True
        for row, (a, b) in enumerate(self.children):
            leaves[num + row] = leaves[a] | leaves[b]
        return leaves


def describe_segments(labels: np.ndarray, colours: np.ndarray, edges: Edges) -> Segments:
    """Measure segments.

    Args:
        labels: (H, W) int64 in [0, n), every number in use.
        colours: (H, W, 3) float32 in 0..255.
        edges: between pixels.
    """
    flat, num = labels.ravel(), int(labels.max(initial=-1)) + 1
    sizes = np.bincount(flat, minlength=num).astype(np.float64)
    height, width = labels.shape
    y, x = np.divmod(np.arange(height * width), max(width, 1))
    order = flat.argsort(kind="stable")
    starts = np.append(0, sizes.cumsum())[:-1].astype(np.int64)
    sides = [
        pick.reduceat(values[order], starts) + far
        for values, pick, far in ((x, np.minimum, 0), (y, np.minimum, 0), (x, np.maximum, 1))
    ]
    sides.append(np.maximum.reduceat(y[order], starts) + 1)
    gradients = [np.gradient(colours, axis=axis) for axis in (0, 1) if labels.shape[axis] > 1]
    histograms = [_histogram(flat, num, colours.reshape(-1, 3))]
    if gradients:
        # Most gradients are small: the root spreads them over the bins.
        turned = [128 + 12 * np.sign(g) * np.sqrt(np.abs(g)) for g in gradients]
        histograms.append(
            _histogram(flat, num, np.concatenate(turned, axis=2).reshape(len(flat), -1))
        )
    between = edges.between(flat)
    low = np.minimum(between.first, between.second)
    pair, place = np.unique(
        low * num + np.maximum(between.first, between.second), return_inverse=True
    )
    contrasts = [np.bincount(place, weights=between.weight), np.bincount(place)]
    return Segments(
        sizes=sizes,
        boxes=np.stack(sides, axis=1).astype(np.float64),
        histograms=np.concatenate(histograms, axis=1),
        borders=np.stack(np.divmod(pair, max(num, 1)), axis=1),
        contrasts=np.stack(contrasts, axis=1).reshape(-1, 2),
    )


def _histogram(flat: np.ndarray, num: int, values: np.ndarray) -> np.ndarray:
    """Return (num, C * bins) float32 histograms of (H * W, C) values in 0..255, of sum 1."""
    bins = np.clip(values * (_BINS / 256), 0, _BINS - 1).astype(np.int64)
    counts = [
        np.bincount(flat * _BINS + channel, minlength=num * _BINS).reshape(num, _BINS)
        for channel in bins.T
    ]
    counts = np.concatenate(counts, axis=1).astype(np.float32)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


class _Grouping:
    """The segments that are left while a tree grows."""

    def __init__(self, segments: Segments, weights: tuple[float, float, float, float]) -> None:
        num = len(segments.sizes)
        self.weights = weights
        self.pixels = float(segments.sizes.sum())
        self.sizes = np.concatenate([segments.sizes, np.zeros(max(num - 1, 0))])
        self.boxes = np.concatenate([segments.boxes, np.zeros((max(num - 1, 0), 4))])
        width = segments.histograms.shape[1]
        self.histograms = np.zeros((len(self.sizes), width), dtype=np.float32)
        self.histograms[:num] = segments.histograms
        # For each segment its neighbours, with the sum and the number of the edges between them.
        self.neighbours: list[dict[int, tuple[float, float]]] = [{} for _ in self.sizes]
        for (a, b), (total, count) in zip(
            segments.borders.tolist(), segments.contrasts.tolist(), strict=True
        ):
            self.neighbours[a][b] = self.neighbours[b][a] = (total, count)

    def similarity(self, a: np.ndarray, b: np.ndarray, contrast: np.ndarray) -> np.ndarray:
        """Compare (P,) segments with (P,) others; (P,) float64, larger is more similar."""
        appearance, size, fill, border = self.weights
        together = self.sizes[a] + self.sizes[b]
        near = np.minimum(self.boxes[a, :2], self.boxes[b, :2])
        far = np.maximum(self.boxes[a, 2:], self.boxes[b, 2:])
        gap = (far - near).prod(axis=-1) - together
        value = size * (1 - together / self.pixels) + fill * (1 - gap / self.pixels)
        if appearance:
            common = np.minimum(self.histograms[a], self.histograms[b]).sum(axis=-1)
            value = value + appearance * common
        return value - border * contrast

    def join(self, a: int, b: int, new: int) -> tuple[float, np.ndarray, np.ndarray]:
        """Make ``new`` of two neighbours.

        Returns:
            the contrast of the border between them; the neighbours of ``new``, and the contrast
            of its border with each.
        """
        total, count = self.neighbours[a].pop(b)
        del self.neighbours[b][a]
        size = self.sizes[a] + self.sizes[b]
        self.sizes[new] = size
        self.histograms[new] = self.histograms[a] * (self.sizes[a] / size) + self.histograms[b] * (
            self.sizes[b] / size
        )
        self.boxes[new, :2] = np.minimum(self.boxes[a, :2], self.boxes[b, :2])
        self.boxes[new, 2:] = np.maximum(self.boxes[a, 2:], self.boxes[b, 2:])
        around = self.neighbours[a]
        for other, (more, number) in self.neighbours[b].items():
            before = around.get(other, (0.0, 0.0))
            around[other] = (before[0] + more, before[1] + number)
        self.neighbours[new] = around
        for other, border in around.items():
            beside = self.neighbours[other]
            beside.pop(a, None)
            beside.pop(b, None)
            beside[new] = border
        self.neighbours[a] = self.neighbours[b] = {}
        others = np.fromiter(around, dtype=np.int64, count=len(around))
        contrast = np.array([more / number for more, number in around.values()])
        return total / count, others, contrast


def group_segments(segments: Segments, weights: tuple[float, float, float, float]) -> Tree:
    """Join the most similar neighbours until one segment is left.

    Args:
        segments: of a connected image.
        weights: of what similarity consists of: common appearance; both being small; filling their
            common box; and, subtracted, the contrast of their border.
    """
    num = len(segments.sizes)
    state = _Grouping(segments, weights)
    a, b = segments.borders.T.reshape(2, -1)
    mean = segments.contrasts[:, 0] / np.maximum(segments.contrasts[:, 1], 1)
    queue = list(zip((-state.similarity(a, b, mean)).tolist(), a.tolist(), b.tolist(), strict=True))
    heapq.heapify(queue)
    gone = np.zeros(len(state.sizes), dtype=bool)
    children, contrasts = [], []
    while queue:
        _, a, b = heapq.heappop(queue)
        if gone[a] or gone[b]:
            continue
        new = num + len(children)
        contrast, others, borders = state.join(a, b, new)
        gone[a] = gone[b] = True
        children.append((a, b))
        contrasts.append(contrast)
        if len(others):
            values = -state.similarity(np.full(len(others), new), others, borders)
            for value, other in zip(values.tolist(), others.tolist(), strict=True):
                heapq.heappush(queue, (value, other, new))
    return Tree(np.array(children, dtype=np.int64).reshape(-1, 2), np.array(contrasts))
