"""Graph-based segmentation (Felzenszwalb and Huttenlocher, IJCV 2004) with numpy and scipy.

The original tries all edges from light to heavy. Here only those of the minimum spanning tree are
tried: another one could join what the tree's lighter edges between its ends did not, which is rare.

Shapes: (H, W) image, E edges between its N = H * W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from instseg_ext.structures.superpixels import require_scipy

__all__ = ["Edges", "graph_segments", "pixel_edges"]

# Rounds in which many edges are decided at once, before the loop that takes one after the other.
_ROUNDS = 6


@dataclass(frozen=True)
class Edges:
    """E edges between neighbouring pixels, or between the segments they lie in.

    Attributes:
        first: (E,) int64 pixel.
        second: (E,) int64 pixel.
        weight: (E,) float32.
    """

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray

    def between(self, labels: np.ndarray) -> Edges:
        """Return the edges that connect different segments, whose numbers take the pixels' place.

        Args:
            labels: (N,) int segment of each pixel.
        """
        first, second = labels[self.first], labels[self.second]
        keep = first != second
        return Edges(first[keep], second[keep], self.weight[keep])


def pixel_edges(features: np.ndarray) -> Edges:
    """Connect each pixel with its eight neighbours, weighted by the distance of their features.

    Args:
        features: (H, W, C) float32.
    """
    height, width = features.shape[:2]
    number = np.arange(height * width).reshape(height, width)
    first, second, weight = [], [], []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = (slice(0, height - dy), slice(max(-dx, 0), width - max(dx, 0)))
        there = (slice(dy, height), slice(max(dx, 0), width + min(dx, 0)))
        first.append(number[here].ravel())
        second.append(number[there].ravel())
        difference = features[here] - features[there]
        weight.append(np.sqrt(np.einsum("hwc,hwc->hw", difference, difference)).ravel())
    return Edges(*map(np.concatenate, (first, second, weight)))


def graph_segments(edges: Edges, num: int, scale: float, min_size: float) -> np.ndarray:
    """Join pixels to segments whose border is heavier than what holds each of them together.

    From the lightest edge to the heaviest, the components on both sides are joined if the edge
    weighs no more than the heaviest edge inside each, plus ``scale`` divided by its pixels. What is
    too small in the end joins the neighbour across its lightest edge.

    Args:
        edges: of a connected image.
        num: N.
        scale: k of the paper, in units of the weights; larger makes larger segments.
        min_size: of a segment, in pixels.

    Returns:
        (N,) int64 segment of each pixel, numbered from 0 as reading line by line meets them.
    """
    tree = _spanning_tree(edges, num)
    label, sizes, limits = np.arange(num), np.ones(num), np.full(num, float(scale))
    for _ in range(_ROUNDS):
        step, sizes, limits = _join_pairs(tree, sizes, limits, scale)
        label, tree = step[label], tree.between(step)
    parent, pixels, limit = list(range(len(sizes))), sizes.tolist(), limits.tolist()

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    refused = []
    columns = (tree.first.tolist(), tree.second.tolist(), tree.weight.tolist())
    for a, b, weight in zip(*columns, strict=True):
        a, b = root(a), root(b)
        if weight <= limit[a] and weight <= limit[b]:
            parent[b] = a
            pixels[a] += pixels[b]
            limit[a] = weight + scale / pixels[a]
        else:
            refused.append((a, b))
    for a, b in refused:
        a, b = root(a), root(b)
        if pixels[a] < min_size or pixels[b] < min_size:
            parent[b] = a
            pixels[a] += pixels[b]
    roots = np.array([root(node) for node in range(len(parent))], dtype=np.int64)
    return _numbered_as_met(roots[label])


def _numbered_as_met(label: np.ndarray) -> np.ndarray:
    """Give the values of (N,) ints in [0, N) the numbers 0, 1, ... in the order of their coming."""
    numbers = np.arange(len(label))
    first = np.full(len(label), len(label))
    # Of several values for one place, the last one written stays.
    first[label[::-1]] = numbers[::-1]
    used = np.flatnonzero(first < len(label))
    rank = np.empty(len(label), dtype=np.int64)
    rank[used[first[used].argsort()]] = numbers[: len(used)]
    return rank[label]


def _join_pairs(
    tree: Edges, sizes: np.ndarray, limits: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join components whose lightest edge is the same one, as the loop over all edges would.

    No other edge can change either of the two before that one has its turn.

    Args:
        tree: edges between components, lightest first.
        sizes: (n,) pixels of each component.
        limits: (n,) the heaviest edge inside each plus its allowance.
        scale: as in ``graph_segments``.

    Returns:
        (n,) int64 new number of each component; sizes and limits of the new ones.
    """
    numbers = np.arange(len(tree.weight))
    lightest = np.full((2, len(sizes)), len(numbers))
    for side, nodes in zip(lightest, (tree.first, tree.second), strict=True):
        side[nodes[::-1]] = numbers[::-1]
    lightest = lightest.min(axis=0)
    a, b, weight = tree.first, tree.second, tree.weight.astype(np.float64)
    join = (lightest[a] == numbers) & (lightest[b] == numbers)
    join &= weight <= np.minimum(limits[a], limits[b])
    a, b, weight = a[join], b[join], weight[join]
    sizes, limits, target = sizes.copy(), limits.copy(), np.arange(len(sizes))
    sizes[a] += sizes[b]
    limits[a] = weight + scale / sizes[a]
    target[b] = a
    left = np.ones(len(sizes), dtype=bool)
    left[b] = False
    return (left.cumsum() - 1)[target], sizes[left], limits[left]


def _spanning_tree(edges: Edges, num: int) -> Edges:
    """Return the edges of the minimum spanning tree, lightest first.

    Among equal weights the earlier edge counts as the lighter one, so that the tree does not depend
    on how scipy sorts.
    """
    # Bits of floats that are not negative sort as the floats do, and without ties sorting is quick.
    bits = edges.weight.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys = np.sort(bits | np.arange(len(bits), dtype=np.uint64))
    order = (keys & np.uint64(2**32 - 1)).astype(np.int64)
    rank = np.empty(len(order))
    rank[order] = np.arange(1, len(order) + 1)
    graph = require_scipy("scipy.sparse").coo_array(
        (rank, (edges.first, edges.second)), shape=(num, num)
    )
    csgraph = require_scipy("scipy.sparse.csgraph")
    ranks = np.sort(csgraph.minimum_spanning_tree(graph.tocsr()).data)
    chosen = order[ranks.astype(np.int64) - 1]
    return Edges(edges.first[chosen], edges.second[chosen], edges.weight[chosen])
