"""Which cells become seeds: sure of their class, and far from each other.

Shape shorthand: N cells of an image, R of them candidates, T similarities, C classes, D numbers of
an embedding, S seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instseg_ext.layers.mask_ops import chunk_slices
from instseg_ext.methods.metric_learning.similarity import similarity

__all__ = ["SeedRule", "Seediness", "seediness", "select_seeds"]

# Cells whose class probabilities are computed at one time: their logits stay in the caches.
_CELLS = 2**14
# Smallest squared distance, and probability, whose logarithm is taken.
_TINY = 1e-6


@dataclass(frozen=True)
class SeedRule:
    """How seeds are chosen; see the config keys of the same names."""

    kind: str = "log"
    alpha: float = 0.3
    sim_weight: float = 0.7
    num_seeds: int = 100


@dataclass(frozen=True)
class Seediness:
    """How good a seed each cell is, and for what.

    Attributes:
        scores: (N,) float32 in [0, 1], the largest probability of a class at any similarity.
        taus: (N,) int64 in [0, T), that similarity.
        classes: (N,) int64 in [0, C), that class.
    """

    scores: Tensor
    taus: Tensor
    classes: Tensor


@torch.no_grad()
def seediness(logits: Tensor) -> Seediness:
    """Read off class logits how good a seed each cell is (Sec. 3.3 of arXiv:1703.10277).

    Args:
        logits: (T, C + 1, N) float32, the background last.
    """
    parts = []
    for some in chunk_slices(logits.shape[-1], _CELLS):
        part = logits[..., some]
        best, classes = part[:, :-1].max(dim=1)
        scores, taus = (best - part.logsumexp(dim=1)).exp().max(dim=0)
        parts.append((scores, taus, classes.gather(0, taus[None])[0]))
    return Seediness(*(torch.cat(values) for values in zip(*parts, strict=True)))


@torch.no_grad()
def select_seeds(embeddings: Tensor, scores: Tensor, rule: SeedRule) -> Tensor:
    """Choose seeds one after the other: the best cell first, then the best that are far from them.

    The distance to the nearest seed is carried along, so that each step looks at one seed only.

    Args:
        embeddings: (R, D) float32.
        scores: (R,) float32 in [0, 1].
        rule: see ``SeedRule``.

    Returns:
        (S,) int64 in [0, R), in the order of choice; S is the smaller one of R and the most seeds.
    """
    count = min(rule.num_seeds, len(scores))
    chosen = torch.empty(count, dtype=torch.int64, device=scores.device)
    if not count:
        return chosen
    points = embeddings - embeddings.mean(dim=0)
    norms = points.square().sum(dim=1)
    value = scores.clamp(min=_TINY).log() if rule.kind == "log" else scores.clone()
    nearest = torch.full_like(norms, torch.inf)
    gain = value
    for step in range(count):
        best = gain.argmax(dim=0, keepdim=True)
        chosen[step : step + 1] = best
        # Never again, whatever its distance.
        value.index_fill_(0, best, -torch.inf)
        seed = points.index_select(0, best)[0]
        distance = torch.addmv(norms + seed.dot(seed), points, seed, alpha=-2)
        nearest = torch.minimum(nearest, distance)
        if rule.kind == "log":
            gain = torch.add(value, nearest.clamp(min=_TINY).log_(), alpha=rule.alpha)
        else:
            gain = torch.sub(value, similarity(nearest.clamp(min=0)), alpha=rule.sim_weight)
    return chosen
