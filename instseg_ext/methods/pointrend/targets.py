"""What the point head learns, and its loss.

Shapes: R regions of all images, P points of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from instseg_ext.layers.point_sample import points_in_boxes, sample_masks
from instseg_ext.structures.matched_masks import as_matched_masks

__all__ = ["LOG_PERIOD", "point_labels", "point_loss"]

LOG_PERIOD = 20  # iterations, as detectron2 writes its log


@torch.no_grad()
def point_labels(proposals: Sequence[Instances], points: Tensor) -> Tensor:
    """Read the ground-truth masks at points.

    Args:
        proposals: foreground regions of each image with ``proposal_boxes`` and ``gt_masks``, R in
            all.
        points: (R, P, 2) relative to their boxes.

    Returns:
        (R, P) float32 in [0, 1]: the masks are interpolated, zero outside the image.

    Raises:
        ValueError: if the masks are not bit masks.
    """
    counts = [len(proposal) for proposal in proposals]
    labels = [points.new_zeros((0, points.shape[1]))]
    for proposal, inside in zip(proposals, points.split(counts), strict=True):
        if len(proposal):
            masks = as_matched_masks(proposal.gt_masks)
            at = points_in_boxes(proposal.proposal_boxes.tensor, inside)
            labels.append(sample_masks(masks.masks, masks.index, at))
    return torch.cat(labels)


def point_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross entropy with soft labels, averaged over all points.

    Also logs ``point/accuracy``, the share of points on the right side of one half, every
    twentieth iteration: reading it waits for the device.

    Args:
        logits: (R, P) float32.
        labels: (R, P) float32 in [0, 1].

    Returns:
        A scalar; zero, with a gradient of zeros, if there is no region.
    """
    if not len(logits):
        return logits.sum() * 0
    storage = get_event_storage()
    if (storage.iter + 1) % LOG_PERIOD == 0:
        right = (logits.detach() > 0) == (labels >= 0.5)
        storage.put_scalar("point/accuracy", right.float().mean().item())
    return F.binary_cross_entropy_with_logits(logits, labels)
