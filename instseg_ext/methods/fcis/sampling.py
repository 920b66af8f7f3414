"""Which regions of an image FCIS trains, and what they have to predict.

Shapes: R regions, M objects, H x W network input, P side of the masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from instseg_ext.layers.mask_crop import crop_masks
from instseg_ext.structures.matched_masks import as_matched_masks

__all__ = ["Regions", "SamplingOptions", "label_regions", "make_targets", "sample"]


@dataclass(frozen=True)
class SamplingOptions:
    """How regions are chosen.

    Attributes:
        hard: train the regions of largest loss instead of random ones.
        num_regions: regions per image.
        foreground_fraction: largest share of foreground among random ones.
        foreground_iou: lowest best overlap of foreground.
        background_iou: (low, high): background has its best overlap in [low, high).
        append_gt: whether the objects' boxes join the regions.
    """

    hard: bool = True
    num_regions: int = 128
    foreground_fraction: float = 0.25
    foreground_iou: float = 0.5
    background_iou: tuple[float, float] = (0.0, 0.5)
    append_gt: bool = True

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SamplingOptions:
        """Read ``MODEL.FCIS`` and ``MODEL.ROI_HEADS``.

        Raises:
            ValueError: if the overlaps contradict each other or no region would be trained.
        """
        node, heads = cfg.MODEL.FCIS, cfg.MODEL.ROI_HEADS
        if len(heads.IOU_THRESHOLDS) != 1:
            raise ValueError(
                "FCIS needs one number in MODEL.ROI_HEADS.IOU_THRESHOLDS, the lowest overlap of "
                f"foreground, not {heads.IOU_THRESHOLDS}."
            )
        bounds = tuple(node.BG_IOU)
        if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= heads.IOU_THRESHOLDS[0]:
            raise ValueError(
                "MODEL.FCIS.BG_IOU must be two rising numbers from 0 to "
                f"MODEL.ROI_HEADS.IOU_THRESHOLDS {heads.IOU_THRESHOLDS[0]}, not {node.BG_IOU}."
            )
        key = "OHEM_ROIS" if node.OHEM else "NUM_ROIS"
        if node[key] < 1:
            raise ValueError(f"MODEL.FCIS.{key} must be positive, not {node[key]}.")
        return cls(
            hard=node.OHEM,
            num_regions=node[key],
            foreground_fraction=node.FG_FRACTION,
            foreground_iou=heads.IOU_THRESHOLDS[0],
            background_iou=bounds,
            append_gt=heads.PROPOSAL_APPEND_GT,
        )


@dataclass(frozen=True)
class Regions:
    """Regions of one image with what they have to predict.

    Attributes:
        boxes: (R, 4) network-input pixels, without gradient.
        classes: (R,) int64 in [0, K]; K is background.
        matched: (R,) int64, the object of largest overlap; undefined for background.
        deltas: (R, 4) from the box to its object's, in the units of the box layer; zero for
            background. None before ``make_targets``.
        masks: (F, P, P) float32 zeros and ones, for the F foreground regions in order. None before
            ``make_targets``.
    """

    boxes: Tensor
    classes: Tensor
    matched: Tensor
    deltas: Tensor | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def foreground(self, num_classes: int) -> Tensor:
        """Return (R,) bool, for K = ``num_classes``."""
        return self.classes < num_classes

    def take(self, index: Tensor, num_classes: int) -> Regions:
        """Return the regions of an index (R',) int64, in its order."""
        deltas, masks = self.deltas, self.masks
        if masks is not None:
            is_foreground = self.foreground(num_classes)
            row = is_foreground.cumsum(0) - 1
            masks = masks[row[index[is_foreground[index]]]]
            deltas = deltas[index]
        return Regions(self.boxes[index], self.classes[index], self.matched[index], deltas, masks)


@torch.no_grad()
def label_regions(
    proposals: Instances, target: Instances, options: SamplingOptions, num_classes: int
) -> tuple[Regions, Tensor]:
    """Match the proposals of an image, and its objects' boxes, with the objects.

    Args:
        proposals: with ``proposal_boxes``.
        target: with ``gt_boxes`` and ``gt_classes``; may be empty.
        options: see there.
        num_classes: K.

    Returns:
        All regions, and (R,) float32 the largest overlap of each with an object.
    """
    boxes = proposals.proposal_boxes.tensor.detach().float()
    gt_boxes = target.gt_boxes.tensor.to(boxes)
    if options.append_gt:
        boxes = torch.cat([boxes, gt_boxes])
    if not len(target):
        background = torch.full((len(boxes),), num_classes, device=boxes.device)
        return Regions(boxes, background, torch.zeros_like(background)), boxes.new_zeros(len(boxes))
    overlap, matched = pairwise_iou(Boxes(boxes), Boxes(gt_boxes)).max(dim=1)
    classes = target.gt_classes[matched].masked_fill(overlap < options.foreground_iou, num_classes)
    return Regions(boxes, classes, matched), overlap


@torch.no_grad()
def sample(
    regions: Regions, overlap: Tensor, options: SamplingOptions, num_classes: int
) -> Regions:
    """Choose among labelled regions.

    Args:
        regions: of ``label_regions``.
        overlap: as well.
        options: with ``hard``, all foreground and background is kept, to be ranked by its loss.
            Otherwise at most ``foreground_fraction`` of ``num_regions`` are foreground and the rest
            is background; where there is too little of it, regions below ``foreground_iou`` are
            repeated.
        num_classes: K.

    Note:
        The published code repeats foreground regions that were not drawn, too, labelled as
        background.
    """
    low, high = options.background_iou
    foreground = regions.foreground(num_classes).nonzero()[:, 0]
    background = ((overlap >= low) & (overlap < high)).nonzero()[:, 0]
    if options.hard:
        return regions.take(torch.cat([foreground, background]), num_classes)
    total = options.num_regions
    foreground = _draw(foreground, round(options.foreground_fraction * total))
    background = _draw(background, total - len(foreground))
    missing = total - len(foreground) - len(background)
    spare = (overlap < options.foreground_iou).nonzero()[:, 0]
    if missing and len(spare):
        drawn = torch.randint(len(spare), (missing,), device=spare.device)
        background = torch.cat([background, spare[drawn]])
    return regions.take(torch.cat([foreground, background]), num_classes)


def _draw(index: Tensor, number: int) -> Tensor:
    """Return at most ``number`` entries of (n,) ``index``, drawn without repetition."""
    if len(index) <= number:
        return index
    return index[torch.randperm(len(index), device=index.device)[:number]]


@torch.no_grad()
def make_targets(
    regions: Regions,
    target: Instances,
    *,
    transform: Box2BoxTransform,
    size: int,
    threshold: float,
    num_classes: int,
) -> Regions:
    """Add box deltas and masks.

    Args:
        regions: of one image.
        target: its objects, with ``gt_boxes`` and ``gt_masks``.
        transform: codes boxes.
        size: P.
        threshold: a cell belongs to the mask from this share on.
        num_classes: K.
    """
    foreground = regions.foreground(num_classes)
    boxes, matched = regions.boxes[foreground], regions.matched[foreground]
    deltas = torch.zeros_like(regions.boxes)
    if not len(boxes):
        masks = boxes.new_zeros((0, size, size))
        return Regions(regions.boxes, regions.classes, regions.matched, deltas, masks)
    gt_boxes = target.gt_boxes.tensor.to(boxes)[matched]
    deltas[foreground] = transform.get_deltas(boxes, gt_boxes)
    objects = as_matched_masks(target.gt_masks)[matched]
    masks = crop_masks(objects.masks, objects.index, _whole_pixels(boxes), size, threshold)
    return Regions(regions.boxes, regions.classes, regions.matched, deltas, masks.float())


def _whole_pixels(boxes: Tensor) -> Tensor:
    """Round the corners of (R, 4) boxes, and leave at least one pixel."""
    whole = (boxes + 0.5).floor()
    whole[:, 2:] = torch.maximum(whole[:, 2:], whole[:, :2] + 1)
    return whole
