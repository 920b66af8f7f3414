"""Which regions are trained on, and as what.

Shapes: R proposals of an image, M objects in it, K classes, U thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou
from torch import Tensor

__all__ = ["IGNORED", "SamplingOptions", "crowd_shares", "labels_by_threshold", "sample_regions"]

IGNORED = -1


@dataclass(frozen=True)
class SamplingOptions:
    """How regions are drawn.

    Attributes:
        num_classes: K; also the label of background.
        batch_size: regions of an image.
        foreground_fraction: most of them that are foreground, as a share.
        background_iou: lowest overlap with an object of background.
        crowd_overlap: regions with a larger share of their area in a crowd are left out.
        append_gt: the boxes of the objects are regions, too.
    """

    num_classes: int
    batch_size: int = 64
    foreground_fraction: float = 0.25
    background_iou: float = 0.1
    crowd_overlap: float = 0.7
    append_gt: bool = True


@torch.no_grad()
def crowd_shares(boxes: Boxes, crowds: Boxes) -> Tensor:
    """Return (R,) the largest share of each box's area that lies in one crowd."""
    if not len(crowds):
        return boxes.tensor.new_zeros(len(boxes))
    return pairwise_ioa(crowds, boxes).amax(dim=0)


@torch.no_grad()
def sample_regions(
    proposals: Instances, target: Instances, foreground_iou: float, options: SamplingOptions
) -> Instances:
    """Label the proposals of an image and draw some of them.

    Args:
        proposals: with ``proposal_boxes`` and, where there are crowds, ``crowd_share`` (R,).
        target: the objects, with ``gt_boxes``, ``gt_classes`` and anything else of theirs.
        foreground_iou: IoU with an object from which a region is foreground.
        options: see there.

    Returns:
        Drawn regions, foreground first: ``proposal_boxes``; ``gt_classes`` int64 in [0, K];
        ``gt_iou``, the largest overlap with an object; and, if there is an object, the fields of
        the one that each overlaps most, the first of several. A region with less than
        ``background_iou`` is never drawn, so that there may be none.
    """
    boxes = proposals.proposal_boxes.tensor
    share = boxes.new_zeros(len(boxes))
    if proposals.has("crowd_share"):
        share = proposals.crowd_share
    if options.append_gt and len(target):
        # Objects are kept whatever crowd they stand in.
        boxes = torch.cat([boxes, target.gt_boxes.tensor.to(boxes)])
        share = torch.cat([share, share.new_zeros(len(target))])
    overlap, matched = boxes.new_zeros(len(boxes)), torch.zeros_like(boxes[:, 0], dtype=torch.int64)
    labels = torch.full_like(matched, options.num_classes)
    if len(target) and len(boxes):
        overlap, matched = pairwise_iou(target.gt_boxes, Boxes(boxes)).max(dim=0)
        foreground = overlap >= foreground_iou
        labels = torch.where(foreground, target.gt_classes[matched], labels)
    labels[(overlap < options.background_iou) | (share > options.crowd_overlap)] = IGNORED
    drawn = torch.cat(
        subsample_labels(
            labels, options.batch_size, options.foreground_fraction, options.num_classes
        )
    )
    sampled = Instances(
        proposals.image_size,
        proposal_boxes=Boxes(boxes[drawn]),
        gt_classes=labels[drawn],
        gt_iou=overlap[drawn],
    )
    if len(target):
        for name, values in target.get_fields().items():
            if name.startswith("gt_") and not sampled.has(name):
                sampled.set(name, values[matched[drawn]])
    return sampled


def labels_by_threshold(
    classes: Tensor, overlap: Tensor, thresholds: Tensor, num_classes: int
) -> Tensor:
    """Return what each classifier of the integral loss is to say.

    Args:
        classes: (R,) int64 in [0, K], of the object that each region overlaps most; K where its
            overlap reaches no threshold.
        overlap: (R,) with that object.
        thresholds: (U,) from which IoU on a region is foreground.
        num_classes: K.

    Returns:
        (R, U) int64 in [0, K].
    """
    reached = overlap[:, None] >= thresholds
    return torch.where(reached, classes[:, None], num_classes)
