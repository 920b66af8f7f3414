"""Random numbers of the training process, the same for a run and its resumed rest."""

from __future__ import annotations

import random

import numpy as np
import torch
from detectron2.utils import comm

__all__ = ["choose_seed", "seed_step"]

_MAX_SEED = 2**31 - 1


def choose_seed(seed: int) -> int:
    """Return ``seed``, or a random one, the same in all processes, if it is negative."""
    if seed >= 0:
        return seed
    return int(comm.all_gather(random.SystemRandom().randrange(_MAX_SEED))[0])


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seed python, numpy and torch for one iteration of one process.

    What the model draws (dropout, sampled proposals) thereby depends on nothing that came before,
    so that a resumed run goes on exactly as the uninterrupted one. Loader workers are seeded by
    the loader.
    """
    words = np.random.SeedSequence([seed, iteration, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002  detectron2 and fvcore draw from this generator
    torch.manual_seed(int(words[2]))
