"""From raw outputs to the detections of one image, as centres with distances.

Shape shorthand: P locations, K classes, R rays, n candidates, D detections. Coordinates are pixel
indices (x, y), those of boxes inclusive at both ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.layers.box_nms import class_nms
from instseg_ext.methods.polarmask.head import distances
from instseg_ext.methods.polarmask.polygons import decode_polygons

__all__ = ["Detections", "Frame", "InferenceOptions", "detect"]


@dataclass(frozen=True)
class InferenceOptions:
    """Thresholds of inference; see the config keys of the same names.

    Attributes:
        score_thresh: probability a class must exceed.
        centerness_bias: added to the centerness before it multiplies the probability.
        nms_pre: best locations of each level that stay.
        nms_thresh: most overlap with a better box.
        nms_on: ``box``: boxes of the box branch; ``mask``: boxes around the polygons.
        max_detections: most detections per image.
    """

    score_thresh: float = 0.05
    centerness_bias: float = 0.5
    nms_pre: int = 1000
    nms_thresh: float = 0.5
    nms_on: str = "box"
    max_detections: int = 100

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the key.
        """
        check_choice("MODEL.POLARMASK.NMS_ON", self.nms_on, ("box", "mask"))
        if self.nms_pre < 1:
            raise ValueError(f"MODEL.POLARMASK.NMS_PRE must be positive, not {self.nms_pre}.")
        if self.max_detections < 1:
            raise ValueError(
                f"TEST.DETECTIONS_PER_IMAGE must be positive, not {self.max_detections}."
            )


@dataclass(frozen=True)
class Frame:
    """The two sizes of an image, and how coordinates go from one to the other.

    Attributes:
        input_hw: height and width of the network input, before padding.
        output_hw: height and width of the results.
        coordinates: ``indices`` or ``areas``; see the config key of the same name.
    """

    input_hw: tuple[int, int]
    output_hw: tuple[int, int]
    coordinates: str = "indices"

    def boxes(self, inclusive: Tensor) -> Tensor:
        """Carry (n, 4) boxes to the results, the far sides then exclusive."""
        end = inclusive.new_tensor([0, 0, 1, 1])
        if self.coordinates == "areas":
            return self._divide(inclusive + end)
        return self._divide(inclusive) + end

    def polygons(self, tips: Tensor) -> Tensor:
        """Carry (n, R, 2) pixel indices to the results."""
        if self.coordinates == "areas":
            return self._divide(tips + 0.5) - 0.5
        return self._divide(tips)

    def _divide(self, x: Tensor) -> Tensor:
        # By factors in float32, as the authors do: vertices are then cut to integers, where the
        # last bit may matter.
        factors = [a / b for a, b in zip(self.input_hw[::-1], self.output_hw[::-1], strict=True)]
        return x / x.new_tensor(factors).repeat(x.shape[-1] // 2)


@dataclass(frozen=True)
class Detections:
    """Detections of one image, by falling score.

    Attributes:
        boxes: (D, 4) float32, inclusive, in pixels of the network input: those that NMS compared.
        scores: (D,) float32; they may exceed 1.
        classes: (D,) int64 in [0, K).
        points: (D, 2) float32, the locations in pixels of the network input.
        distances: (D, R) float32 lengths of the rays in pixels of the network input; None without
            the mask branch.
        locations: (D,) int64 in [0, P), the location of each; one may give several classes.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    points: Tensor
    distances: Tensor | None
    locations: Tensor


@torch.no_grad()
def detect(
    class_logits: Tensor,
    ctr_logits: Tensor | None,
    box_logs: Tensor | None,
    ray_logs: Tensor | None,
    *,
    points: Tensor,
    level_counts: tuple[int, ...],
    directions: Tensor,
    frame: Frame,
    options: InferenceOptions,
) -> Detections:
    """Select the detections of one image (Sec. 3.2 of arXiv:1909.13226).

    Args:
        class_logits: (P, K).
        ctr_logits: (P,) or None.
        box_logs: (P, 4) or None.
        ray_logs: (P, R) or None.
        points: (P, 2) of the locations.
        level_counts: locations of each level; their sum is P.
        directions: (R, 2) of the rays.
        frame: NMS compares boxes at the size of the results.
        options: thresholds.

    Returns:
        See ``Detections``; possibly none. Locations with logits that are no numbers or distances
        that are not finite give none.
    """
    quality = None if ctr_logits is None else ctr_logits.float().sigmoid()
    location = _candidate_locations(class_logits, quality, level_counts, options)
    sides = None if box_logs is None else distances(box_logs[location])
    rays = None if ray_logs is None else distances(ray_logs[location])
    usable = torch.ones_like(location, dtype=torch.bool)
    for lengths in (sides, rays):
        if lengths is not None:
            usable &= lengths.isfinite().all(dim=1)
    probs = class_logits[location].float().sigmoid()
    row, classes = ((probs > options.score_thresh) & usable[:, None]).nonzero(as_tuple=True)
    scores = probs[row, classes]
    if quality is not None:
        scores = scores * (quality[location[row]] + options.centerness_bias)
    if options.nms_on == "box":
        boxes = _boxes_from_sides(points[location], sides, frame.input_hw)
    else:
        boxes = _boxes_around(decode_polygons(points[location], rays, directions, frame.input_hw))
    kept = class_nms(
        frame.boxes(boxes[row]), scores, classes, options.nms_thresh, options.max_detections
    )
    row = row[kept]
    return Detections(
        boxes=boxes[row],
        scores=scores[kept],
        classes=classes[kept],
        points=points[location[row]],
        distances=None if rays is None else rays[row],
        locations=location[row],
    )


def _candidate_locations(
    class_logits: Tensor,
    quality: Tensor | None,
    level_counts: tuple[int, ...],
    options: InferenceOptions,
) -> Tensor:
    """Return the locations that can give a detection, in order."""
    best = class_logits.amax(dim=1).float()
    rank = best.sigmoid() if quality is None else best.sigmoid() * quality
    # Behind all others; topk would take NaN for the largest value.
    rank = rank.nan_to_num(nan=-1.0)
    chosen, start = torch.zeros_like(best, dtype=torch.bool), 0
    for level in rank.split(level_counts):
        count = len(level)
        if count > options.nms_pre:
            chosen[start + level.topk(options.nms_pre).indices] = True
        else:
            chosen[start : start + count] = True
        start += count
    chosen &= rank >= 0
    if 0 < options.score_thresh < 1:
        # The margin covers the rounding of the sigmoid.
        needed = math.log(options.score_thresh / (1 - options.score_thresh)) - 1e-3
        chosen &= best > needed
    return chosen.nonzero().squeeze(1)


def _boxes_from_sides(points: Tensor, sides: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Return (n, 4) boxes from (n, 4) distances to their sides, cut at the border."""
    corners = torch.cat([points - sides[:, :2], points + sides[:, 2:]], dim=1)
    height, width = size_hw
    limit = corners.new_tensor([width - 1, height - 1]).repeat(2)
    return torch.minimum(corners.clamp(min=0), limit)


def _boxes_around(polygons: Tensor) -> Tensor:
    """Return the (n, 4) boxes around (n, R, 2) polygons."""
    return torch.cat([polygons.amin(dim=1), polygons.amax(dim=1)], dim=1)
