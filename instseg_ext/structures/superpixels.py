"""Partitions of an image into connected superpixels, and how masks and partitions become one.

Shapes: (H, W) image, n superpixels with the ids 0..n-1, R masks.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from instseg_ext.structures.rle import decode_compressed_counts

__all__ = ["connected_parts", "parts_of_masks", "require_scipy"]

# Seed of the numbers by which pixels of different membership are told apart.
_SIGNATURE_SEED = 20140907


def require_scipy(name: str) -> ModuleType:
    """Import a module of scipy.

    Args:
        name: such as ``"scipy.sparse"``.

    Raises:
        ImportError: naming the extra that brings scipy.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            "Region proposals need the package scipy: pip install 'instseg_ext[sds]' or scipy "
            f"({error})."
        ) from error


def connected_parts(*maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split an image into the largest connected parts inside which every map is constant.

    Neighbours are the eight around a pixel, as in the authors' code.

    Args:
        maps: one or more (H, W) arrays of any integer type.

    Returns:
        (H, W) int32 part of each pixel, numbered in the order in which reading line by line meets
        them, and (n,) int64 the first pixel of each part, in the flattened image.
    """
    height, width = maps[0].shape
    if height * width == 0:
        return np.zeros((height, width), dtype=np.int32), np.zeros(0, dtype=np.int64)
    runs, first = _runs_of_lines(maps)
    links = _links_between_lines(maps, runs)
    sparse = require_scipy("scipy.sparse")
    graph = sparse.coo_array(
        (np.ones(len(links), dtype=np.int8), (links[:, 0], links[:, 1])),
        shape=(len(first), len(first)),
    )
    components = require_scipy("scipy.sparse.csgraph").connected_components(graph, directed=False)
    # Whatever order scipy numbers them in, here they are numbered by their first run.
    _, leader, part = np.unique(components[1], return_index=True, return_inverse=True)
    order = leader.argsort()
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[part].astype(np.int32)[runs], first[leader[order]]


def _runs_of_lines(maps: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Number the runs of equal pixels of each line.

    Returns:
        (H, W) int64 run of each pixel and the first pixel of each run, in the flattened image.
    """
    starts = np.zeros(maps[0].shape, dtype=bool)
    starts[:, 0] = True
    for values in maps:
        starts[:, 1:] |= values[:, 1:] != values[:, :-1]
    return starts.cumsum().reshape(starts.shape) - 1, np.flatnonzero(starts)


def _links_between_lines(maps: Sequence[np.ndarray], runs: np.ndarray) -> np.ndarray:
    """Return (L, 2) pairs of runs of neighbouring lines that touch and are equal."""
    width = runs.shape[1]
    pairs = []
    for shift in (-1, 0, 1):
        above = (slice(None, -1), slice(max(shift, 0), width + min(shift, 0)))
        below = (slice(1, None), slice(max(-shift, 0), width + min(-shift, 0)))
        equal = np.ones(runs[above].shape, dtype=bool)
        for values in maps:
            equal &= values[above] == values[below]
        upper, lower = runs[above][equal], runs[below][equal]
        # Long runs touch at many pixels: one link will do.
        new = np.ones(len(upper), dtype=bool)
        new[1:] = (upper[1:] != upper[:-1]) | (lower[1:] != lower[:-1])
        pairs.append(np.stack([upper[new], lower[new]], axis=1))
    return np.concatenate(pairs)


def parts_of_masks(
    masks: np.ndarray | Sequence[Mapping[str, Any]], size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Find the partition of which every mask is a union, exactly.

    Pixels in the same masks form a superpixel, which is then split into connected parts. Only the
    ends of runs are looked at, no mask is decoded.

    Args:
        masks: (R, H, W) bool or R COCO run-length dictionaries of the image's size.
        size_hw: (H, W) of the image.

    Returns:
        (H, W) int32 superpixels and (n, R) bool, the superpixels that each mask consists of.

    Raises:
        ValueError: if a mask is damaged.
    """
    height, width = size_hw
    changes = [_changes(mask, size_hw) for mask in masks]
    # Down the columns, as run lengths go. A pixel's signature is the XOR of random numbers of the
    # masks it is in: it changes where a mask begins or ends. Two neighbours of different membership
    # have the same signature with a chance of 2^-64.
    numbers = np.random.default_rng(_SIGNATURE_SEED).integers(
        0, 2**64, size=len(changes), dtype=np.uint64
    )
    signature = np.zeros(height * width + 1, dtype=np.uint64)
    for number, change in zip(numbers, changes, strict=True):
        np.bitwise_xor.at(signature, change, number)
    np.bitwise_xor.accumulate(signature, out=signature)
    superpixels, first = connected_parts(signature[:-1].reshape(width, height))
    # First pixels come in rising order, so that a run of a mask covers a range of superpixels.
    edges = np.zeros((len(changes), len(first) + 1), dtype=np.int32)
    for row, change in zip(edges, changes, strict=True):
        at = np.searchsorted(first, change)
        np.add.at(row, at[0::2], 1)
        np.subtract.at(row, at[1::2], 1)
    members = edges.cumsum(axis=1)[:, :-1].T.astype(bool)
    return np.ascontiguousarray(superpixels.T), members


def _changes(mask: np.ndarray | Mapping[str, Any], size_hw: tuple[int, int]) -> np.ndarray:
    """Return where the runs of a mask begin and end, alternately, counted down the columns."""
    pixels = size_hw[0] * size_hw[1]
    if isinstance(mask, np.ndarray):
        flat = np.concatenate([[False], mask.T.astype(bool).ravel(), [False]])
        return np.flatnonzero(flat[1:] != flat[:-1])
    counts = mask["counts"]
    if isinstance(counts, (str, bytes)):
        runs = decode_compressed_counts(counts) if len(counts) else np.zeros(0, dtype=np.int64)
    else:
        runs = np.asarray(counts, dtype=np.int64)
    if runs is None or runs.min(initial=0) < 0 or runs.sum() != pixels:
        raise ValueError(f"A run-length mask of an image of size {size_hw} is damaged.")
    ends = runs.cumsum()
    # An even number of ends: the mask begins and ends outside.
    return ends if len(ends) % 2 == 0 else ends[:-1]
