"""Suppression among regions of superpixels: two that share any superpixel exclude each other.

Shapes: n superpixels, R regions, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["region_nms"]


@torch.no_grad()
def region_nms(
    members: Tensor, scores: Tensor, min_score: float = float("-inf")
) -> tuple[Tensor, Tensor]:
    """Keep, for each class, the best of the regions that share a superpixel.

    In falling order of their scores, equal ones as they come, each region that is left suppresses
    all that share a superpixel with it, nested parts as well: the threshold on the overlap is 0, as
    in the SDS authors' code. Computed on the CPU.

    Args:
        members: (n, R) bool.
        scores: (R, K) float; a region whose score is not finite has no part in its class.
        min_score: a region whose score is not greater has no part in its class.

    Returns:
        (M,) int64 regions and (M,) int64 classes on the device of ``scores``, sorted by class, then
        by falling score.
    """
    packed = np.packbits(members.T.cpu().numpy(), axis=1)
    # Whole numbers of n bits: an AND of two of them is one step.
    bits = [int.from_bytes(row.tobytes(), "little") for row in packed]
    regions: list[int] = []
    classes: list[int] = []
    for label, column in enumerate(scores.detach().double().cpu().numpy().T):
        order = (-column).argsort(kind="stable")
        order = order[(np.isfinite(column) & (column > min_score))[order]]
        # What the regions kept so far cover: who shares with one of them shares with it.
        covered = 0
        for region in order.tolist():
            if not bits[region] & covered:
                covered |= bits[region]
                regions.append(region)
                classes.append(label)
    return (
        torch.tensor(regions, dtype=torch.int64, device=scores.device),
        torch.tensor(classes, dtype=torch.int64, device=scores.device),
    )
