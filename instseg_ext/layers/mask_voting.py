"""Mask voting of MNC and FCIS: every detection's mask is an average over the boxes that overlap it.

Boxes are suppressed within each class. For each of the best that are left, all candidates whose
boxes overlap its box, suppressed or not, are voters; their masks are drawn into the image and
averaged with their scores of the class as weights.

Shapes: C candidates with masks of m x m, K classes, D detections, H x W image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from instseg_ext.layers.box_nms import class_nms
from instseg_ext.layers.mask_average import AverageOptions, MaskAverages
from instseg_ext.layers.mask_ops import (
    RLEList,
    above,
    chunk_slices,
    empty_boxes,
    masks_per_chunk,
    tight_boxes,
    tight_boxes_within,
)
from instseg_ext.layers.mask_render import hat_weights, render_masks
from instseg_ext.structures.rle import encode_crops

__all__ = ["Voted", "VotingRule", "vote_masks"]

# Pairs of candidate and class that suppression looks at first, as a multiple of the detections.
_FIRST_PAIRS = 32


@dataclass(frozen=True)
class VotingRule:
    """How detections are chosen and their masks averaged.

    Attributes:
        nms_threshold: a box goes when its IoU with a better one of its class is higher.
        voter_iou: IoU with the detection from which a candidate's mask counts; None for masks of
            their own only, which keep the boxes of their candidates.
        mask_threshold: lower bound of a mask pixel, in (0, 1).
        min_score: lower bound of a detection's score, inclusive.
        max_detections: of an image. The authors keep all that tie with the last one.
        binarize: voters are compared with the threshold before they are averaged.
        corner_aligned: how masks are drawn, see ``render_masks``.
        inclusive: whether a pixel of exactly the threshold counts.
        min_side: pixels that the box of a mask must have along both sides.
        reencode: the average is brought back to m x m cells of its tight box and drawn again, as
            the authors do between voting and evaluation.
        binary_cells: these cells are compared with the threshold before they are drawn.
    """

    nms_threshold: float = 0.3
    voter_iou: float | None = 0.5
    mask_threshold: float = 0.4
    min_score: float = 0.0
    max_detections: int = 100
    binarize: bool = False
    corner_aligned: bool = True
    inclusive: bool = False
    min_side: int = 1
    reencode: bool = False
    binary_cells: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ValueError: naming the attribute.
        """
        for name, low in (("nms_threshold", 0.0), ("voter_iou", 0.0), ("mask_threshold", 1e-6)):
            value = getattr(self, name)
            if value is not None and not low <= value < 1:
                raise ValueError(f"{name} must be at least {low:g} and below 1, not {value}.")
        if self.max_detections < 1 or self.min_side < 1:
            raise ValueError(
                "max_detections and min_side must be positive, not "
                f"{self.max_detections} and {self.min_side}."
            )

    @classmethod
    def mnc(cls, *, reencode: bool = False, **changes: Any) -> VotingRule:
        """Return MNC's rule: soft masks are averaged.

        Note:
            The authors draw masks half a cell up and left of where their targets are, which
            bringing the average back to cells undoes in part. Without that, the default, masks are
            drawn in their place.

        Args:
            reencode: as the authors do it, cells cut by the threshold.
            **changes: other attributes.
        """
        own = {"corner_aligned": reencode, "reencode": reencode, "binary_cells": reencode}
        return cls(**{**own, **changes})

    @classmethod
    def fcis(cls, *, min_score: float = 1e-3, **changes: Any) -> VotingRule:
        """Return FCIS's rule: masks are cut by the threshold, then averaged.

        Args:
            min_score: see the attributes.
            **changes: other attributes.
        """
        own = {"binarize": True, "corner_aligned": False, "inclusive": True, "min_side": 2}
        return cls(**{**own, "min_score": min_score, **changes})

    @classmethod
    def own_masks(cls, *, min_score: float = 1e-3, **changes: Any) -> VotingRule:
        """Return the rule without voting: suppression, then each detection's own mask.

        Args:
            min_score: see the attributes.
            **changes: other attributes.
        """
        own = {"voter_iou": None, "corner_aligned": False, "inclusive": True}
        return cls(**{**own, "min_score": min_score, **changes})

    @property
    def strict_threshold(self) -> float:
        """The float32 number that pixels of the mask are greater than."""
        threshold = np.float32(self.mask_threshold)
        return float(np.nextafter(threshold, np.float32(0)) if self.inclusive else threshold)


@dataclass(frozen=True)
class Voted:
    """Detections of one image, by falling score.

    Attributes:
        boxes: (D, 4) float32 XYXY, continuous: those of the masks, or the candidates' own.
        scores: (D,) float32.
        classes: (D,) int64 in [0, K).
        masks: (D, H, W) bool, or their COCO run lengths.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor | RLEList


@torch.no_grad()
def vote_masks(
    boxes: Tensor,
    masks: Tensor,
    scores: Tensor,
    image_size: Sequence[int],
    rule: VotingRule,
    budget_mb: float = 256,
    *,
    output: str = "bool",
) -> Voted:
    """Choose detections among the candidates of an image and average their masks.

    Candidates with a number that is not finite, or an empty box, do not take part. A detection
    whose mask has no pixel, or too few (``VotingRule.min_side``), is dropped; the authors of MNC
    make it one pixel in the middle of the image.

    Args:
        boxes: (C, 4) XYXY, pixels of the image, continuous; clipped to it.
        masks: (C, m, m) in [0, 1], each filling its box; any float dtype.
        scores: (C, K) of the classes without the background.
        image_size: (H, W).
        rule: MNC's or FCIS's.
        budget_mb: MiB of working memory, beside the result. One mask of the image's size is made at
            least.
        output: "bool" or "rle", see ``Voted.masks``.

    Returns:
        At most ``rule.max_detections`` detections, on the device of ``boxes``.

    Raises:
        ValueError: if ``output`` is neither "bool" nor "rle".
    """
    if output not in ("bool", "rle"):
        raise ValueError(f'output must be "bool" or "rle", not {output!r}')
    with torch.autocast(boxes.device.type, enabled=False):
        boxes, masks, scores = boxes.float(), masks.float(), scores.float()
        valid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
        valid &= masks.isfinite().flatten(1).all(dim=1) & scores.isfinite().all(dim=1)
        boxes, masks, scores = boxes[valid], masks[valid], scores[valid]
        candidates, classes = _choose(boxes, scores, rule)
        weights = _weights(boxes, scores, candidates, classes, rule)
        size = (int(image_size[0]), int(image_size[1]))
        tight, drawn = _make_masks(boxes, masks, weights, size, rule, budget_mb, output)
        keep = (tight[:, 2:] - tight[:, :2] >= rule.min_side).all(dim=1).nonzero()[:, 0]
        candidates, classes = candidates[keep], classes[keep]
        own = rule.voter_iou is None
        return Voted(
            boxes=boxes[candidates] if own else tight[keep],
            scores=scores[candidates, classes],
            classes=classes,
            masks=_compact(drawn, keep.tolist()),
        )


def _choose(boxes: Tensor, scores: Tensor, rule: VotingRule) -> tuple[Tensor, Tensor]:
    """Return candidate and class of each detection, (D,) int64 each, by falling score."""
    most, look = rule.max_detections, _FIRST_PAIRS * rule.max_detections
    # A score of zero would leave the voters without weight.
    lowest = max(rule.min_score, torch.finfo(torch.float32).tiny)
    if look < scores.numel():
        # Whether a box survives depends on better ones alone.
        first = max(float(scores.flatten().topk(look).values[-1]), lowest)
        kept = _suppress(boxes, scores, first, rule)
        if len(kept[0]) == most or first == lowest:
            return kept
    return _suppress(boxes, scores, lowest, rule)


def _suppress(
    boxes: Tensor, scores: Tensor, lowest: float, rule: VotingRule
) -> tuple[Tensor, Tensor]:
    """Suppress the pairs of candidate and class that score at least ``lowest``."""
    rows, classes = (scores >= lowest).nonzero(as_tuple=True)
    values = scores[rows, classes]
    kept = class_nms(boxes[rows], values, classes, rule.nms_threshold, rule.max_detections)
    return rows[kept], classes[kept]


def _weights(
    boxes: Tensor, scores: Tensor, candidates: Tensor, classes: Tensor, rule: VotingRule
) -> Tensor:
    """Return what each candidate counts for each detection: (D, C), zero for no voters."""
    if rule.voter_iou is None:
        return torch.nn.functional.one_hot(candidates, len(boxes)).float()
    # In float64, as the authors do: this is a comparison.
    wide = boxes.double()
    voters = box_iou(wide[candidates], wide) >= rule.voter_iou
    weights = scores[:, classes].t().double() * voters
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def _compact(masks: Tensor | RLEList, rows: list[int]) -> Tensor | RLEList:
    """Return the masks of these rows, which rise; a stack is moved together within its memory."""
    if isinstance(masks, RLEList):
        return RLEList(masks[row] for row in rows)
    if len(rows) < len(masks):
        for place, row in enumerate(rows):
            masks[place] = masks[row]
    return masks[: len(rows)]


def _make_masks(
    boxes: Tensor,
    masks: Tensor,
    weights: Tensor,
    image_size: tuple[int, int],
    rule: VotingRule,
    budget_mb: float,
    output: str,
) -> tuple[Tensor, Tensor | RLEList]:
    """Return the (D, 4) tight boxes of all averages, and their masks; see ``vote_masks``.

    What is read back from another device is read once per chunk of detections.
    """
    options = AverageOptions(
        corner_aligned=rule.corner_aligned,
        voter_threshold=rule.strict_threshold if rule.binarize else None,
        mask_threshold=None if rule.reencode else rule.strict_threshold,
    )
    averages = MaskAverages(boxes, masks, weights, image_size, options, budget_mb / 2)
    num, as_rle = len(weights), output == "rle"
    whole = {"dtype": torch.bool, "device": boxes.device}
    stack = torch.zeros((0 if as_rle else num, *image_size), **whole)
    if rule.reencode or as_rle:
        whole["dtype"] = torch.float32 if rule.reencode else torch.bool
        pixel_bytes = 4 if rule.reencode else 1
        per_chunk = masks_per_chunk(pixel_bytes * image_size[0] * image_size[1], budget_mb / 2)
        buffer = torch.zeros((min(num, per_chunk), *image_size), **whole)
    else:
        per_chunk, buffer = max(num, 1), stack
    tight, rles = [empty_boxes(boxes.device)], RLEList()
    for index in chunk_slices(num, per_chunk):
        planes, windows = buffer[: index.stop - index.start], averages.windows[index]
        averages.fill(index, planes if index.start == 0 else planes.zero_())
        crops = _crops(planes, windows)
        if rule.reencode:
            crops, found = _reencode(crops, windows, image_size, masks.shape[-1], rule)
        else:
            found = tight_boxes_within(planes, windows)
        tight.append(found)
        if as_rle:
            for crop, window in zip(_on_host(crops), windows, strict=True):
                rles += encode_crops(crop[None], window[:2], image_size)
        elif rule.reencode:
            for place, crop in zip(_crops(stack[index], windows), crops, strict=True):
                place.copy_(crop)
    return torch.cat(tight), rles if as_rle else stack


def _crops(planes: Tensor, windows: Sequence[tuple[int, int, int, int]]) -> list[Tensor]:
    """Return the window (x1, y1, x2, y2) of each plane, (h, w)."""
    return [plane[y1:y2, x1:x2] for plane, (x1, y1, x2, y2) in zip(planes, windows, strict=True)]


def _on_host(crops: Sequence[Tensor]) -> list[np.ndarray]:
    """Bring (h, w) tensors, at least one, to the CPU in a single copy."""
    if crops[0].device.type == "cpu":
        return [crop.numpy() for crop in crops]
    joined = torch.cat([crop.flatten() for crop in crops]).cpu()
    parts = joined.split([crop.numel() for crop in crops])
    return [part.view(crop.shape).numpy() for part, crop in zip(parts, crops, strict=True)]


def _reencode(
    averages: Sequence[Tensor],
    windows: Sequence[tuple[int, int, int, int]],
    image_size: tuple[int, int],
    size: int,
    rule: VotingRule,
) -> tuple[list[Tensor], Tensor]:
    """Bring averages to m x m cells and draw these, each by itself; see ``_draw_cells``.

    On other devices that is some small steps for each, but none that waits for a result.

    Args:
        averages: n times (h, w) float32.
        windows: n times (x1, y1, x2, y2), the pixels of the image where they are.
        image_size: (H, W).
        size: m.
        rule: of the averages.

    Returns:
        n bool masks and the (n, 4) boxes, in pixels of the image, in which they were drawn.
    """
    drawn, boxes = zip(
        *(
            _draw_cells(average[None], window[:2], image_size, size, rule)
            for average, window in zip(averages, windows, strict=True)
        ),
        strict=True,
    )
    tight = torch.cat(boxes)
    corners = torch.tensor([2 * window[:2] for window in windows]).to(tight)
    return [mask[0] for mask in drawn], tight + corners


def _draw_cells(
    average: Tensor,
    corner: tuple[int, int],
    image_size: tuple[int, int],
    size: int,
    rule: VotingRule,
) -> tuple[Tensor, Tensor]:
    """Bring averages to m x m cells of the tight boxes of their masks, and draw these.

    The cells are read where the rule puts them when it draws, from pixels that are zero beyond
    the window and repeated beyond the image.

    Args:
        average: (d, h, w) float32 on a window of the image.
        corner: left and top pixel of the window.
        image_size: (H, W).
        size: m.
        rule: of the averages.

    Returns:
        (d, h, w) bool masks and their (d, 4) boxes before this, in pixels of the window.
    """
    boxes = tight_boxes(above(average, rule.strict_threshold))
    shift = 0.0 if rule.corner_aligned else 0.5
    cells = torch.arange(size, device=boxes.device) + shift
    weights = []
    for axis in (0, 1):
        step = (boxes[:, axis + 2] - boxes[:, axis]) / size
        points = boxes[:, axis, None] + cells * step[:, None] - shift
        # Pixel 0 of the image lies so far before pixel 0 of the window.
        points.clamp_(-corner[axis], image_size[1 - axis] - 1 - corner[axis])
        weights.append(hat_weights(points, average.shape[2 - axis]))
    coded = weights[1].mT @ average @ weights[0]
    if rule.binary_cells:
        coded = (coded >= rule.mask_threshold).float()
    drawn = render_masks(coded, boxes, average.shape[1:], corner_aligned=False)
    return drawn >= rule.mask_threshold, boxes
