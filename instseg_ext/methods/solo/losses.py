"""Category and mask losses of the SOLO family.

Both divide by counts over the whole local batch, as the authors' code does (``local``), or over all
processes (``global``). Everything runs in float32 with autocast off.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from instseg_ext.layers.losses import dice_loss, sigmoid_focal_loss_sum
from instseg_ext.layers.reduce import mean_over_processes

__all__ = ["category_loss", "mask_loss"]


def category_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    across_processes: bool = False,
) -> Tensor:
    """Compute the focal loss over all cells, divided by the number of positive cells plus one.

    Args:
        logits: (P, K) float, all cells of all images.
        labels: (P,) int64 in [0, K]; K means background.
        alpha: weight of the positive term.
        gamma: focusing exponent.
        across_processes: divide by the mean over processes of (positives + 1 / processes), which
            makes the averaged loss that of one process holding the whole batch.

    Returns:
        0-d float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        total = sigmoid_focal_loss_sum(logits, labels, alpha=alpha, gamma=gamma)
        positives = (labels < logits.shape[1]).sum().float()
        if across_processes:
            # mean(positives) + 1 / N processes = (sum(positives) + 1) / N.
            first = torch.zeros_like(positives) if _rank() else torch.ones_like(positives)
            return total / mean_over_processes(positives + first)
        return total / (positives + 1)


def _rank() -> int:
    """Return this process's rank, 0 in a run of one."""
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def mask_loss(
    probs: Sequence[Tensor],
    targets: Sequence[Tensor],
    branch: Sequence[Tensor],
    *,
    level_parameters: Sequence[Tensor] = (),
    across_processes: bool = False,
) -> Tensor:
    """Compute the mean dice loss over all masks of all levels and images together.

    Args:
        probs: (P, h, w) float mask probabilities, in groups of equal size; P may be 0.
        targets: (P, h, w) of zeros and ones for each group.
        branch: all outputs of the mask branch. They join the loss with weight zero when the batch
            holds no positive cell, so that every parameter has a gradient (DDP needs one).
        level_parameters: parameters that only positive cells of one level reach. They always join
            with weight zero, for the same reason.
        across_processes: divide by the mean count over processes instead of the local one.

    Returns:
        0-d float32; 0 without positives.
    """
    count = sum(len(p) for p in probs)
    with torch.autocast(branch[0].device.type, enabled=False):
        if count:
            parts = [dice_loss(p, t).sum() for p, t in zip(probs, targets, strict=True)]
        else:
            parts = [output.float().sum() * 0 for output in branch]
        parts += [parameter.sum() * 0 for parameter in level_parameters]
        total = torch.stack(parts).sum()
        normalizer = torch.tensor(float(count), device=total.device)
        if across_processes:
            normalizer = mean_over_processes(normalizer)
        # A mean over processes may be a fraction below 1, but never between 0 and 1 / processes.
        return total / torch.where(normalizer > 0, normalizer, torch.ones_like(normalizer))
