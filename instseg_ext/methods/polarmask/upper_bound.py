"""How good masks of rays can be: the overlap of objects with their own rays' polygons.

Shapes: M objects, (H, W) network input.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

from instseg_ext.data.augmentation import StretchTransform
from instseg_ext.data.mapper import transform_masks
from instseg_ext.layers.mask_ops import (
    chunk_slices,
    count_pixels,
    masks_per_chunk,
    tight_boxes,
)
from instseg_ext.layers.polygon_fill import fill_polygons
from instseg_ext.methods.polarmask.polygons import decode_polygons, ray_directions
from instseg_ext.methods.polarmask.rays import ray_targets
from instseg_ext.structures.contours import Contours, trace_contours

__all__ = ["CENTRES", "RAYS", "TARGETS", "input_size", "object_masks", "ray_overlaps"]

# What is compared: where rays begin, how their lengths are found, how many there are (Fig. 6 of
# arXiv:1909.13226, which goes up to 120).
CENTRES = ("mass", "box")
TARGETS = ("exact", "bins")
RAYS = (18, 24, 36, 72, 90, 120)

_BUDGET_MB = 64


def input_size(cfg: CfgNode, source_hw: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of the network input for a picture, without building the model.

    Args:
        cfg: read for ``INSTSEG.STRETCH``, or else ``INPUT.MIN_SIZE_TEST`` and ``MAX_SIZE_TEST``.
        source_hw: height and width of the picture.
    """
    side = cfg.INPUT.MIN_SIZE_TEST
    if any(cfg.INSTSEG.STRETCH):
        return tuple(cfg.INSTSEG.STRETCH)
    if not side:
        return source_hw
    resize = T.ResizeShortestEdge([side, side], cfg.INPUT.MAX_SIZE_TEST)
    # Of a picture without memory: only its size is read.
    transform = resize.get_transform(np.broadcast_to(np.uint8(0), (*source_hw, 3)))
    return transform.new_h, transform.new_w


def object_masks(
    annotations: list[dict[str, Any]], source_hw: tuple[int, int], size_hw: tuple[int, int]
) -> tuple[Tensor, list[int]]:
    """Draw the annotated objects of one picture at the size of the network input.

    Args:
        annotations: in detectron2's form; those without a segmentation and crowds are left out.
        source_hw: size in whose pixels they are.
        size_hw: (H, W).

    Returns:
        (M, H, W) bool, as training sees them, and their M class indices. A mask may be empty where
        an object is smaller than a pixel.
    """
    usable = [a for a in annotations if a.get("segmentation") and not a.get("iscrowd", 0)]
    transforms = T.TransformList([StretchTransform(*source_hw, *size_hw)])
    masks = transform_masks([a["segmentation"] for a in usable], transforms, source_hw, size_hw)
    return masks, [int(a["category_id"]) for a in usable]


def ray_overlaps(masks: Tensor) -> Tensor:
    """Compute the mask IoU of objects with the polygons of their rays (Sec. 3.2, "upper bound").

    Polygons are drawn as inference draws them, vertices cut off to whole pixels: that takes half a
    pixel off the right and the lower side, which counts for small objects.

    Args:
        masks: (M, H, W) bool; those without a pixel are left out.

    Returns:
        (centres, targets, rays, m) float64 for ``CENTRES``, ``TARGETS``, ``RAYS`` and the m <= M
        objects that have a pixel.
    """
    chunk = masks_per_chunk(4 * masks.shape[1] * masks.shape[2], _BUDGET_MB)
    parts = [_chunk_overlaps(masks[part]) for part in chunk_slices(len(masks), chunk)]
    shape = (len(CENTRES), len(TARGETS), len(RAYS), 0)
    return torch.cat([torch.zeros(shape, dtype=torch.float64), *parts], dim=3)


def _chunk_overlaps(masks: Tensor) -> Tensor:
    contours, mass, found = trace_contours(masks)
    masks, contours, mass = masks[found], contours[found], mass[found]
    boxes = tight_boxes(masks)
    # The middle between the first and the last pixel, cut to an integer as the mass centre is.
    middle = ((boxes[:, :2] + boxes[:, 2:] - 1) / 2).floor()
    starts = {"mass": mass.float(), "box": middle}
    overlaps = [
        _overlaps(masks, contours, starts[centre], target, rays)
        for centre, target, rays in itertools.product(CENTRES, TARGETS, RAYS)
    ]
    return torch.stack(overlaps).view(len(CENTRES), len(TARGETS), len(RAYS), -1)


def _overlaps(
    masks: Tensor, contours: Contours, points: Tensor, target: str, num_rays: int
) -> Tensor:
    """Return (M,) float64; ``points`` (M, 2) are where the rays begin."""
    size_hw = tuple(masks.shape[1:])
    instance = torch.arange(len(masks))
    lengths = ray_targets(points, contours, instance, num_rays=num_rays, mode=target)
    polygons = decode_polygons(points, lengths, ray_directions(num_rays), size_hw)
    filled = fill_polygons(polygons.long(), size_hw)
    shared = count_pixels(filled & masks)
    return shared.double() / (count_pixels(filled) + count_pixels(masks) - shared)
