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

_PIXEL_BYTES = 16  # a drawn value, an index, and four bool masks
_GROUP = 16  # masks drawn at once: few enough to be of similar size


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
    if not len(boxes):  # images without objects may have no field of masks
        return torch.zeros((0, size, size), dtype=torch.bool, device=boxes.device)
    masks = as_matched_masks(target.gt_masks)
    index = masks.index[matched]
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
        boxes: (R, 4) XYXY, network input, inside the image.
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

    Masks are drawn and compared in frames of the size of their boxes, mostly much smaller than the
    image, some boxes of similar size at a time.

    Args:
        probs: (R, m, m) float32.
        boxes: (R, 4) whole pixels, inside the image.
        masks: (M, H, W) bool.
        index: (R,) the object of each region.
        threshold: inclusive lower bound of a pixel of a predicted mask.
        budget_mb: MiB of working memory.
    """
    height, width = masks.shape[-2:]
    pixels = masks.reshape(-1)
    first, sides = boxes[:, :2].long(), (boxes[:, 2:] - boxes[:, :2]).long()
    groups = (
        sides.prod(dim=1)
        .argsort()
        .split(min(_GROUP, masks_per_chunk(_PIXEL_BYTES * height * width, budget_mb)))
    )
    frames = torch.stack([sides[rows].amax(dim=0) for rows in groups]).tolist()
    overlap, predicted = torch.zeros_like(index), torch.zeros_like(index)
    for rows, (columns, lines) in zip(groups, frames, strict=True):
        in_frame = torch.cat([torch.zeros_like(sides[rows]), sides[rows]], dim=1)
        drawn = render_masks(probs[rows], in_frame, (lines, columns), corner_aligned=False)
        drawn = drawn >= threshold
        # Past its box, a frame may leave the image; nothing is drawn there.
        x = first[rows, :1] + torch.arange(columns, device=boxes.device)
        y = first[rows, 1:] + torch.arange(lines, device=boxes.device)
        line = (index[rows, None] * height + y.clamp(max=height - 1)) * width
        index_of_pixel = line[:, :, None] + x.clamp(max=width - 1)[:, None]
        # Many times faster than indexing.
        seen = pixels.index_select(0, index_of_pixel.flatten()).view_as(drawn)
        predicted[rows] = count_pixels(drawn)
        overlap[rows] = count_pixels(drawn & seen)
    union = predicted + count_pixels(masks)[index] - overlap
    return overlap.double() / union.clamp(min=1)
