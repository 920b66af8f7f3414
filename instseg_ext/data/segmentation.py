"""Validity and decoding of COCO segmentations: polygons, compressed and uncompressed run lengths.

A size is (height, width) in pixels; polygons are flat lists [x0, y0, x1, y1, ...] in image pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_util

from instseg_ext.structures.rle import decode_compressed_counts

__all__ = [
    "as_rle",
    "clean_segmentation",
    "compress_rle",
    "decode_compressed_counts",
    "decode_masks",
    "polygon_problem",
    "rasterise_polygons",
    "rle_problem",
]


def rle_problem(rle: object, size_hw: tuple[int, int]) -> str | None:
    """Say what is wrong with a run-length mask, None if it can be decoded to the image's size.

    Args:
        rle: value of ``segmentation``; anything but a well-formed dictionary is a problem.
        size_hw: height and width of the image.
    """
    if not isinstance(rle, dict) or "counts" not in rle or "size" not in rle:
        return "RLE without counts and size"
    size = rle["size"]
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return f"RLE with size {size!r}"
    if tuple(size) != tuple(size_hw):
        return f"RLE of size {list(size)} in an image of size {list(size_hw)}"
    counts = rle["counts"]
    if isinstance(counts, (str, bytes)):
        runs = decode_compressed_counts(counts)
        if runs is None:
            return "undecodable RLE string"
    else:
        try:
            runs = np.asarray(counts, dtype=np.int64)
        except (TypeError, ValueError, OverflowError):
            return "RLE counts that are not integers"
        if runs.ndim != 1 or not len(runs):
            return "RLE without counts"
    if (runs < 0).any():
        return "RLE with negative counts"
    total = int(runs.sum())
    if total != size[0] * size[1]:
        return f"RLE whose counts add up to {total}, not to {size[0]} x {size[1]}"
    return None


def compress_rle(rle: dict) -> dict:
    """Return a valid RLE in compressed form with a string of ASCII characters."""
    if not isinstance(rle["counts"], (str, bytes)):
        rle = mask_util.frPyObjects(rle, *rle["size"])
    counts = rle["counts"]
    return {
        "size": [int(v) for v in rle["size"]],
        "counts": counts if isinstance(counts, str) else counts.decode("ascii"),
    }


def polygon_problem(polygon: object) -> str | None:
    """Say what is wrong with one part of a ``segmentation``, None if it can be drawn."""
    if not isinstance(polygon, (list, tuple, np.ndarray)):
        return f"polygon that is a {type(polygon).__name__}"
    if len(polygon) % 2:
        return "polygon with an odd number of coordinates"
    if len(polygon) < 6:
        return "polygon with fewer than 3 points"
    try:
        # NaN and infinity survive a sum; much quicker than asking of each coordinate.
        finite = math.isfinite(sum(polygon))
    except (TypeError, OverflowError):
        return "polygon with coordinates that are not numbers"
    return None if finite else "polygon with NaN or infinite coordinates"


def clean_segmentation(
    segmentation: object, size_hw: tuple[int, int]
) -> tuple[list | dict | None, list[str]]:
    """Keep the usable parts of a segmentation.

    Args:
        segmentation: polygons, compressed or uncompressed RLE, or anything a file may hold.
        size_hw: height and width of the image.

    Returns:
        polygons (list of lists) or compressed RLE, None if nothing is usable; and what was wrong.
    """
    if isinstance(segmentation, dict):
        problem = rle_problem(segmentation, size_hw)
        return (None, [problem]) if problem else (compress_rle(segmentation), [])
    if not isinstance(segmentation, (list, tuple)) or not len(segmentation):
        return None, ["no segmentation"]
    if isinstance(segmentation[0], (int, float)):
        segmentation = [segmentation]  # one flat polygon: a common slip, and unambiguous
    parts, problems = [], []
    for part in segmentation:
        problem = polygon_problem(part)
        if problem:
            problems.append(problem)
        else:
            parts.append(part if isinstance(part, list) else list(part))
    return parts or None, problems


def decode_masks(
    segmentations: Sequence[list | dict | np.ndarray], size_hw: tuple[int, int]
) -> np.ndarray:
    """Rasterise clean segmentations of one image.

    Args:
        segmentations: M polygon lists (their union is drawn), RLE dictionaries as
            :func:`clean_segmentation` gives them, or (H, W) arrays.
        size_hw: height and width of the image.

    Returns:
        (M, H, W) bool.
    """
    masks = np.zeros((len(segmentations), *size_hw), dtype=bool)
    for i, segmentation in enumerate(segmentations):
        if isinstance(segmentation, dict):
            masks[i] = mask_util.decode(compress_rle(segmentation))
        elif isinstance(segmentation, np.ndarray):
            masks[i] = segmentation != 0
        else:
            masks[i] = rasterise_polygons(segmentation, *size_hw)
    return masks


def rasterise_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Draw the union of polygons into a (H, W) uint8 mask of 0 and 1; parts outside are cut off."""
    flat = [np.asarray(p, dtype=np.float64).reshape(-1).tolist() for p in polygons]
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(flat, height, width)))


def as_rle(segmentation: list | dict, size_hw: tuple[int, int]) -> dict:
    """Turn a clean segmentation into compressed RLE."""
    if isinstance(segmentation, dict):
        return segmentation
    return mask_util.merge(mask_util.frPyObjects(segmentation, *size_hw))
