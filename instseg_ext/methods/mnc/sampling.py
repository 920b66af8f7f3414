"""Which regions the cascade is trained on, and what each of them is.

Shapes: P proposals of one image, M objects in it, R sampled regions, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from instseg_ext.modeling.clip_first_rpn import AnchorOverride

__all__ = ["Sampled", "SamplingOptions", "anchor_overrides", "label_regions", "sample_regions"]


@dataclass(frozen=True)
class SamplingOptions:
    """How regions are drawn.

    Attributes:
        num_classes: K; also the label of background.
        batch_size: most regions of an image in the first pass.
        foreground_fraction: most of them that are foreground, as a share.
        foreground_iou: IoU with an object from which a region is foreground.
        split_iou: IoU that divides background into near and far.
        near_fraction: share of the background that is drawn from the near one.
        append_gt: the boxes of the objects are regions, too.
    """

    num_classes: int
    batch_size: int = 64
    foreground_fraction: float = 0.3
    foreground_iou: float = 0.5
    split_iou: float = 0.1
    near_fraction: float = 0.85
    append_gt: bool = True

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SamplingOptions:
        """Read ``MODEL.ROI_HEADS`` and ``MODEL.MNC``.

        Raises:
            ValueError: if there is not exactly one IoU threshold, or one is out of order.
        """
        heads, node = cfg.MODEL.ROI_HEADS, cfg.MODEL.MNC
        if len(heads.IOU_THRESHOLDS) != 1 or not (
            0 <= node.BG_SPLIT_IOU <= heads.IOU_THRESHOLDS[0] <= 1
        ):
            raise ValueError(
                "MODEL.ROI_HEADS.IOU_THRESHOLDS must be one number between MODEL.MNC.BG_SPLIT_IOU "
                f"and 1, not {list(heads.IOU_THRESHOLDS)} with {node.BG_SPLIT_IOU}."
            )
        if not 0 <= node.BG_NEAR_FRACTION <= 1:
            raise ValueError(
                f"MODEL.MNC.BG_NEAR_FRACTION must be in [0, 1], not {node.BG_NEAR_FRACTION}."
            )
        return cls(
            num_classes=heads.NUM_CLASSES,
            batch_size=heads.BATCH_SIZE_PER_IMAGE,
            foreground_fraction=heads.POSITIVE_FRACTION,
            foreground_iou=heads.IOU_THRESHOLDS[0],
            split_iou=node.BG_SPLIT_IOU,
            near_fraction=node.BG_NEAR_FRACTION,
            append_gt=heads.PROPOSAL_APPEND_GT,
        )


@dataclass(frozen=True)
class Sampled:
    """Regions of one image, foreground first.

    Attributes:
        boxes: (R, 4) XYXY, network input; part of the graph that the proposals are part of.
        labels: (R,) int64 class, K for background.
        matched: (R,) int64, the object each region overlaps most; 0 if there is none.
        proposal_index: (R,) int64, the proposal each region is; -1 for the box of an object.
        num_foreground: number of foreground regions.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    proposal_index: Tensor
    num_foreground: int

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def is_gt(self) -> Tensor:
        """(R,) bool: which regions are boxes of objects."""
        return self.proposal_index < 0


def sample_regions(
    proposals: Sequence[Instances], targets: Sequence[Instances], options: SamplingOptions
) -> list[Sampled]:
    """Draw the regions of the first pass.

    Foreground is drawn first, ``foreground_fraction`` of the batch at most. What is left of the
    batch is divided into near and far background; a pool that is too small is not made up for. The
    ranges include both their ends, as published: a box on an end belongs to both.

    Random numbers come from torch's generator, as in detectron2's sampling.

    Args:
        proposals: of each image, with ``proposal_boxes``.
        targets: of each image, with ``gt_boxes`` and ``gt_classes``.
        options: how.

    Returns:
        One record for each image.
    """
    sampled = []
    for proposal, target in zip(proposals, targets, strict=True):
        boxes = _with_gt(proposal.proposal_boxes.tensor, target, options)
        overlap, matched = _match(boxes, target)
        foreground, background = _draw(overlap, options)
        sampled.append(
            _record(boxes, matched, target, foreground, background, len(proposal), options)
        )
    return sampled


def label_regions(boxes: Tensor, target: Instances, options: SamplingOptions) -> Sampled:
    """Label the regions of the second pass, all of which are kept.

    Args:
        boxes: (P, 4) of one image, XYXY, network input, with or without gradients.
        target: its objects, whose boxes are appended if the options say so.
        options: how.

    Returns:
        All regions, those with an IoU of at least ``foreground_iou`` first.
    """
    num_given = len(boxes)
    boxes = _with_gt(boxes, target, options)
    overlap, matched = _match(boxes, target)
    is_foreground = overlap >= options.foreground_iou
    foreground, background = is_foreground.nonzero()[:, 0], (~is_foreground).nonzero()[:, 0]
    return _record(boxes, matched, target, foreground, background, num_given, options)


def anchor_overrides(
    sampled: Sequence[Sampled], proposals: Sequence[Instances]
) -> list[AnchorOverride] | None:
    """Return which anchors take the labels of the regions that they became.

    Args:
        sampled: regions of each image, drawn from ...
        proposals: ... these.

    Returns:
        One record for each image; None if the proposals do not come from anchors.
    """
    overrides = []
    for regions, proposal in zip(sampled, proposals, strict=True):
        if not proposal.has("anchor_index"):
            return None
        foreground, background = (
            rows[rows >= 0] for rows in _split(regions.proposal_index, regions.num_foreground)
        )
        overrides.append(
            AnchorOverride(
                background=proposal.anchor_index[background],
                foreground=proposal.anchor_index[foreground],
            )
        )
    return overrides


def _split(rows: Tensor, num_foreground: int) -> tuple[Tensor, Tensor]:
    return rows[:num_foreground], rows[num_foreground:]


def _with_gt(boxes: Tensor, target: Instances, options: SamplingOptions) -> Tensor:
    """Append the boxes of the objects if the options say so."""
    return torch.cat([boxes, target.gt_boxes.tensor.to(boxes)]) if options.append_gt else boxes


@torch.no_grad()
def _match(boxes: Tensor, target: Instances) -> tuple[Tensor, Tensor]:
    """Return the best IoU of each box, 0 without objects, and which object it is with.

    Of equal objects the first one counts.
    """
    if not len(target):
        return boxes.new_zeros(len(boxes)), boxes.new_zeros(len(boxes), dtype=torch.int64)
    return pairwise_iou(target.gt_boxes, Boxes(boxes.detach())).max(dim=0)


def _draw(overlap: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """Return the rows drawn as foreground and as background, each in ascending order."""
    # Python rounds halves to even, as the published code does.
    most = round(options.batch_size * options.foreground_fraction)
    foreground = _choose(overlap >= options.foreground_iou, most)
    rest = options.batch_size - len(foreground)
    near = (overlap >= options.split_iou) & (overlap <= options.foreground_iou)
    far = overlap <= options.split_iou
    num_near = round(rest * options.near_fraction)
    background = torch.cat([_choose(near, num_near), _choose(far, rest - num_near)])
    return foreground, background.unique()


def _choose(allowed: Tensor, most: int) -> Tensor:
    """Return at most so many random rows of those allowed, in ascending order."""
    rows = allowed.nonzero()[:, 0]
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), device=rows.device)[:most]].sort().values


def _record(
    boxes: Tensor,
    matched: Tensor,
    target: Instances,
    foreground: Tensor,
    background: Tensor,
    num_given: int,
    options: SamplingOptions,
) -> Sampled:
    """Put chosen rows of ``boxes``, of which the first ``num_given`` are proposals, together."""
    rows = torch.cat([foreground, background])
    labels = rows.new_full((len(rows),), options.num_classes)
    labels[: len(foreground)] = target.gt_classes[matched[foreground]]
    # The rows are chosen without gradients, the boxes are indexed with them.
    return Sampled(
        boxes=boxes[rows],
        labels=labels,
        matched=matched[rows],
        proposal_index=torch.where(rows < num_given, rows, -1),
        num_foreground=len(foreground),
    )
