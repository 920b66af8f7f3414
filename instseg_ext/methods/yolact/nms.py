"""The three ways of YOLACT to suppress duplicates.

Shape shorthand: n anchors, K classes, M (anchor, class) pairs by falling score. Boxes are XYXY,
normalised by the network input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import nms

__all__ = ["NMS_TYPES", "NMSOptions", "suppress"]

NMS_TYPES = ("fast", "cross_class", "traditional")
# Pairs that fast NMS looks at first, as a multiple of the detections wanted.
_FIRST_LOOK = 4


@dataclass(frozen=True)
class NMSOptions:
    """How duplicates are suppressed; see the config keys of ``MODEL.YOLACT.NMS``.

    Attributes:
        kind: one of ``NMS_TYPES``.
        threshold: most overlap with a better box.
        topk: best boxes that enter fast NMS.
        second_threshold: each pair needs more than the score threshold in fast NMS, too.
        max_detections: most detections per image.
    """

    kind: str = "fast"
    threshold: float = 0.5
    topk: int = 200
    second_threshold: bool = False
    max_detections: int = 100

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the key.
        """
        if self.kind not in NMS_TYPES:
            raise ValueError(
                f"MODEL.YOLACT.NMS.TYPE must be one of {NMS_TYPES}, not {self.kind!r}."
            )
        if self.topk < 1:
            raise ValueError(f"MODEL.YOLACT.NMS.TOPK must be positive, not {self.topk}.")
        if self.max_detections < 1:
            raise ValueError(
                f"TEST.DETECTIONS_PER_IMAGE must be positive, not {self.max_detections}."
            )


def suppress(
    boxes: Tensor,
    scores: Tensor,
    *,
    input_hw: tuple[int, int],
    score_thresh: float,
    options: NMSOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best (anchor, class) pairs that no better pair suppresses.

    Args:
        boxes: (n, 4).
        scores: (n, K) class probabilities.
        input_hw: size of the network input in pixels, to which ``traditional`` refers.
        score_thresh: least probability of a pair in ``traditional`` and with the second threshold;
            strict.
        options: how.

    Returns:
        Row of ``boxes``, class and score of at most ``max_detections`` pairs, by falling score.
    """
    if not len(boxes):
        nothing = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return nothing, nothing, scores.new_zeros(0)
    if options.kind == "cross_class":
        return _cross_class_nms(boxes, scores, options)
    if options.kind == "traditional":
        return _traditional_nms(boxes, scores, input_hw, score_thresh, options)
    return _fast_nms(boxes, scores, score_thresh, options)


def _pairwise_iou(boxes: Tensor) -> Tensor:
    """Return the (..., m, m) IoU of (..., m, 4) boxes; NaN between two boxes without area."""
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    area = (x1 - x0) * (y1 - y0)
    common = _common_length(x0, x1).mul_(_common_length(y0, y1))
    return common / (area[..., :, None] + area[..., None, :]).sub_(common)


def _common_length(low: Tensor, high: Tensor) -> Tensor:
    """Return the (..., m, m) length that each two of (..., m) intervals share."""
    start = torch.maximum(low[..., :, None], low[..., None, :])
    end = torch.minimum(high[..., :, None], high[..., None, :])
    return end.sub_(start).clamp_(min=0)


def _survivors(boxes: Tensor, threshold: float) -> Tensor:
    """Tell which of (..., m, 4) boxes, sorted by falling score, overlap no better one too much.

    Boxes that are suppressed suppress others, too: that is what makes this NMS fast (Sec. 5).
    """
    overlap = _pairwise_iou(boxes).triu_(diagonal=1)
    return overlap.amax(dim=-2) <= threshold


def _fast_nms(
    boxes: Tensor, scores: Tensor, score_thresh: float, options: NMSOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress within each class and return the best pairs of all classes.

    Whether a pair survives depends on better pairs alone. So the pairs are looked at from the best
    one down, until enough have survived; seldom more than a few hundred.
    """
    num_classes = scores.shape[1]
    flat = scores.flatten()
    look = min(len(flat), max(1, _FIRST_LOOK * options.max_detections))
    while True:
        best, pairs = flat.topk(look)
        rows = pairs.div(num_classes, rounding_mode="floor")
        classes = pairs % num_classes
        keep = _keep_in_class(boxes[rows], classes, num_classes, options)
        if options.second_threshold:
            keep &= best > score_thresh
        kept = keep.nonzero().squeeze(1)[: options.max_detections]
        if len(kept) == options.max_detections or look == len(flat):
            return rows[kept], classes[kept], best[kept]
        look = min(len(flat), 4 * look)


def _keep_in_class(boxes: Tensor, classes: Tensor, num_classes: int, options: NMSOptions) -> Tensor:
    """Tell which of (M, 4) boxes by falling score survive among those of their class, (M,) bool."""
    by_class = classes.sort(stable=True)
    counts = classes.bincount(minlength=num_classes)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(classes), device=classes.device) - starts[by_class.values]
    inside = rank < options.topk
    pairs, rank, group = by_class.indices[inside], rank[inside], by_class.values[inside]
    longest = int(rank.max()) + 1
    # A row per class, best box first. Boxes of no area fill the ends, where they suppress nothing.
    table = boxes.new_zeros((num_classes, longest, 4))
    table[group, rank] = boxes[pairs]
    present = counts.nonzero().squeeze(1)
    kept = torch.zeros((num_classes, longest), dtype=torch.bool, device=boxes.device)
    kept[present] = _survivors(table[present], options.threshold)
    keep = torch.zeros_like(classes, dtype=torch.bool)
    keep[pairs] = kept[group, rank]
    return keep


def _cross_class_nms(
    boxes: Tensor, scores: Tensor, options: NMSOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress across classes, each anchor standing for its best class."""
    best, classes = scores.max(dim=1)
    order = best.sort(descending=True, stable=True).indices[: options.topk]
    keep = _survivors(boxes[order], options.threshold)
    rows = order[keep][: options.max_detections]
    return rows, classes[rows], best[rows]


def _traditional_nms(
    boxes: Tensor,
    scores: Tensor,
    input_hw: tuple[int, int],
    score_thresh: float,
    options: NMSOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress greedily within each class.

    The authors' rule counts pixels: a box from x0 to x1 is x1 - x0 + 1 wide, and a box goes at an
    overlap of ``threshold`` or more.
    """
    height, width = input_hw
    pixels = boxes * boxes.new_tensor([width, height, width, height])
    pixels[:, 2:] += 1
    # The operator suppresses strictly above its threshold.
    below = torch.nextafter(torch.tensor(options.threshold), torch.tensor(0.0)).item()
    above = scores > score_thresh
    nothing = above.new_zeros(0, dtype=torch.int64)
    rows, classes = [nothing], [nothing]
    for label in above.any(dim=0).nonzero().squeeze(1).tolist():
        own = above[:, label].nonzero().squeeze(1)
        kept = own[nms(pixels[own], scores[own, label], below)]
        rows.append(kept)
        classes.append(torch.full_like(kept, label))
    rows, classes = torch.cat(rows), torch.cat(classes)
    best, order = scores[rows, classes].sort(descending=True, stable=True)
    order = order[: options.max_detections]
    return rows[order], classes[order], best[: options.max_detections]
