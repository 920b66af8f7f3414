"""Run-length encoding of instance masks, equal to COCO's compressed form but quick on sparse masks.

pycocotools scans every pixel of the image for every mask. Here the tight box of each mask is found
first and only its pixels are scanned, which matters when 100 small objects lie in a large image.

Shapes: N masks, (H, W) image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

__all__ = [
    "decode_compressed_counts",
    "decode_masks",
    "encode_crops",
    "encode_masks",
    "encode_runs",
    "is_rle",
    "rle_boxes",
    "segmentation_rle",
]

_PIECE_BYTES = 2**20


def is_rle(segmentation: object) -> bool:
    """Tell whether ``segmentation`` is a COCO run-length dictionary (compressed or not)."""
    return isinstance(segmentation, Mapping) and {"size", "counts"} <= set(segmentation)


def encode_masks(masks: torch.Tensor | np.ndarray) -> list[dict[str, Any]]:
    """Encode full-image masks as COCO RLE with ``counts`` as text, ready for JSON.

    Args:
        masks: (N, H, W) bool, or any dtype whose non-zero entries are the object; on any device.
            Not modified.

    Returns:
        N dictionaries ``{"size": [H, W], "counts": str}``; the empty list for N = 0.

    Raises:
        ValueError: if ``masks`` does not have three dimensions.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks must have shape (N, H, W), got {tuple(masks.shape)}.")
    stack = masks.detach().cpu().numpy() if isinstance(masks, torch.Tensor) else masks
    if stack.dtype != np.bool_:
        stack = stack != 0
    height, width = stack.shape[1:]
    if len(stack) == 0 or height == 0 or width == 0:
        return [{"size": [height, width], "counts": ""} for _ in stack]
    return encode_crops(stack, (0, 0), (height, width))


def encode_crops(
    crops: np.ndarray, corner: tuple[int, int], size_hw: tuple[int, int]
) -> list[dict[str, Any]]:
    """Encode masks of which a part of the image is given, the rest being background.

    Args:
        crops: (N, h, w) bool, a part of positive size that lies in the image.
        corner: its left and top pixel.
        size_hw: (H, W) of the image.

    Returns:
        As ``encode_masks``.
    """
    lengths = [_run_lengths(crop, corner, size_hw) for crop in crops]
    return _compress(lengths, *size_hw) if lengths else []


def encode_runs(runs: np.ndarray, num: int, size_hw: tuple[int, int]) -> list[dict[str, Any]]:
    """Encode masks that are known as runs of pixels.

    Args:
        runs: (S, 3) int64: index of the mask, first pixel, one past the last pixel; pixels are
            numbered down the columns. Sorted; runs of one mask do not touch.
        num: N masks; those without a run are empty.
        size_hw: (H, W).

    Returns:
        As ``encode_masks``.
    """
    if num == 0:
        return []
    height, width = size_hw
    splits = np.searchsorted(runs[:, 0], np.arange(1, num))
    lengths = []
    for bounds in np.split(runs[:, 1:], splits):
        counts = np.diff(np.concatenate(([0], bounds.ravel(), [height * width])))
        lengths.append(counts if counts[-1] else counts[:-1])
    return _compress(lengths, height, width)


def _compress(lengths: list[np.ndarray], height: int, width: int) -> list[dict[str, Any]]:
    """Compress the run lengths of N masks, background first."""
    plain = [{"size": [height, width], "counts": counts} for counts in lengths]
    encoded = coco_mask.frPyObjects(plain, height, width)
    for rle in encoded:
        rle["size"] = [height, width]
        rle["counts"] = rle["counts"].decode("ascii")
    return encoded


def _run_lengths(crop: np.ndarray, corner: tuple[int, int], size_hw: tuple[int, int]) -> np.ndarray:
    """Give alternating run lengths, background first, of one (h, w) bool crop by column."""
    height, width = size_hw
    box = tight_box(crop)
    if box is None:
        return np.array([height * width], dtype=np.int64)
    left, top, right, bottom = box
    change = _column_changes(crop[top:bottom, left:right])
    column, row = np.divmod(change, bottom - top + 1)
    # A run that reaches the foot of the box ends where the next padded column begins (row 0): row -
    # 1 = -1 must become "bottom of the previous column".
    at_foot = row == 0
    column = column - at_foot
    row = np.where(at_foot, bottom - top, row - 1)
    position = (column + left + corner[0]) * height + row + top + corner[1]
    if bottom - top == height:
        position = _merge_touching(position)
    bounds = np.concatenate(([0], position, [height * width]))
    lengths = np.diff(bounds)
    return lengths if lengths[-1] else lengths[:-1]


def _column_changes(box: np.ndarray) -> np.ndarray:
    """Give where runs start and end, by column, each column of (h, w) with one zero above it.

    The zero separates a column from its neighbour, so that one flat difference finds all runs. Some
    columns at a time: large short-lived arrays between the small lasting results of many masks tear
    the heap into holes that are never given back.
    """
    rows = box.shape[0] + 1
    step = max(1, _PIECE_BYTES // rows)
    parts = []
    for start in range(0, box.shape[1], step):
        piece = box[:, start : start + step]
        padded = np.zeros((piece.shape[1], rows), dtype=np.int8)
        padded[:, 1:] = piece.T
        flat = padded.ravel()
        change = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        if change.size % 2:
            change = np.append(change, flat.size)
        parts.append(change + start * rows)
    return np.concatenate(parts)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Give XYXY, far sides exclusive, of one (H, W) bool mask, or ``None`` if it is empty.

    The first pass goes along memory, whichever axis that is; the second sees a part only.

    Args:
        mask: (H, W) bool; H or W may be 0.

    Returns:
        Left, top, right, bottom in pixels.
    """
    by_column = mask.flags.f_contiguous
    lines = mask.T if by_column else mask
    outer = np.flatnonzero(lines.any(axis=1))
    if outer.size == 0:
        return None
    first, last = int(outer[0]), int(outer[-1]) + 1
    inner = np.flatnonzero(lines[first:last].any(axis=0))
    low, high = int(inner[0]), int(inner[-1]) + 1
    return (first, low, last, high) if by_column else (low, first, high, last)


def _merge_touching(position: np.ndarray) -> np.ndarray:
    """Drop (end, start) pairs that coincide: a run goes on from one column into the next."""
    same = np.flatnonzero(position[1:-1:2] == position[2::2])
    drop = np.concatenate((2 * same + 1, 2 * same + 2))
    return np.delete(position, drop)


def decode_masks(
    rles: Sequence[Mapping[str, Any]], size_hw: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode COCO RLE dictionaries into full-image masks.

    Args:
        rles: N run-length dictionaries of one size; ``counts`` as text, bytes or a list of run
            lengths.
        size_hw: (H, W) of the result when ``rles`` is empty.

    Returns:
        (N, H, W) bool, C-ordered.
    """
    if len(rles) == 0:
        return np.zeros((0, *(size_hw or (0, 0))), dtype=bool)
    packed = [_compressed(rle) for rle in rles]
    stack = coco_mask.decode(packed)  # (H, W, N) uint8, Fortran order: its transpose is contiguous
    return np.ascontiguousarray(stack.transpose(2, 0, 1)).view(bool)


def decode_compressed_counts(counts: str | bytes) -> np.ndarray | None:
    """Decode COCO's run-length string into run lengths.

    A malformed string can make pycocotools write outside its buffer, so strings of unknown origin
    are decoded here first. The code: six bits a character from ASCII 48 on, five of value and one
    "more follows", two's complement; from the fourth run on the difference to the run two before.

    Args:
        counts: the ``counts`` value of a compressed RLE.

    Returns:
        (R,) int64 run lengths starting with background, which may be negative or sum to anything if
        the string is corrupt; None if it is no such string at all.
    """
    raw = counts.encode("ascii", "replace") if isinstance(counts, str) else bytes(counts)
    if not raw:
        return None
    codes = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20:
        return None
    ends = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:  # 60 bits: more cannot be a run length
        return None
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 0x1F) << shift, starts)
    negative = (codes[ends] & 0x10) != 0
    values = np.where(negative, values - (np.int64(1) << (5 * lengths)), values)
    runs = values.copy()
    runs[1::2] = np.cumsum(values[1::2])
    runs[2::2] = np.cumsum(values[2::2])
    return runs


def rle_boxes(rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Give the tight boxes of run-length encoded masks without decoding them.

    Args:
        rles: N run-length dictionaries.

    Returns:
        (N, 4) int64 XYXY, the far sides exclusive; zeros for an empty mask.
    """
    if len(rles) == 0:
        return np.zeros((0, 4), dtype=np.int64)
    xywh = np.asarray(coco_mask.toBbox([_compressed(rle) for rle in rles])).reshape(-1, 4)
    corners = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1).round()
    return corners.astype(np.int64) * (xywh[:, 2:].prod(axis=1, keepdims=True) > 0)


def segmentation_rle(segmentation: Any, height: int, width: int) -> dict[str, Any] | None:
    """Bring a COCO ``segmentation`` of any form to compressed RLE.

    Args:
        segmentation: list of polygons ``[x0, y0, x1, y1, ...]``, or run lengths.
        height: of the image.
        width: of the image.

    Returns:
        The run lengths, or ``None`` where there is no outline: nothing at all, or polygons of
        fewer than three points only.
    """
    if isinstance(segmentation, Mapping):
        return _compressed(segmentation) if segmentation else None
    polygons = [polygon for polygon in segmentation or [] if len(polygon) >= 6]
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)) if polygons else None


def _compressed(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Bring text, bytes or listed counts into the compressed form that pycocotools decodes."""
    if isinstance(rle["counts"], (list, tuple)):
        height, width = rle["size"]
        return coco_mask.frPyObjects(
            {"size": [height, width], "counts": list(rle["counts"])}, height, width
        )
    return {"size": list(rle["size"]), "counts": rle["counts"]}
