"""Segmentations carried through a geometric transform, as masks of their own small boxes.

An object covers a few percent of a large picture: drawing, copying and scanning a mask of the whole
picture for each takes most of the time a loader spends on annotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from detectron2.data import transforms as T
from pycocotools import mask as mask_util

from instseg_ext.data.segmentation import decode_compressed_counts, decode_masks
from instseg_ext.structures.rle import rle_boxes

__all__ = ["MaskCrop", "transform_mask_crops"]


class MaskCrop(NamedTuple):
    """A part of an image that holds all pixels of a mask.

    Attributes:
        left: first column in the image.
        top: first row.
        pixels: (h, w) bool; h and w are 0 for an empty mask.
    """

    left: int
    top: int
    pixels: np.ndarray

    def paste(self, canvas: np.ndarray) -> None:
        """Write the mask into an (H, W) bool image of zeros."""
        height, width = self.pixels.shape
        canvas[self.top : self.top + height, self.left : self.left + width] = self.pixels


def transform_mask_crops(
    segmentations: Sequence[list | dict | np.ndarray],
    transforms: T.TransformList,
    source_hw: tuple[int, int],
    size_hw: tuple[int, int],
) -> list[MaskCrop]:
    """Carry segmentations through a geometric transform.

    Args:
        segmentations: M polygon lists, RLE dictionaries or (H, W) arrays, mixed as they come.
            Polygons are moved and then drawn, the others resampled to the nearest pixel.
        transforms: from the source image to the result.
        source_hw: height and width of the source image.
        size_hw: height and width of the result.

    Returns:
        M crops of the result, the polygons' as small as possible.
    """
    polygons = [i for i, s in enumerate(segmentations) if isinstance(s, (list, tuple))]
    rasters = [i for i, s in enumerate(segmentations) if not isinstance(s, (list, tuple))]
    crops: dict[int, MaskCrop] = {}
    if polygons:
        moved = _transform_polygons([segmentations[i] for i in polygons], transforms)
        rles = [_draw(parts, size_hw) for parts in moved]
        crops.update(zip(polygons, _decode_crops(rles), strict=True))
    if rasters:
        source = decode_masks([segmentations[i] for i in rasters], source_hw)
        full = _resample(source, transforms)
        crops.update((i, MaskCrop(0, 0, mask)) for i, mask in zip(rasters, full, strict=True))
    return [crops[i] for i in range(len(segmentations))]


def _transform_polygons(
    polygons: list[Sequence[Sequence[float]]], transforms: T.TransformList
) -> list[list[np.ndarray]]:
    """Transform the points of all polygons of an image in one call."""
    # Not apply_polygons: detectron2's crop needs shapely there, and drawing cuts at the border
    # anyway.
    flat = [np.asarray(p, dtype=np.float64).reshape(-1, 2) for parts in polygons for p in parts]
    moved = transforms.apply_coords(np.concatenate(flat))
    pieces = iter(np.split(moved, np.cumsum([len(p) for p in flat])[:-1]))
    return [[next(pieces) for _ in parts] for parts in polygons]


def _draw(polygons: list[np.ndarray], size_hw: tuple[int, int]) -> dict:
    """Draw the union of (P, 2) polygons as run lengths, which takes no pixel of the image."""
    flat = [polygon.reshape(-1).tolist() for polygon in polygons]
    return mask_util.merge(mask_util.frPyObjects(flat, *size_hw))


def _decode_crops(rles: list[dict]) -> list[MaskCrop]:
    """Decode run lengths inside their boxes only."""
    crops = []
    for rle, (x0, y0, x1, y1) in zip(rles, rle_boxes(rles).tolist(), strict=True):
        height = rle["size"][0]
        ends = np.cumsum(decode_compressed_counts(rle["counts"])).clip(x0 * height, x1 * height)
        lengths = np.diff(ends, prepend=x0 * height)
        inside = np.arange(len(lengths)) % 2 == 1
        columns = np.repeat(inside, lengths).reshape(x1 - x0, height)
        crops.append(MaskCrop(x0, y0, columns.T[y0:y1]))
    return crops


def _resample(source: np.ndarray, transforms: T.TransformList) -> np.ndarray:
    """Carry (M, H, W) masks through a transform, to the nearest pixel.

    An image that numbers the source pixels is transformed once, and all masks are read through it.
    Its numbers are spread over four uint8 channels, because only uint8 images are resized about
    pixel centres by detectron2; number 0 marks what a transform padded.
    """
    count, height, width = source.shape
    numbers = np.arange(1, height * width + 1, dtype="<u4").reshape(height, width)
    channels = numbers.view(np.uint8).reshape(height, width, 4)
    moved = np.ascontiguousarray(transforms.apply_segmentation(channels))
    lookup = moved.view("<u4")[..., 0]
    lookup = np.where(lookup > height * width, 0, lookup)  # padding in another value than 0
    table = np.zeros((count, height * width + 1), dtype=bool)
    table[:, 1:] = source.reshape(count, -1)
    return table[:, lookup]
