"""Losses of YOLACT and YOLACT++.

Shape shorthand: N images, P anchors, K foreground classes (background is the last of K + 1
channels), G objects of an image, M positive anchors, n of them whose masks are compared, k
prototypes of h x w.

All losses but the semantic one are sums over the batch, divided by a ``normalizer`` that the caller
counts: its positive anchors, at least 1. Without a positive anchor they are 0 and still connected
to what they are computed from. Nothing here is weighted, and everything is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instseg_ext.layers.mask_ops import chunk_slices, masks_per_chunk
from instseg_ext.methods.yolact.assembly import assemble_logits, box_windows

__all__ = [
    "MaskPairs",
    "box_loss",
    "class_loss",
    "mask_iou_loss",
    "mask_loss",
    "pair_masks",
    "semantic_loss",
]

# Float copies of ground-truth masks at one time.
_RESIZE_MB = 64


def class_loss(
    logits: Tensor, labels: Tensor, *, neg_pos_ratio: int, normalizer: Tensor | float
) -> Tensor:
    """Sum the cross-entropy of the positive anchors and of the hardest background anchors.

    Hard is what gives background a low probability. Each image adds ``neg_pos_ratio`` background
    anchors per positive one, as far as it has them: an image without positives adds none.

    Args:
        logits: (N, P, K + 1) float.
        labels: (N, P) int64: class in [0, K), K for background, -1 for neutral.
        neg_pos_ratio: background anchors per positive anchor.
        normalizer: divisor.

    Returns:
        0-d float32.
    """
    background = logits.shape[2] - 1
    positive = (labels >= 0) & (labels < background)
    selected = positive | _hardest(
        logits.detach(), labels == background, neg_pos_ratio * positive.sum(dim=1)
    )
    # Only these rows, a few percent of all, take part in the graph.
    total = F.cross_entropy(logits[selected].float(), labels[selected], reduction="sum")
    return total / normalizer


def _hardest(logits: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """Select, in each image, the ``counts`` candidates least probable to be background.

    Args:
        logits: (N, P, K + 1), without gradient.
        candidates: (N, P) bool.
        counts: (N,) int64; all candidates are selected where there are fewer.

    Returns:
        (N, P) bool.
    """
    # Row by row: one maximum for all rows, as in the authors' code, would underflow in some.
    hardness = -logits.float().log_softmax(dim=2)[..., -1]
    hardness.masked_fill_(~candidates, -torch.inf)
    most = min(int(counts.max()), candidates.shape[1])
    rows = hardness.topk(most, dim=1).indices
    within = torch.arange(most, device=counts.device) < counts[:, None]
    return torch.zeros_like(candidates).scatter_(1, rows, within) & candidates


def box_loss(deltas: Tensor, targets: Tensor, *, normalizer: Tensor | float) -> Tensor:
    """Sum the smooth L1 distance (quadratic below 1) over positive anchors and coordinates.

    Args:
        deltas: (M, 4) float, predicted.
        targets: (M, 4) float32, from ``box_coding.encode``.
        normalizer: divisor.

    Returns:
        0-d float32.
    """
    return F.smooth_l1_loss(deltas.float(), targets, reduction="sum") / normalizer


class MaskPairs(NamedTuple):
    """Predicted and true masks of some positive anchors of one image.

    Attributes:
        logits: (n, h, w) float32, of the whole image.
        outside: (n, h, w) bool: not in the padded window of the object's box.
        targets: (n, h, w) bool, of the whole image.
        classes: (n,) int64.
        weights: (n,) float32: share of a mask's summed cost in the mask loss.
    """

    logits: Tensor
    outside: Tensor
    targets: Tensor
    classes: Tensor
    weights: Tensor

    def probs(self, select: Tensor) -> Tensor:
        """Return the (m, h, w) probabilities of selected masks, 0 outside their windows.

        Args:
            select: (n,) bool.
        """
        return self.logits[select].masked_fill_(self.outside[select], -torch.inf).sigmoid_()


def pair_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    matched: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_masks: Tensor,
    *,
    max_masks: int,
) -> MaskPairs:
    """Assemble the masks of an image's positive anchors beside those of their objects.

    Of more than ``max_masks`` anchors a random subset stands for all: its weights grow so that the
    expected loss stays.

    Args:
        prototypes: (k, h, w) float.
        coefficients: (M, k) float, of the positive anchors; M may be 0.
        matched: (M,) int64, the object of each.
        gt_boxes: (G, 4) float32 XYXY, normalised by the network input.
        gt_classes: (G,) int64.
        gt_masks: (G, H, W) bool, at the size of the network input.
        max_masks: limit of n.

    Returns:
        See `MaskPairs`. An object whose box has no area gets the weight 0.
    """
    num_positive, size_hw = len(matched), tuple(prototypes.shape[1:])
    if num_positive > max_masks:
        subset = torch.randperm(num_positive, device=matched.device)[:max_masks]
        coefficients, matched = coefficients[subset], matched[subset]

    rows, cols = box_windows(gt_boxes, size_hw)
    sides = gt_boxes[:, 2:] - gt_boxes[:, :2]
    areas = sides.prod(dim=1) * (size_hw[0] * size_hw[1])  # of the box itself, not of the window
    weights = torch.where(areas > 0, num_positive / max(len(matched), 1) / areas, 0)
    return MaskPairs(
        logits=assemble_logits(prototypes, coefficients),
        outside=~(rows[matched, :, None] & cols[matched, None, :]),
        targets=_resize(gt_masks, size_hw)[matched],
        classes=gt_classes[matched],
        weights=weights[matched],
    )


def mask_loss(pairs: Sequence[MaskPairs], *, normalizer: Tensor | float) -> Tensor:
    """Sum the binary cross-entropy in the window of each mask, divided by the area of its box.

    Args:
        pairs: one per image.
        normalizer: divisor.

    Returns:
        0-d float32.

    Note:
        The authors compute it from probabilities, which are 0 outside the window and never cost
        more than 100: a pixel of the object outside adds this constant to their value. Their
        gradient is the same, except that a saturated sigmoid has none.
    """
    total = sum((_mask_costs(p) * p.weights).sum() for p in pairs)
    return total / normalizer


def _mask_costs(pairs: MaskPairs) -> Tensor:
    """Return the (n,) sums of the binary cross-entropy over the windows.

    The cost of a pixel is softplus of its logit, or of minus it on the object. Minus infinity
    outside the window costs nothing, in value and gradient, and needs no weight map.
    """
    against = torch.where(pairs.targets, -pairs.logits, pairs.logits)
    return F.softplus(against.masked_fill_(pairs.outside, -torch.inf)).sum(dim=(1, 2))


def semantic_loss(logits: Tensor, masks: Sequence[Tensor], classes: Sequence[Tensor]) -> Tensor:
    """Sum the binary cross-entropy over classes, and average it over pixels and images.

    The target of a class is the union of the masks of its objects. Crowds belong to none.

    Args:
        logits: (N, K, h, w) float.
        masks: per image (G, H, W) bool, at the size of the network input, without crowds.
        classes: per image (G,) int64.

    Returns:
        0-d float32; K ln 2 for logits of zero.
    """
    num_images, _, height, width = logits.shape
    targets = torch.zeros(logits.shape, device=logits.device)
    for target, image_masks, image_classes in zip(targets, masks, classes, strict=True):
        target.index_add_(0, image_classes, _resize(image_masks, (height, width)).float())
    total = F.binary_cross_entropy_with_logits(
        logits.float(), targets.clamp_(max=1), reduction="sum"
    )
    return total / (num_images * height * width)


def mask_iou_loss(
    network: nn.Module,
    pairs: Sequence[MaskPairs],
    *,
    min_area: float,
    normalizer: Tensor | float,
) -> Tensor:
    """Sum the smooth L1 distance between predicted and true IoU (Sec. 6.1 of arXiv:1912.06218).

    The true IoU is that of the mask inside the window, probabilities above 0.5, with the whole
    object. The prediction is the one for the object's class. Its gradient also reaches coefficients
    and prototypes, as in the authors' code.

    Args:
        network: maps (m, 1, h, w) masks to (m, K) predictions.
        pairs: one per image.
        min_area: objects of at most this many pixels, at the prototypes' size, are left out.
        normalizer: divisor, the same as of the other losses, whatever is left out.

    Returns:
        0-d float32; 0, and connected to the network's parameters, when nothing is left.
    """
    large = [p.targets.sum(dim=(1, 2)) > min_area for p in pairs]
    probs = torch.cat([p.probs(select) for p, select in zip(pairs, large, strict=True)])
    if not len(probs):
        return torch.stack([p.sum().float() for p in network.parameters()]).sum() * 0
    targets = torch.cat([p.targets[select] for p, select in zip(pairs, large, strict=True)])
    classes = torch.cat([p.classes[select] for p, select in zip(pairs, large, strict=True)])
    predicted = network(probs[:, None]).gather(1, classes[:, None]).squeeze(1)
    distance = F.smooth_l1_loss(predicted.float(), _mask_iou(probs, targets), reduction="sum")
    return distance / normalizer


@torch.no_grad()
def _mask_iou(probs: Tensor, targets: Tensor) -> Tensor:
    """Return the (m,) IoU of masks and their targets, which are not empty."""
    masks = probs > 0.5
    common = (masks & targets).sum(dim=(1, 2))
    return common / (masks | targets).sum(dim=(1, 2))


def _resize(masks: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Resize (G, H, W) bool masks bilinearly, without antialiasing; above one half is set."""
    out = torch.empty((len(masks), *size_hw), dtype=torch.bool, device=masks.device)
    step = masks_per_chunk(4 * masks.shape[1] * masks.shape[2], _RESIZE_MB)
    for part in chunk_slices(len(masks), step):
        floats = masks[part, None].float()
        resized = F.interpolate(floats, size_hw, mode="bilinear", align_corners=False)
        out[part] = resized[:, 0] > 0.5
    return out
