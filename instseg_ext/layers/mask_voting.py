"""Mask voting of MNC and FCIS: every detection's mask is an average over the boxes that overlap it.

Boxes are suppressed within each class. For each of the best that are left, all candidates whose
boxes overlap its box, suppressed or not, are voters; their masks are drawn into the image and
averaged with their scores of the class as weights.

Detections that share voters are made together, on the window that these cover, so that a mask is
drawn once for all of them and nothing has the size of the image but the result.

Shapes: C candidates with masks of m x m, K classes, D detections, H x W image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from instseg_ext.layers.box_nms import class_nms
from instseg_ext.layers.mask_ops import RLEList, above, chunk_slices, tight_boxes
from instseg_ext.layers.mask_render import axis_weights, hat_weights, pixel_boxes, render_masks
from instseg_ext.structures.rle import encode_crops

__all__ = ["Voted", "VotingRule", "vote_masks"]

_CACHED = 2**18  # drawn pixels at a time on the CPU: 1 MiB, read again at once
_SHARED = 0.5  # of a detection's voters must be drawn for another one, to be made with it


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
            The authors draw masks half a cell up and left of where training puts them, and read
            them as far down and right when they bring the average back to cells. Without that, the
            default, they are drawn in their place at once.

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
        """The number that pixels of the mask are greater than."""
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
        budget_mb: MiB of working memory, beside the result. A single detection's window may take
            more in an image that is larger than that.
        output: "bool" or "rle", see ``Voted.masks``.

    Returns:
        At most ``rule.max_detections`` detections, on the device of ``boxes``.
    """
    boxes, masks, scores = boxes.detach().float(), masks.detach().float(), scores.detach().float()
    valid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
    valid &= masks.isfinite().flatten(1).all(dim=1) & scores.isfinite().all(dim=1)
    boxes, masks, scores = boxes[valid], masks[valid], scores[valid]
    candidates, classes = _choose(boxes, scores, rule)
    weights = _weights(boxes, scores, candidates, classes, rule)
    size = (int(image_size[0]), int(image_size[1]))
    canvas = _Canvas(len(candidates), size, output, boxes.device)
    drawer = _Drawer(boxes, masks, weights, size, rule, int(budget_mb * 2**20))
    for group in _groups(weights, boxes, size, drawer.most_pixels):
        canvas.put(group, *drawer(group))
    keep, tight, drawn = canvas.finish(rule.min_side)
    if rule.voter_iou is None:
        tight = boxes[candidates[keep]]
    candidates, classes = candidates[keep], classes[keep]
    return Voted(tight, scores[candidates, classes], classes, drawn)


def _choose(boxes: Tensor, scores: Tensor, rule: VotingRule) -> tuple[Tensor, Tensor]:
    """Return candidate and class of each detection, (D,) int64 each, by falling score."""
    # A score of zero would leave the voters without weight.
    rows, classes = ((scores >= rule.min_score) & (scores > 0)).nonzero(as_tuple=True)
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
    weights = scores.t()[classes].double() * voters
    return (weights / weights.sum(dim=1, keepdim=True)).float()


@dataclass(frozen=True)
class _Group:
    """Detections to be made together.

    Attributes:
        detections: their rows.
        voters: rows of all their voters among the candidates.
        window: (x1, y1, x2, y2), the whole pixels that these can reach.
    """

    detections: np.ndarray
    voters: np.ndarray
    window: tuple[int, int, int, int]


def _groups(
    weights: Tensor, boxes: Tensor, image_size: tuple[int, int], most_pixels: int
) -> Iterator[_Group]:
    """Put detections together that share most of their voters.

    Args:
        weights: (D, C).
        boxes: (C, 4).
        image_size: (H, W).
        most_pixels: of the windows of a group's detections together, unless it is a single one.
    """
    # The only copy from the device before the masks are done.
    votes, corners = (weights > 0).cpu().numpy(), boxes.cpu().numpy()
    corners = np.concatenate([np.floor(corners[:, :2]), np.ceil(corners[:, 2:])], axis=1)
    corners = np.clip(corners, 0, [image_size[1], image_size[0]] * 2).astype(np.int64)
    shared = votes.astype(np.float32) @ votes.T.astype(np.float32)
    like = shared >= _SHARED * shared.diagonal()
    waiting = np.ones(len(votes), dtype=bool)
    for leader in range(len(votes)):
        if not waiting[leader]:
            continue
        members = np.flatnonzero(like[leader] & waiting)
        waiting[members] = False
        pending = [members]
        while pending:
            rows = pending.pop()
            voters = np.flatnonzero(votes[rows].any(axis=0))
            x1, y1 = corners[voters, :2].min(axis=0).tolist()
            x2, y2 = corners[voters, 2:].max(axis=0).tolist()
            pixels = max(x2 - x1, 0) * max(y2 - y1, 0)
            if len(rows) > 1 and len(rows) * pixels > most_pixels:
                pending += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
            elif pixels:
                yield _Group(rows, voters, (x1, y1, x2, y2))


class _Drawer:
    """Makes the masks of a group."""

    def __init__(
        self,
        boxes: Tensor,
        masks: Tensor,
        weights: Tensor,
        image_size: tuple[int, int],
        rule: VotingRule,
        budget: int,
    ) -> None:
        self._boxes = boxes if rule.corner_aligned else pixel_boxes(boxes)
        self._masks, self._weights = masks, weights
        self._image_size, self._rule = image_size, rule
        # The sums, the masks, and as much again for what is drawn at a time.
        self.most_pixels = max(1, budget // 16)
        self._at_once = self.most_pixels
        if boxes.device.type == "cpu":
            self._at_once = min(self._at_once, _CACHED)

    def __call__(self, group: _Group) -> tuple[Tensor, Tensor]:
        """Return masks and boxes on the window: (d, h, w) bool and (d, 4) float32.

        The boxes are tight around the averages, also when these are re-encoded.
        """
        average = self._average(group)
        masks = above(average, self._rule.strict_threshold)
        boxes = tight_boxes(masks)
        if self._rule.reencode:
            masks = self._reencode(average, boxes, group.window)
        return masks, boxes

    def _average(self, group: _Group) -> Tensor:
        """Return (d, h, w) float32 averages of the voters on the window."""
        device, rule = self._boxes.device, self._rule
        x1, y1, x2, y2 = group.window
        height, width, size = y2 - y1, x2 - x1, self._masks.shape[-1]
        voters = torch.from_numpy(group.voters).to(device)
        weights = self._weights[torch.from_numpy(group.detections).to(device)][:, voters]
        total = weights.new_zeros(len(weights), height * width)
        per_part = max(1, self._at_once // (size * max(height, width)))
        for part in chunk_slices(len(voters), per_part):
            left, top, right, bottom = self._boxes[voters[part]].unbind(1)
            aligned = {"corner_aligned": rule.corner_aligned}
            rows = axis_weights(top, bottom, size, y1, y2, **aligned) @ self._masks[voters[part]]
            cols = axis_weights(left, right, size, x1, x2, **aligned).mT
            per_band = max(1, self._at_once // (len(left) * width))
            for band in chunk_slices(height, per_band):
                drawn = rows[:, band] @ cols
                if rule.binarize:
                    drawn = above(drawn, rule.strict_threshold).float()
                pixels = slice(band.start * width, band.stop * width)
                total[:, pixels].addmm_(weights[:, part], drawn.flatten(1))
        return total.unflatten(1, (height, width))

    def _reencode(self, average: Tensor, boxes: Tensor, window: tuple[int, ...]) -> Tensor:
        """Bring averages to m x m cells of their tight boxes and draw these.

        The cells are read where ``_average`` draws them, from pixels that are zero beyond the
        window and repeated beyond the image.

        Args:
            average: (d, h, w) float32.
            boxes: (d, 4) tight around the masks, in pixels of the window.
            window: (x1, y1, x2, y2) in the image.

        Returns:
            (d, h, w) bool, nothing in an empty box.
        """
        rule, size = self._rule, self._masks.shape[-1]
        shift = 0.0 if rule.corner_aligned else 0.5
        cells = torch.arange(size, device=boxes.device) + shift
        weights = []
        for axis in (0, 1):
            step = (boxes[:, axis + 2] - boxes[:, axis]) / size
            points = boxes[:, axis, None] + cells * step[:, None] - shift
            # Pixel 0 of the image is left of the window's, whose pixel 0 the boxes count from.
            points.clamp_(-window[axis], self._image_size[1 - axis] - 1 - window[axis])
            weights.append(hat_weights(points, average.shape[2 - axis]))
        coded = weights[1] @ average @ weights[0].mT
        if rule.binary_cells:
            coded = (coded >= rule.mask_threshold).float()
        drawn = render_masks(coded, boxes, average.shape[1:], corner_aligned=False)
        return drawn >= rule.mask_threshold


class _Canvas:
    """Collects the masks of an image as they are made, in any order."""

    def __init__(
        self, num: int, image_size: tuple[int, int], output: str, device: torch.device
    ) -> None:
        """Start with D empty masks.

        Raises:
            ValueError: if ``output`` is neither "bool" nor "rle".
        """
        if output not in ("bool", "rle"):
            raise ValueError(f'output must be "bool" or "rle", not {output!r}')
        self._image_size = image_size
        self._rles: list[Any] | None = [None] * num if output == "rle" else None
        shape = (num, *image_size) if output == "bool" else (0, *image_size)
        self._stack = torch.zeros(shape, dtype=torch.bool, device=device)
        self._boxes = torch.zeros((num, 4), device=device)

    def put(self, group: _Group, masks: Tensor, boxes: Tensor) -> None:
        """Keep the masks and boxes of a group, (d, h, w) bool and (d, 4) on its window."""
        x1, y1, x2, y2 = group.window
        rows = torch.from_numpy(group.detections).to(masks.device)
        self._boxes[rows] = boxes + boxes.new_tensor([x1, y1] * 2)
        if self._rles is None:
            self._stack[rows, y1:y2, x1:x2] = masks
            return
        coded = encode_crops(masks.cpu().numpy(), (x1, y1), self._image_size)
        for row, rle in zip(group.detections.tolist(), coded, strict=True):
            self._rles[row] = rle

    def finish(self, min_side: int) -> tuple[Tensor, Tensor, Tensor | RLEList]:
        """Return the rows that are left, their boxes and their masks.

        Args:
            min_side: pixels that a box must have along both sides.
        """
        sides = self._boxes[:, 2:] - self._boxes[:, :2]
        keep = (sides >= min_side).all(dim=1).nonzero()[:, 0]
        if self._rles is not None:
            return keep, self._boxes[keep], RLEList(self._rles[i] for i in keep.tolist())
        if len(keep) < len(self._boxes):
            # Rows move up one by one: a second stack would double the memory.
            for row, kept in enumerate(keep.tolist()):
                self._stack[row] = self._stack[kept]
        return keep, self._boxes[keep], self._stack[: len(keep)]
