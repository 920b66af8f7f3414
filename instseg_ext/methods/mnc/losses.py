"""Losses of stages 2 and 3, each the mean over images of what one image alone would have.

Shapes: R regions of all images, K classes; background is class K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.nn import smooth_l1_loss
from torch import Tensor

__all__ = ["box_loss", "class_loss", "mask_loss", "row_weights"]


def row_weights(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the weights that make a sum over rows the mean over images of means over rows.

    Args:
        counts: rows of each image.
        device: of the result.

    Returns:
        (sum of counts,) float32. Images without rows count as 0.
    """
    weights = [1 / (count * len(counts)) for count in counts for _ in range(count)]
    return torch.tensor(weights, dtype=torch.float32, device=device)


def class_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the softmax cross entropy of (R, K + 1) logits, summed with ``weights`` (R,)."""
    return (F.cross_entropy(logits.float(), labels, reduction="none") * weights).sum()


def mask_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Return the sigmoid cross entropy of foreground masks.

    Args:
        logits: (F, m, m) of the foreground regions.
        targets: (F, m, m) bool.
        weights: (F,), see ``row_weights``.
    """
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return (loss.mean(dim=(1, 2)) * weights).sum()


def box_loss(
    deltas: Tensor, classes: Tensor, targets: Tensor, weights: Tensor, beta: float
) -> Tensor:
    """Return the smooth L1 loss of the deltas of each foreground region's own class.

    Args:
        deltas: (F, (K + 1) * 4) of the foreground regions.
        classes: (F,) int64 in [0, K).
        targets: (F, 4).
        weights: (F,); published: one over the number of all regions, background too.
        beta: where the loss turns from quadratic to linear.
    """
    rows = torch.arange(len(deltas), device=deltas.device)
    own = deltas.unflatten(1, (-1, 4))[rows, classes].float()
    return (smooth_l1_loss(own, targets, beta, reduction="none").sum(dim=1) * weights).sum()
