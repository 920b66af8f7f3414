"""Partitions of an image into connected superpixels, and how masks and partitions become one.

Shapes: (H, W) image, n superpixels with the ids 0..n-1, R masks.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from instseg_ext.structures.rle import decode_masks

__all__ = ["connected_parts", "parts_of_masks", "require_scipy"]

# Masks that are decoded at one time.
_DECODED_MB = 64

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
    masks: np.ndarray | Sequence[dict[str, Any]], size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Find the partition of which every mask is a union, exactly.

    Pixels in the same masks form a superpixel, which is then split into connected parts.

    Args:
        masks: (R, H, W) bool or R COCO run-length dictionaries of the image's size.
        size_hw: (H, W) of the image.

    Returns:
        (H, W) int32 superpixels and (n, R) bool, the superpixels that each mask consists of.
    """
    changes = _mask_changes(masks, size_hw)
    pixels = size_hw[0] * size_hw[1]
    # A pixel's signature is the XOR of random numbers of the masks it is in. Passing along the
    # flattened image, it changes where a mask begins or ends. Two neighbours of different
    # membership have the same signature with a chance of 2^-64.
    numbers = np.random.default_rng(_SIGNATURE_SEED).integers(
        0, 2**64, size=len(changes), dtype=np.uint64
    )
    signature = np.zeros(pixels + 1, dtype=np.uint64)
    for number, change in zip(numbers, changes, strict=True):
        signature[change] ^= number
    np.bitwise_xor.accumulate(signature, out=signature)
    superpixels, first = connected_parts(signature[:pixels].reshape(size_hw))
    # First pixels come in rising order, so that a run of a mask covers a range of superpixels.
    edges = np.zeros((len(first) + 1, len(changes)), dtype=np.int8)
    for row, change in enumerate(changes):
        at = np.searchsorted(first, change)
        np.add.at(edges[:, row], at[0::2], 1)
        np.subtract.at(edges[:, row], at[1::2], 1)
    return superpixels, np.cumsum(edges, axis=0, dtype=np.int8)[:-1].astype(bool)


def _mask_changes(
    masks: np.ndarray | Sequence[dict[str, Any]], size_hw: tuple[int, int]
) -> list[np.ndarray]:
    """Return for each mask where its runs begin and end in the flattened image, alternately."""
    pixels = size_hw[0] * size_hw[1]
    if pixels == 0:
        return [np.zeros(0, dtype=np.int64) for _ in masks]
    step = max(1, _DECODED_MB * 2**20 // pixels)
    changes = []
    for start in range(0, len(masks), step):
        piece = masks[start : start + step]
        stack = piece if isinstance(piece, np.ndarray) else decode_masks(piece, size_hw)
        for mask in stack.reshape(len(stack), pixels):
            inner = np.flatnonzero(mask[1:] != mask[:-1]) + 1
            ends = ([0] if mask[0] else [], inner, [pixels] if mask[-1] else [])
            changes.append(np.concatenate(ends).astype(np.int64))
    return changes
