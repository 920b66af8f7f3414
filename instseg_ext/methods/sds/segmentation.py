"""Region proposals without any trained model: what SDS starts from when there is nothing better.

Segments of the image in two colour spaces grow together into trees, by four notions of similarity
each; every segment that occurs in a tree is a proposal. It stands in for MCG, which has no Python
code, with clearly lower recall.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import cv2
import numpy as np
import torch

from instseg_ext.methods.sds.graph_segments import Edges, graph_segments, pixel_edges
from instseg_ext.methods.sds.grouping import describe_segments, group_segments
from instseg_ext.structures.region_proposals import RegionProposals
from instseg_ext.structures.superpixels import connected_parts, require_scipy

__all__ = ["SOURCES", "propose_regions", "regions_of_boxes"]

# Where segments or boxes come from: this package, scikit-image, or OpenCV's contributed modules.
SOURCES = ("builtin", "skimage", "opencv")

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
    image_rgb: np.ndarray, max_regions: int = 2000, seed: int = 0, source: str = "builtin"
) -> RegionProposals:
    """Propose regions that may be objects.

    Args:
        image_rgb: (H, W, 3) uint8.
        max_regions: most regions to return.
        seed: of the order in which they come, which is random in part, as in selective search.
        source: "builtin" needs numpy and scipy only; "skimage" takes the segments that grow
            together from scikit-image, in less time; "opencv" takes the boxes of OpenCV's
            selective search and makes regions of the segments inside them, which are coarser.

    Returns:
        At most ``max_regions`` regions, best first, scores falling from 1; none where the image
        shows nothing, or has no pixels. The same for the same image and seed.

    Raises:
        ValueError: if the image has another form, or there is no such source.
        ImportError: naming the package that is missing.
    """
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8:
        raise ValueError(
            f"Regions are proposed for (H, W, 3) uint8 images, not for {image_rgb.dtype} of shape "
            f"{image_rgb.shape}."
        )
    if source not in SOURCES:
        raise ValueError(f"Regions come from one of {SOURCES}, not from {source!r}.")
    height, width = image_rgb.shape[:2]
    if height * width == 0:
        return RegionProposals.from_masks([], size_hw=(height, width))
    image = _shrunk(image_rgb)
    if source == "opencv":
        boxes = _selective_search(image, seed)
        boxes = boxes * np.tile([width / image.shape[1], height / image.shape[0]], 2)
        scores = 1 - np.arange(len(boxes)) / max(len(boxes), 1)
        return regions_of_boxes(image_rgb, boxes, scores, max_regions)
    rng = np.random.default_rng(seed)
    spaces = (_lab(image), image.astype(np.float32))
    found = [_candidates(colours, rng, source) for colours in spaces]
    parts, first = connected_parts(*(one.labels for one in found))
    members = np.concatenate([one.leaves[:, one.labels.ravel()[first]].T for one in found], axis=1)
    order = np.concatenate([one.badness for one in found]).argsort(kind="stable")
    members = members[:, _first_of_equals(members, order)[:max_regions]]
    scores = 1 - np.arange(members.shape[1]) / max(members.shape[1], 1)
    return _at_full_size(RegionProposals.merged(parts, members, scores), (height, width))


def regions_of_boxes(
    image_rgb: np.ndarray, boxes: np.ndarray, scores: np.ndarray, max_regions: int = 2000
) -> RegionProposals:
    """Make regions of boxes: the segments of the image that lie at least half inside.

    Crude, but all there is to make of an RPN or of selective search. Boxes without such a segment
    are left out, and so are those with the same segments as an earlier one.

    Args:
        image_rgb: (H, W, 3) uint8, not empty.
        boxes: (M, 4) float XYXY in pixels.
        scores: (M,) float.
        max_regions: most regions to return, from the first.
    """
    image = _shrunk(image_rgb)
    labels = _segments(_lab(image), "builtin")[0]
    size_hw = (image_rgb.shape[0], image_rgb.shape[1])
    shrink = np.tile([image.shape[1] / size_hw[1], image.shape[0] / size_hw[0]], 2)
    num = int(labels.max()) + 1
    sizes = np.bincount(labels.ravel(), minlength=num)
    members = np.zeros((num, len(boxes)), dtype=bool)
    whole = (boxes * shrink).round().clip(min=0).astype(int)
    for column, (x1, y1, x2, y2) in enumerate(whole.tolist()):
        inside = np.bincount(labels[y1:y2, x1:x2].ravel(), minlength=num)
        members[:, column] = 2 * inside >= sizes
    keep = _first_of_equals(members, np.flatnonzero(members.any(axis=0)))[:max_regions]
    return _at_full_size(RegionProposals.merged(labels, members[:, keep], scores[keep]), size_hw)


def _shrunk(image: np.ndarray) -> np.ndarray:
    """Return the image, smaller if it is large."""
    height, width = image.shape[:2]
    factor = (_MAX_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return image
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _at_full_size(regions: RegionProposals, size_hw: tuple[int, int]) -> RegionProposals:
    """Return the regions of a shrunk image at the size of the image."""
    rows, columns = (
        torch.arange(long) * short // long
        for long, short in zip(size_hw, regions.image_size, strict=True)
    )
    superpixels = regions.superpixels[rows[:, None], columns]
    return RegionProposals(superpixels, regions.members, regions.scores)


def _lab(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) uint8 RGB in Lab, float32, lightness in 0..255."""
    return cv2.cvtColor(image / np.float32(255), cv2.COLOR_RGB2LAB) * np.float32(2.55)


def _segments(colours: np.ndarray, source: str) -> tuple[np.ndarray, Edges]:
    """Segment an image (H, W, 3) float32: (H, W) int64 labels and the edges between pixels."""
    height, width = colours.shape[:2]
    pixels = height * width
    scale = _SCALE * (pixels / _USUAL_PIXELS) ** 0.5
    min_size = int(np.clip(pixels * _MIN_SEGMENT, *_SEGMENT_PIXELS))
    smooth = require_scipy("scipy.ndimage").gaussian_filter(colours, (_SIGMA, _SIGMA, 0))
    edges = pixel_edges(smooth)
    if source == "builtin":
        return graph_segments(edges, pixels, scale, min_size).reshape(height, width), edges
    skimage = _extra("skimage.segmentation", "scikit-image")
    # It takes k in units of 1/255, as its colours are.
    labels = skimage.felzenszwalb(smooth / 255, scale=scale, sigma=0, min_size=min_size)
    return connected_parts(labels)[0].astype(np.int64), edges


def _selective_search(image: np.ndarray, seed: int) -> np.ndarray:
    """Return the boxes (M, 4) XYXY of OpenCV's selective search in an image RGB, best first.

    Their set is always the same, but OpenCV puts them into an order by C's ``rand``, which nobody
    can seed from here. So they are ordered anew: large ones count as late in the search.
    """
    segmentation = getattr(getattr(cv2, "ximgproc", None), "segmentation", None)
    if segmentation is None:
        raise ImportError(
            "Selective search needs OpenCV's contributed modules: install "
            "opencv-contrib-python (or its -headless form) in place of opencv-python."
        )
    search = segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[..., ::-1]))
    search.switchToSelectiveSearchFast()
    found = np.asarray(search.process(), dtype=np.float64).reshape(-1, 4)
    xywh = np.unique(found, axis=0)
    xywh = xywh[(-xywh[:, 2:].prod(axis=1)).argsort(kind="stable")]
    rank = np.arange(1, len(xywh) + 1) * np.random.default_rng(seed).random(len(xywh))
    xywh = xywh[rank.argsort()]
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def _extra(module: str, package: str) -> ModuleType:
    """Import a module of a package that is not required.

    Raises:
        ImportError: naming the package.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This source of regions needs the package {package}: pip install {package} ({error})."
        ) from error


def _candidates(colours: np.ndarray, rng: np.random.Generator, source: str) -> _Candidates:
    """Segment an image (H, W, 3) float32 of one colour space and group the segments."""
    labels, edges = _segments(colours, source)
    pixels = labels.size
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
