"""From raw outputs to the detections of one image, still on the prototypes.

Shape shorthand: P anchors, K foreground classes (background is the last of K + 1 channels), k
prototypes, R detections. Boxes are XYXY, normalised by the network input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from instseg_ext.methods.yolact.box_coding import decode
from instseg_ext.methods.yolact.nms import NMSOptions, suppress

__all__ = ["Detections", "InferenceOptions", "detect"]


@dataclass(frozen=True)
class InferenceOptions:
    """Thresholds of inference; see the config keys of the same names.

    Attributes:
        score_thresh: probability an anchor's best class must exceed.
        mask_thresh: probability a mask pixel must exceed.
        nms: suppression and the number of detections.
    """

    score_thresh: float = 0.05
    mask_thresh: float = 0.5
    nms: NMSOptions = field(default_factory=NMSOptions)


@dataclass(frozen=True)
class Detections:
    """Detections of one image, sorted by falling score.

    Attributes:
        boxes: (R, 4) float32, not clipped to the image.
        scores: (R,) float32 class probabilities.
        classes: (R,) int64 in [0, K).
        coefficients: (R, k) float32.
        anchors: (R,) int64, the anchor of each; one anchor may give several classes.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    coefficients: Tensor
    anchors: Tensor


@torch.no_grad()
def detect(
    class_logits: Tensor,
    box_deltas: Tensor,
    coefficients: Tensor,
    anchors: Tensor,
    *,
    input_hw: tuple[int, int],
    options: InferenceOptions,
) -> Detections:
    """Select the detections of one image (Sec. 3.3 and 5 of arXiv:1904.02689).

    Args:
        class_logits: (P, K + 1).
        box_deltas: (P, 4) as ``box_coding.encode`` makes them.
        coefficients: (P, k).
        anchors: (P, 4) centre and size.
        input_hw: size of the network input in pixels, to which traditional NMS refers.
        options: thresholds.

    Returns:
        See ``Detections``; possibly none. Anchors with a value that is not finite give none.
    """
    logits = class_logits.float()
    candidates = _candidates(logits, options.score_thresh)
    scores = logits[candidates].softmax(dim=1)[:, :-1]
    boxes = decode(box_deltas[candidates].float(), anchors[candidates])
    usable = scores.amax(dim=1) > options.score_thresh
    usable &= boxes.isfinite().all(dim=1) & coefficients[candidates].isfinite().all(dim=1)
    candidates, scores, boxes = candidates[usable], scores[usable], boxes[usable]
    chosen, classes, scores = suppress(
        boxes, scores, input_hw=input_hw, score_thresh=options.score_thresh, options=options.nms
    )
    return Detections(
        boxes=boxes[chosen],
        scores=scores,
        classes=classes,
        coefficients=coefficients[candidates[chosen]].float(),
        anchors=candidates[chosen],
    )


def _candidates(logits: Tensor, threshold: float) -> Tensor:
    """Return the anchors whose best class can have a probability above the threshold.

    Against the background alone a class needs a logit this much higher, and more classes only
    lower its probability: the softmax is left to the few anchors that pass.
    """
    if threshold <= 0:
        return torch.arange(len(logits), device=logits.device)
    # The margin covers the rounding of the softmax.
    needed = math.log(threshold / (1 - threshold)) - 1e-3 if threshold < 1 else math.inf
    return (logits[:, :-1].amax(dim=1) - logits[:, -1] > needed).nonzero().squeeze(1)
