"""Similarity of embeddings: a function of their squared distance alone.

Shape shorthand: D numbers of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "log_dissimilarity",
    "log_similarity",
    "radii",
    "radius",
    "similarity",
    "squared_distances",
]

# Added to distances of cells of different objects, so that the loss and its gradient are bounded.
_FLOOR = 1e-4


def similarity(distance: Tensor) -> Tensor:
    """Return ``2 / (1 + exp(distance))``: 1 for equal embeddings, towards 0 for distant ones.

    Twice the logistic function of the negative distance (Eq. 1 of arXiv:1703.10277).

    Args:
        distance: squared, >= 0, any shape.
    """
    return 2 * torch.sigmoid(-distance)


def radius(tau: float) -> float:
    """Return the squared distance at which the similarity is ``tau``, in (0, 1)."""
    return math.log(2 / tau - 1)


def radii(taus: Sequence[float], device: torch.device | str | None = None) -> Tensor:
    """Return the squared distances at which similarities are ``taus``, (T,) float32."""
    return torch.tensor([radius(tau) for tau in taus], device=device)


def log_similarity(distance: Tensor) -> Tensor:
    """Return the logarithm of the similarity: linear in large distances.

    Args:
        distance: squared, >= 0, any shape.
    """
    return math.log(2) + F.logsigmoid(-distance)


def log_dissimilarity(distance: Tensor, floor: float = _FLOOR) -> Tensor:
    """Return the logarithm of 1 - similarity, which is ``log(tanh(distance / 2))``.

    Args:
        distance: squared, >= 0, any shape.
        floor: added to the distance. With 1e-4 the result is never below -9.91 and its gradient
            with respect to the distance of embeddings, not squared, never above 100. Unlike
            a clamp it leaves a gradient to embeddings that nearly coincide.
    """
    distance = distance + floor
    return torch.log(-torch.expm1(-distance)) + F.logsigmoid(distance)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances of all pairs, by one matrix product.

    Args:
        a: (P, D) float32.
        b: (Q, D) float32.

    Returns:
        (P, Q) float32, >= 0; rounded by about 1e-7 of the largest ones. A row of ``b`` that is not
        finite spoils its own column only.
    """
    with torch.autocast(a.device.type, enabled=False):
        # Distances do not change, but norms, and so the rounding, become smaller.
        centre = a.detach().mean(dim=0) if len(a) else 0
        a, b = a - centre, b - centre
        norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
        return torch.addmm(norms, a, b.T, alpha=-2).clamp(min=0)
