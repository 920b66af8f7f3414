"""Region proposals without any trained model: what SDS starts from when there is nothing better.

Segments of the image in two colour spaces grow together into trees, by four notions of similarity
each; every segment that occurs in a tree is a proposal. It stands in for MCG, which has no Python
code, with clearly lower recall.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from instseg_ext.methods.sds.graph_segments import graph_segments, pixel_edges
from instseg_ext.methods.sds.grouping import describe_segments, group_segments
from instseg_ext.structures.region_proposals import RegionProposals
from instseg_ext.structures.superpixels import connected_parts, require_scipy

__all__ = ["propose_regions"]

# What two neighbours are compared by: appearance, both being small, filling their common box, and,
# subtracted, the contrast of their border. The first two are selective search's; by contrast, round
# things on a quiet background are found much better.
_SIMILARITIES = (
    (2.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, 1.0, 0.0),
    (0.0, 0.5, 0.5, 0.02),
    (0.0, 0.3, 0.0, 0.02),
)

_SIGMA = 0.8  # of the smoothing before the segmentation, in pixels
_SCALE = 50.0  # k of the segmentation in an image of _USUAL_PIXELS
_USUAL_PIXELS = 500 * 375
# Larger images are segmented at about this size: time goes with the number of pixels.
_MAX_PIXELS = 320_000

# Of a segment, in shares of the image's pixels.
_MIN_SEGMENT, _MIN_REGION, _MAX_REGION = 0.0003, 0.001, 0.9
# The same in pixels: what is smaller has no shape; more are never needed.
_SEGMENT_PIXELS = (8, 100)
_REGION_PIXELS = 12

# A region that makes up more of its parent than this is too much like it.
_ALIKE = 0.9


@dataclass(frozen=True)
class _Candidates:
    """Regions that grew from one segmentation.

    Attributes:
        labels: (H, W) int64 segment of each pixel.
        leaves: (C, n) bool, the segments of each region.
        badness: (C,) float64, lower is better.
    """

    labels: np.ndarray
    leaves: np.ndarray
    badness: np.ndarray


def propose_regions(
    image_rgb: np.ndarray, max_regions: int = 2000, seed: int = 0
) -> RegionProposals:
    """Propose regions that may be objects.

    Args:
        image_rgb: (H, W, 3) uint8.
        max_regions: most regions to return.
        seed: of the order in which they come, which is random in part, as in selective search.

    Returns:
        At most ``max_regions`` regions, best first, scores falling from 1; none where the image
        shows nothing, or has no pixels. The same for the same image and seed.

    Raises:
        ValueError: if the image has another form.
        ImportError: without scipy.
    """
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8:
        raise ValueError(
            f"Regions are proposed for (H, W, 3) uint8 images, not for {image_rgb.dtype} of shape "
            f"{image_rgb.shape}."
        )
    height, width = image_rgb.shape[:2]
    if height * width == 0:
        return RegionProposals.from_masks([], size_hw=(height, width))
    image = _shrunk(image_rgb)
    rng = np.random.default_rng(seed)
    lab = cv2.cvtColor(image / np.float32(255), cv2.COLOR_RGB2LAB) * np.float32(2.55)
    found = [_candidates(colours, rng) for colours in (lab, image.astype(np.float32))]
    parts, first = connected_parts(*(one.labels for one in found))
    members = np.concatenate([one.leaves[:, one.labels.ravel()[first]].T for one in found], axis=1)
    order = np.concatenate([one.badness for one in found]).argsort(kind="stable")
    members = members[:, _first_of_equals(members, order)[:max_regions]]
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    scores = 1 - np.arange(members.shape[1]) / max(members.shape[1], 1)
    return RegionProposals.merged(parts[rows[:, None], columns], members, scores)


def _shrunk(image: np.ndarray) -> np.ndarray:
    """Return the image, smaller if it is large."""
    height, width = image.shape[:2]
    factor = (_MAX_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return image
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _candidates(colours: np.ndarray, rng: np.random.Generator) -> _Candidates:
    """Segment an image (H, W, 3) float32 of one colour space and group the segments."""
    height, width = colours.shape[:2]
    pixels = height * width
    gaussian = require_scipy("scipy.ndimage").gaussian_filter
    edges = pixel_edges(gaussian(colours, (_SIGMA, _SIGMA, 0)))
    scale = _SCALE * (pixels / _USUAL_PIXELS) ** 0.5
    min_size = np.clip(pixels * _MIN_SEGMENT, *_SEGMENT_PIXELS)
    labels = graph_segments(edges, pixels, scale, min_size).reshape(height, width)
    segments = describe_segments(labels, colours, edges)
    leaves, badness = [], []
    for weights in _SIMILARITIES:
        tree = group_segments(segments, weights)
        members = tree.leaves()
        sizes, parent = members @ segments.sizes, tree.parents()
        contrast = np.concatenate([np.zeros(len(segments.sizes)), tree.contrast])[parent]
        # Late ones are large and few; selective search draws them before the many small ones.
        rank = np.arange(len(sizes), 0, -1) * rng.random(len(sizes)) / (1 + contrast)
        keep = (
            (sizes >= max(pixels * _MIN_REGION, _REGION_PIXELS))
            & (sizes <= pixels * _MAX_REGION)
            & (sizes <= sizes[parent] * _ALIKE)
        )
        leaves.append(members[keep])
        badness.append(rank[keep])
    return _Candidates(labels, np.concatenate(leaves), np.concatenate(badness))


def _first_of_equals(members: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the columns of (n, R) in the given order, equal ones once."""
    packed = np.packbits(members.T, axis=1)[order]
    seen: dict[bytes, int] = {}
    for column, row in zip(order.tolist(), packed, strict=True):
        seen.setdefault(row.tobytes(), column)
    return np.array(list(seen.values()), dtype=np.int64)
