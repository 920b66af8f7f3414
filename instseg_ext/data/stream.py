"""The order of training samples: an endless, reproducible stream of batches of indices.

The stream knows nothing of processes, workers or micro-batches: iteration i always consists of the
same ``batch_size`` (position, index) pairs, of which each process takes a fixed slice.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["BatchStream", "EpochOrder", "seeded", "slice_batch"]

# Keep the random numbers of shuffling, samples and replacements apart for one and the same seed.
_SHUFFLE, _SAMPLE = 1, 2


class EpochOrder:
    """The order of the indices within each epoch, depending on the seed and the epoch only."""

    def __init__(
        self,
        size: int,
        seed: int,
        *,
        shuffle: bool = True,
        repeat_factors: Sequence[float] | None = None,
    ):
        """Set up the order.

        Args:
            size: number of images.
            seed: non-negative.
            shuffle: False keeps the order of the data set.
            repeat_factors: (size,) how often each image appears in an epoch on average; fractions
                are rounded at random in each epoch. None = once.

        Raises:
            ValueError: if there is no image or the repeat factors do not fit.
        """
        if size <= 0:
            raise ValueError("The training set has no image; see DATASETS.TRAIN.")
        if repeat_factors is not None and len(repeat_factors) != size:
            raise ValueError(f"{len(repeat_factors)} repeat factors for {size} images")
        self.size, self.seed, self.shuffle = size, int(seed), shuffle
        self.repeat = (
            None if repeat_factors is None else np.asarray(repeat_factors, dtype=np.float64)
        )

    def indices(self, epoch: int) -> np.ndarray:
        """Return the (n,) indices of an epoch; n equals ``size`` unless factors repeat images."""
        rng = np.random.default_rng([self.seed, _SHUFFLE, epoch])
        order = np.arange(self.size)
        if self.repeat is not None:
            whole = np.floor(self.repeat)
            times = whole + (rng.random(self.size) < self.repeat - whole)
            order = np.repeat(order, times.astype(np.int64))
        return rng.permutation(order) if self.shuffle else order


class BatchStream:
    """Endless batches of (position, index) pairs.

    ``position`` counts the samples in the order in which they are used: sample j of iteration i has
    position ``i * batch_size + j``. With groups, each batch comes from one group (images of like
    aspect ratio need less padding); images wait in their group until it fills a batch, so none is
    lost.
    """

    def __init__(self, order: EpochOrder, batch_size: int, groups: np.ndarray | None = None):
        """Set up the stream.

        Args:
            order: the indices of each epoch.
            batch_size: samples of one iteration over all processes and micro-batches.
            groups: (size,) group of each image; None = no grouping.
        """
        self.order, self.batch_size, self.groups = order, batch_size, groups

    def batches(self, start_iteration: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches from an iteration on, exactly as if the earlier ones had been taken."""
        replay = itertools.islice(self._index_batches(), start_iteration, None)
        for iteration, batch in enumerate(replay, start=start_iteration):
            first = iteration * self.batch_size
            yield list(enumerate(batch, start=first))

    def _index_batches(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = {}
        for epoch in itertools.count():
            indices = self.order.indices(epoch)
            groups = np.zeros(len(indices), int) if self.groups is None else self.groups[indices]
            for index, group in zip(indices.tolist(), groups.tolist(), strict=True):
                batch = waiting.setdefault(group, [])
                batch.append(index)
                if len(batch) == self.batch_size:
                    waiting[group] = []
                    yield batch


def slice_batch(
    batch: list, *, micro_batch: int, accumulate: int, rank: int, world_size: int
) -> list:
    """Return the part of a batch that one process handles in one micro-batch.

    Args:
        batch: samples of one iteration.
        micro_batch: 0 to ``accumulate`` - 1.
        accumulate: micro-batches of one iteration.
        rank: 0 to ``world_size`` - 1.
        world_size: number of processes.
    """
    size = len(batch) // (accumulate * world_size)
    start = (micro_batch * world_size + rank) * size
    return batch[start : start + size]


@contextmanager
def seeded(seed: int, position: int, attempt: int = 0) -> Iterator[np.random.Generator]:
    """Seed Python's, numpy's and torch's CPU generators for one sample, then restore them.

    Args:
        seed: of the run.
        position: of the sample in the stream.
        attempt: how many samples were rejected at this position before.

    Yields:
        a further generator with the same seed, for drawing a replacement.
    """
    sequence = np.random.SeedSequence([seed, _SAMPLE, position, attempt])
    words = sequence.generate_state(3)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the state that augmentations draw from
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    # Not torch.manual_seed: it would also reseed the accelerators.
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield np.random.default_rng(sequence.spawn(1)[0])
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
