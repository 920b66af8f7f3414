"""Square windows of images and masks, resized to patches.

A window may lie anywhere, also between pixels and outside the image. It is resized as the authors'
library does (Torch7's ``image.scale``): enlarged with corners aligned, linearly, so that the first
and the last sample are the window's first and last pixel; reduced by the exact average of each
sample's area. Only pixels inside the image are read.

Shapes: H x W image of C channels, P side of the patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as mask_util
from torch import Tensor
from torch.nn import functional as F

from instseg_ext.structures.rle import decode_masks

__all__ = ["PAD_VALUE", "Window", "crop_image", "crop_segmentation"]

# What a patch shows outside its image, on the scale from 0 to 255.
PAD_VALUE = 127.5


class Window(NamedTuple):
    """A square in an image.

    Attributes:
        left: continuous pixels; pixel k covers [k, k + 1).
        top: likewise.
        side: positive.
    """

    left: float
    top: float
    side: float

    @classmethod
    def around(cls, x: float, y: float, side: float) -> Window:
        """Return the window with a given centre."""
        return cls(x - side / 2, y - side / 2, side)

    def inner(self, side: float) -> Window:
        """Return the window of another side with the same centre."""
        margin = (self.side - side) / 2
        return Window(self.left + margin, self.top + margin, side)


class _Taps(NamedTuple):
    """Which pixels of an axis make up each sample.

    Attributes:
        first: the first pixel that is used; one past the last is ``stop``.
        stop: see there.
        pixels: (K,) int64, counted from ``first``, sample by sample.
        weights: (K,) float32; those of a sample add up to 1, less what lies outside the image.
        offsets: (P,) int64, where the pixels of each sample begin.
    """

    first: int
    stop: int
    pixels: Tensor
    weights: Tensor
    offsets: Tensor


def _taps(start: float, side: float, size: int, length: int) -> _Taps:
    """Find the pixels of each sample along one axis.

    Args:
        start: where the window begins.
        side: of the window.
        size: P.
        length: pixels of the image.
    """
    if side <= size:
        place = start + np.arange(size) * ((side - 1) / max(size - 1, 1))
        low = np.floor(place)
        pixels = (low[:, None] + [0, 1]).ravel().astype(np.int64)
        weights = np.stack([low + 1 - place, place - low], axis=1).ravel()
        sample = np.repeat(np.arange(size), 2)
    else:
        border = start + np.arange(size + 1) * (side / size)
        low = np.floor(border[:-1]).astype(np.int64)
        counts = np.ceil(border[1:]).astype(np.int64) - low
        sample = np.repeat(np.arange(size), counts)
        pixels = np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(len(sample))
        covered = np.minimum(pixels + 1, border[sample + 1]) - np.maximum(pixels, border[sample])
        weights = covered * (size / side)
    used = (pixels >= 0) & (pixels < length) & (weights > 0)
    pixels, weights, sample = pixels[used], weights[used], sample[used]
    first, stop = (int(pixels.min()), int(pixels.max()) + 1) if len(pixels) else (0, 0)
    return _Taps(
        first,
        stop,
        torch.from_numpy(pixels - first),
        torch.from_numpy(weights.astype(np.float32)),
        torch.from_numpy(np.searchsorted(sample, np.arange(size))),
    )


def _resample(image: np.ndarray, window: Window, size: int, outside: float) -> Tensor:
    """Resize a window of an (H, W, C) image to (C, P, P) float32; see the module."""
    rows = _taps(window.top, window.side, size, image.shape[0])
    columns = _taps(window.left, window.side, size, image.shape[1])
    channels = image.shape[2]
    if rows.stop == 0 or columns.stop == 0:
        return torch.full((channels, size, size), outside)
    region = image[rows.first : rows.stop, columns.first : columns.stop]
    # Relative to the value outside, which then needs no pixels.
    values = torch.from_numpy(np.ascontiguousarray(region)).float().sub_(outside)
    height, width = values.shape[:2]
    # Weighted sums of whole rows are what an embedding bag computes, several times as fast as a
    # product with a matrix that is nearly all zeros.
    values = _weigh(values.view(height, width * channels), rows)
    values = values.view(size, width, channels).permute(1, 2, 0)
    values = _weigh(values.reshape(width, channels * size), columns)
    return values.view(size, channels, size).permute(1, 2, 0).contiguous().add_(outside)


def _weigh(lines: Tensor, taps: _Taps) -> Tensor:
    """Return (P, K) weighted sums of (L, K) lines."""
    return F.embedding_bag(
        taps.pixels, lines, taps.offsets, mode="sum", per_sample_weights=taps.weights
    )


def crop_image(image: np.ndarray, window: Window, size: int) -> Tensor:
    """Resize a window of an image.

    Args:
        image: (H, W, C) uint8 or float32, from 0 to 255; not modified.
        window: in pixels of ``image``.
        size: P.

    Returns:
        (C, P, P) float32, not rounded; ``PAD_VALUE`` outside the image.
    """
    return _resample(image, window, size, PAD_VALUE)


def crop_segmentation(
    segmentation: list | dict | np.ndarray, window: Window, size: int, image_hw: tuple[int, int]
) -> Tensor:
    """Draw a window of an object's mask.

    Polygons are moved, scaled and drawn at the size of the result, so that the time does not
    depend on the image's size. Other masks are resized like images; more than one half is
    foreground.

    Args:
        segmentation: polygons, run lengths or an (H, W) array, as data set dictionaries have them.
        window: in pixels of the image.
        size: P.
        image_hw: (H, W).

    Returns:
        (P, P) bool; False outside the image.
    """
    if isinstance(segmentation, (list, tuple)):
        return _draw(segmentation, window, size)
    mask = decode_masks([segmentation])[0] if isinstance(segmentation, dict) else segmentation
    if mask.shape != tuple(image_hw):
        raise ValueError(
            f"A mask of {mask.shape[1]} x {mask.shape[0]} pixels does not belong to an image of "
            f"{image_hw[1]} x {image_hw[0]}."
        )
    pixels = np.ascontiguousarray(mask, dtype=bool).view(np.uint8)[..., None]
    return _resample(pixels, window, size, 0.0)[0] > 0.5


def _draw(polygons: Sequence[Sequence[float]], window: Window, size: int) -> Tensor:
    """Draw the union of polygons, each a list x0, y0, x1, y1, ..., in a window."""
    corner = np.array([window.left, window.top])
    moved = [
        ((np.reshape(polygon, (-1, 2)) - corner) * (size / window.side)).ravel().tolist()
        for polygon in polygons
    ]
    rle = mask_util.merge(mask_util.frPyObjects(moved, size, size))
    return torch.from_numpy(mask_util.decode(rle).astype(bool))
