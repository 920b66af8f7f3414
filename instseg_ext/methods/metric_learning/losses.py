"""Losses of embeddings and classes, on the drawn cells of one image.

Shape shorthand: P drawn cells, M objects of the image, D numbers of an embedding, T similarities, C
classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from instseg_ext.methods.metric_learning.labels import CellSample
from instseg_ext.methods.metric_learning.similarity import (
    log_dissimilarity,
    log_similarity,
    squared_distances,
)

__all__ = ["class_loss_sum", "embedding_loss", "lambda_at", "pair_weights"]


def pair_weights(
    sample: CellSample, *, kind: str = "uniform", background: str = "instance"
) -> Tensor:
    """Weigh the pairs of drawn cells of an image.

    Args:
        sample: the cells.
        kind: ``uniform``, ``product`` or ``sum``; see ``MODEL.DEEP_METRIC.PAIR_WEIGHT``.
        background: ``instance``, ``negative_only`` or ``none``; see
            ``MODEL.DEEP_METRIC.BACKGROUND``.

    Returns:
        (P, P) float32 with the sum 1 and zeros on the diagonal; all zeros where no object has a
        cell: the background alone would only be pulled together.
    """
    sizes = sample.sizes.float()
    there = (sizes > 0).float()
    there[-1] *= there[:-1].sum() > 0
    if background == "none":
        there[-1] = 0
    sizes = sizes.clamp(min=1)
    if kind == "product":
        blocks = 1 / (sizes[:, None] * sizes)
    elif kind == "sum":
        blocks = 1 / (sizes[:, None] + sizes)
    else:
        # Where more cells of the background are drawn, a pair of them counts less.
        drawn = torch.zeros_like(sizes).index_add_(
            0, sample.owners, torch.ones_like(sample.owners, dtype=sizes.dtype)
        )
        blocks = 1 / (drawn[:, None] * drawn).clamp(min=1)
    blocks = blocks * there[:, None] * there
    if background == "negative_only":
        blocks[-1, -1] = 0
    weights = blocks[sample.owners[:, None], sample.owners]
    weights.fill_diagonal_(0)
    total = weights.sum()
    return weights / torch.where(total > 0, total, 1)


def embedding_loss(
    embeddings: Tensor, sample: CellSample, weights: Tensor, *, divide_by_cells: bool = False
) -> Tensor:
    """Pull cells of one object together and push others apart (Eq. 2 of arXiv:1703.10277).

    ``-sum w_pq [y_pq log s_pq + (1 - y_pq) log(1 - s_pq)]`` with the similarity s, and y = 1 for
    cells of one object.

    Args:
        embeddings: (P, D) of the drawn cells.
        sample: the cells.
        weights: (P, P), see ``pair_weights``.
        divide_by_cells: divide by P.

    Returns:
        0-d float32; 0 and still connected where all weights are zero.
    """
    distances = squared_distances(embeddings.float(), embeddings.float())
    same = sample.owners[:, None] == sample.owners
    log_likelihood = torch.where(same, log_similarity(distances), log_dissimilarity(distances))
    total = -(weights * log_likelihood).sum()
    return total / len(embeddings) if divide_by_cells else total


def class_loss_sum(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Sum the cross-entropy over drawn cells and similarities.

    Args:
        logits: (P, T, C + 1).
        targets: (P, T) int64 in [0, C].
        valid: (P,) bool; others do not count.

    Returns:
        0-d float32, to be divided by T times the number of valid cells.
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (losses.unflatten(0, targets.shape) * valid[:, None]).sum()


def lambda_at(iteration: int, first: float, last: float, value: float) -> float:
    """Return the weight of the class loss: 0 up to ``first``, ``value`` from ``last`` on."""
    if iteration >= last:
        return value
    return value * max(0.0, iteration - first) / max(last - first, 1e-9)
