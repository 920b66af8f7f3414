"""What masks and classes of masked regions are trained with.

Shapes: M objects of an image, H x W network input, R regions, m side of the predicted masks.
"""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor

from instseg_ext.layers.mask_crop import crop_masks
from instseg_ext.layers.mask_ops import count_pixels, masks_per_chunk
from instseg_ext.layers.mask_render import pixel_boxes, render_masks
from instseg_ext.structures.matched_masks import as_matched_masks

__all__ = ["mask_level_labels", "mask_targets", "whole_pixels"]

_PIXEL_BYTES = 11  # of a rendered mask, what drawing it takes, and three bool masks


def whole_pixels(boxes: Tensor) -> Tensor:
    """Round the first and the last pixel of boxes, and keep at least one pixel.

    Args:
        boxes: (R, 4) XYXY.

    Returns:
        (R, 4) float32 of whole numbers, without gradient. Halves go to the even number, as
        published.
    """
    whole = pixel_boxes(boxes.detach().float())
    whole[:, 2:] = torch.maximum(whole[:, 2:], whole[:, :2] + 1)
    return whole


def mask_targets(
    boxes: Tensor, matched: Tensor, target: Instances, size: int, threshold: float
) -> Tensor:
    """Return what the masks of regions should be.

    Note:
        The published code does this in pixels of the original image. Here they are those of the
        network input, to which the mapper has brought the masks.

    Args:
        boxes: (R, 4) XYXY, network input.
        matched: (R,) int64, the object of each.
        target: objects with ``gt_masks``.
        size: m.
        threshold: from which a resized mask counts as set.

    Returns:
        (R, m, m) bool.

    Raises:
        ValueError: if the masks are not bit masks.
    """
    masks = as_matched_masks(target.gt_masks)
    index = masks.index[matched] if len(masks) else matched
    return crop_masks(masks.masks, index, whole_pixels(boxes), size, threshold)


@torch.no_grad()
def mask_level_labels(
    probs: Tensor,
    boxes: Tensor,
    matched: Tensor,
    labels: Tensor,
    target: Instances,
    *,
    num_classes: int,
    iou_threshold: float = 0.5,
    mask_threshold: float = 0.4,
    budget_mb: float = 256,
) -> Tensor:
    """Return what regions show when only their predicted masks are looked at.

    A foreground region keeps its class if its mask and the mask of its object overlap enough, and
    is background otherwise.

    Args:
        probs: (R, m, m) predicted masks.
        boxes: (R, 4) XYXY, network input.
        matched: (R,) int64, the object of each.
        labels: (R,) int64 class of each box, K for background.
        target: objects with ``gt_masks``.
        num_classes: K.
        iou_threshold: inclusive lower bound of the IoU of the masks.
        mask_threshold: inclusive lower bound of a pixel of a predicted mask.
        budget_mb: MiB of working memory.

    Returns:
        (R,) int64.

    Raises:
        ValueError: if the masks are not bit masks.
    """
    result = torch.full_like(labels, num_classes)
    foreground = (labels < num_classes).nonzero()[:, 0]
    if len(foreground):
        masks = as_matched_masks(target.gt_masks)
        index = masks.index[matched[foreground]]
        overlap = _mask_iou(
            probs[foreground].float(),
            whole_pixels(boxes[foreground]),
            masks.masks,
            index,
            mask_threshold,
            budget_mb,
        )
        agree = foreground[overlap >= iou_threshold]
        result[agree] = labels[agree]
    return result


def _mask_iou(
    probs: Tensor,
    boxes: Tensor,
    masks: Tensor,
    index: Tensor,
    threshold: float,
    budget_mb: float,
) -> Tensor:
    """Return the IoU (R,) float64 of predicted masks and objects.

    Regions of one object lie close together, so that they are drawn and compared in a window around
    them, which is much smaller than the image.

    Args:
        probs: (R, m, m) float32.
        boxes: (R, 4) whole pixels.
        masks: (M, H, W) bool.
        index: (R,) the object of each region.
        threshold: inclusive lower bound of a pixel of a predicted mask.
        budget_mb: MiB of working memory.
    """
    image_size = masks.shape[-2:]
    order = index.argsort()
    objects, counts = index.unique(return_counts=True)
    areas = count_pixels(masks)[objects]
    groups = order.split(counts.tolist())
    windows = torch.stack([_around(boxes[rows], image_size) for rows in groups]).tolist()
    overlap, union = torch.zeros_like(index), torch.zeros_like(index)
    for which, area, rows, window in zip(objects.tolist(), areas, groups, windows, strict=True):
        x1, y1, x2, y2 = window
        seen = masks[which, y1:y2, x1:x2]
        for part in rows.split(masks_per_chunk(_PIXEL_BYTES * seen.numel(), budget_mb)):
            drawn = render_masks(
                probs[part], boxes[part], image_size, corner_aligned=False, window=window
            )
            predicted = drawn >= threshold
            overlap[part] = count_pixels(predicted & seen)
            union[part] = count_pixels(predicted) + area - overlap[part]
    return overlap.double() / union.clamp(min=1)


def _around(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Return the part (4,) int64 of the image that boxes of whole pixels cover."""
    height, width = image_size
    window = torch.cat([boxes[:, :2].amin(dim=0), boxes[:, 2:].amax(dim=0)]).long()
    return window.clamp(min=0).minimum(window.new_tensor([width, height, width, height]))
