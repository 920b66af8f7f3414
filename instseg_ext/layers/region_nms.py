"""Suppression among regions of superpixels: two that share any superpixel exclude each other.

Shapes: n superpixels, R regions, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_members", "region_nms"]

_WORD = 64  # superpixels that are compared at one time


def pack_members(members: Tensor) -> Tensor:
    """Pack the superpixels of each region into bits.

    Args:
        members: (n, R) bool.

    Returns:
        (R, max(ceil(n / 64), 1)) int64; regions share a superpixel where the AND of two rows is
        not 0.
    """
    num, regions = members.shape
    # One word at least: torch views no empty rows as words.
    words = max(-(-num // _WORD), 1)
    bits = torch.zeros((regions, words * _WORD), dtype=torch.uint8, device=members.device)
    bits[:, :num] = members.T
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    packed = (bits.view(regions, words * _WORD // 8, 8) * weights).sum(dim=2, dtype=torch.uint8)
    return packed.view(torch.int64)


@torch.no_grad()
def region_nms(
    members: Tensor, scores: Tensor, min_score: float = float("-inf")
) -> tuple[Tensor, Tensor]:
    """Keep, for each class, the best of the regions that share a superpixel (Sec. 5 of SDS).

    In falling order of their scores, equal ones as they come, each region that is left suppresses
    all that share a superpixel with it, nested parts as well: the threshold on the overlap is 0, as
    in the authors' code.

    Args:
        members: (n, R) bool.
        scores: (R, K) float; a region whose score is not finite has no part in its class.
        min_score: a region whose score is not greater has no part in its class.

    Returns:
        (M,) int64 regions and (M,) int64 classes, sorted by class, then by falling score.
    """
    words = pack_members(members)
    kept, classes = [], []
    for label in range(scores.shape[1]):
        column = scores[:, label]
        left = torch.argsort(column, descending=True, stable=True)
        left = left[(column.isfinite() & (column > min_score))[left]]
        picks = []
        while len(left):
            picks.append(left[0])
            left = left[1:]
            shares = (words[left] & words[picks[-1]]).any(dim=1)
            left = left[~shares]
        kept += picks
        classes += [label] * len(picks)
    regions = torch.stack(kept) if kept else scores.new_zeros(0, dtype=torch.int64)
    return regions, torch.tensor(classes, dtype=torch.int64, device=scores.device)
