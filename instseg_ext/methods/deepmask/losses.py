"""Losses of DeepMask and SharpMask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["enlarge", "mean_loss"]


def enlarge(logits: Tensor, size: int) -> Tensor:
    """Resize (n, m, m) mask logits to (n, size, size), linearly with the corners in place."""
    if logits.shape[-1] == size:
        return logits
    return F.interpolate(
        logits[:, None], size=(size, size), mode="bilinear", align_corners=True
    ).squeeze(1)


def mean_loss(logits: Tensor, positive: Tensor | None) -> Tensor:
    """Return the mean of log(1 + exp(-y x)) with y = 1 where ``positive``, -1 elsewhere.

    Args:
        logits: x, any float dtype; the loss is computed in float32.
        positive: bool of the same shape, which is not empty; None if there is nothing to learn.

    Returns:
        Scalar float32; without ``positive`` zero, connected to the logits.
    """
    if positive is None:
        return logits.float().sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits.float(), positive.float())
