"""Losses of PolarMask on its positive locations.

Shape shorthand: Q positive locations, R rays. All lengths are in pixels of the network input, from
the location outwards. Each loss is a sum over the positives, in float32, that the caller
normalises; without a positive it is 0 and still connected to the prediction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["box_loss", "centerness_loss", "polar_iou_loss", "smooth_l1_loss"]

# Floor of overlaps and of sums of lengths: their quotients and logarithms stay finite.
_EPS = 1e-6
# Longest side that a box is given: larger areas overflow, and then gradients are no numbers. The
# overlap with any image is below the floor long before.
_FAR = 1e9


def box_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Sum -log(IoU) of boxes that contain one point.

    Boxes reach from the first to the last pixel, both included: one with the distances l and r is
    l + r + 1 wide. The IoU counts as 1e-6 at least, without a gradient below.

    Args:
        pred: (Q, 4) float, distances to the left, top, right and bottom side, not negative.
        target: (Q, 4) float, likewise.
        weight: (Q,) float.

    Returns:
        0-d float32.
    """
    pred, target = pred.float().clamp(max=_FAR), target.float()
    overlap = _area(torch.minimum(pred, target))
    union = _area(pred) + _area(target) - overlap
    return -((overlap / union).clamp(min=_EPS).log() * weight).sum()


def _area(distances: Tensor) -> Tensor:
    """Return the (Q,) numbers of pixels of boxes given by (Q, 4) distances."""
    return (distances[:, :2] + distances[:, 2:] + 1).prod(dim=1)


def polar_iou_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Sum -log of the polar IoU: the shorter over the longer of two lengths, both summed over rays.

    The discrete form of the polar IoU loss of arXiv:1909.13226, with lengths, not their squares.

    Args:
        pred: (Q, R) float, not negative.
        target: (Q, R) float, not negative.
        weight: (Q,) float.

    Returns:
        0-d float32.
    """
    pred, target = pred.float(), target.float()
    longer = torch.maximum(pred, target).sum(dim=1).clamp(min=_EPS)
    shorter = torch.minimum(pred, target).sum(dim=1).clamp(min=_EPS)
    return ((longer / shorter).log() * weight).sum()


def smooth_l1_loss(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Sum the mean over the rays of the smooth L1 distance, quadratic below one pixel.

    Args:
        pred: (Q, R) float.
        target: (Q, R) float.
        weight: (Q,) float.

    Returns:
        0-d float32.
    """
    distances = F.smooth_l1_loss(pred.float(), target.float(), reduction="none")
    return (distances.mean(dim=1) * weight).sum()


def centerness_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sum the binary cross-entropy of the quality branch.

    Args:
        logits: (Q,) float.
        target: (Q,) float in [0, 1].

    Returns:
        0-d float32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="sum")
