"""Planted ground truth and embeddings for the tests of deep metric learning."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances

from instseg_ext.methods.metric_learning.labels import CellSample


def instances(masks, classes=None, crowd=None):
    """Return ground truth of (M, H, W) masks."""
    masks = torch.as_tensor(masks).bool()
    result = Instances(tuple(masks.shape[1:]))
    result.gt_masks = BitMasks(masks)
    result.gt_boxes = Boxes(torch.zeros(len(masks), 4))
    result.gt_classes = torch.as_tensor(
        [0] * len(masks) if classes is None else classes, dtype=torch.int64
    )
    if crowd is not None:
        result.gt_is_crowd = torch.tensor(crowd)
    return result


def boxes(size_hw, *corners):
    """Return (M, H, W) masks of rectangles (x0, y0, x1, y1)."""
    masks = torch.zeros(len(corners), *size_hw, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def every_cell(labels, num_objects):
    """Return the sample that holds every cell of objects and background once."""
    labels = labels.flatten()
    owners, cells = labels.sort(stable=True)
    there = owners >= 0
    sizes = torch.bincount(labels[labels >= 0], minlength=num_objects + 1)
    return CellSample(cells[there], owners[there], sizes)


def planted(labels, num_objects, distance=10.0):
    """Return (N, M + 1) embeddings: those of one owner are equal, of two this far apart."""
    labels = labels.flatten().clamp(min=0)
    return torch.eye(num_objects + 1)[labels] * distance / 2**0.5
