"""Training and test loaders.

The training loader gives the same samples whatever the number of workers, processes and
micro-batches; see ``stream.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils import data

from instseg_ext.data.foreign import require_packages
from instseg_ext.data.proposal_mapper import ProposalMapper, assign_proposals, proposal_file_of
from instseg_ext.data.semantic import check_annotation_kind
from instseg_ext.data.stream import BatchStream, EpochOrder, seeded, slice_batch
from instseg_ext.data.training_sets import training_dicts

__all__ = [
    "TrainLoader",
    "build_inference_loader",
    "build_test_loader",
    "build_train_loader",
]

Mapper = Callable[[dict], "dict | None"]
# From a position in the training stream and its random numbers to a sample.
Source = Callable[[int, np.random.Generator], "dict | None"]

MAX_ATTEMPTS = 100  # images tried for one position before the mapper is taken to reject all


class _Samples(data.Dataset):
    """Map a (position, index) pair to a sample whose random numbers depend on the position."""

    def __init__(self, dicts: list[dict], mapper: Mapper, seed: int):
        # Serialised: workers then share the memory instead of copying it page by page.
        self.dicts = DatasetFromList(dicts, copy=False)
        self.mapper, self.seed = mapper, seed

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        rejected = []
        for attempt in range(MAX_ATTEMPTS):
            with seeded(self.seed, position, attempt) as generator:
                sample = self.mapper(self.dicts[index])
            if sample is not None:
                return sample
            rejected.append(str(self.dicts[index].get("file_name", index)))
            index = int(generator.integers(len(self.dicts)))
        raise ValueError(
            f"The mapper rejected {MAX_ATTEMPTS} images in a row, among them {rejected[0]} and "
            f"{rejected[-1]}; check the annotations and the augmentation settings."
        )


class _DrawnSamples(data.Dataset):
    """Map a (position, index) pair to what a source draws for the position."""

    def __init__(self, source: Source, seed: int):
        self.source, self.seed = source, seed

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, _ = key
        for attempt in range(MAX_ATTEMPTS):
            with seeded(self.seed, position, attempt) as generator:
                sample = self.source(position, generator)
            if sample is not None:
                return sample
        raise ValueError(
            f"No training sample was found in {MAX_ATTEMPTS} tries; check the annotations of "
            "DATASETS.TRAIN with `instseg check-dataset`."
        )


class _Slices:
    """The stream's batches cut to what this process loads: one list per micro-batch."""

    def __init__(
        self,
        stream: BatchStream,
        *,
        start_iteration: int,
        accumulate: int,
        rank: int,
        world_size: int,
    ):
        self.stream, self.start_iteration = stream, start_iteration
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.stream.batches(self.start_iteration):
            for micro_batch in range(self.accumulate):
                yield slice_batch(
                    batch,
                    micro_batch=micro_batch,
                    accumulate=self.accumulate,
                    rank=self.rank,
                    world_size=self.world_size,
                )


class TrainLoader:
    """An endless iterable of micro-batches (lists of sample dictionaries) of one process.

    Each ``iter()`` begins again at ``start_iteration``. One optimiser step takes ``accumulate`` of
    them.
    """

    def __init__(
        self,
        dicts: list[dict],
        mapper: Mapper | None,
        *,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        start_iteration: int = 0,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        group_by_aspect: bool = False,
        order: EpochOrder | None = None,
        pin_memory: bool = False,
        source: Source | None = None,
    ):
        """Set up the loader.

        Args:
            dicts: the training set in detectron2's format.
            mapper: from one of them to a sample, or to None to have it replaced by another image;
                not called, and may be None, where there is a source.
            batch_size: images of one optimiser step over all processes.
            seed: non-negative and the same in all processes.
            accumulate: micro-batches of one step.
            start_iteration: steps to skip.
            num_workers: loading processes, each with one thread; 0 loads in this process.
            rank: number of this process.
            world_size: number of processes.
            group_by_aspect: make batches of images that are all wider than high, or none.
            order: of the images; None = shuffled in each epoch.
            pin_memory: put images into page-locked memory, for copying to a GPU.
            source: draws samples from the whole set, in place of the mapper; None has another
                sample drawn.

        Raises:
            ValueError: if the batch cannot be cut into equal slices, or there is no image.
        """
        if batch_size <= 0 or batch_size % (world_size * accumulate):
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {batch_size}, which {world_size} process(es) times "
                f"INSTSEG.ACCUMULATE {accumulate} do not divide; choose a multiple of "
                f"{world_size * accumulate}."
            )
        if seed < 0:
            raise ValueError(f"The loader needs a seed of 0 or more, not {seed}.")
        self.batch_size = batch_size // (world_size * accumulate)
        self._samples = (
            _Samples(dicts, mapper, seed) if source is None else _DrawnSamples(source, seed)
        )
        order = order or EpochOrder(len(dicts), seed)
        groups = (
            np.array([d["width"] > d["height"] for d in dicts], int) if group_by_aspect else None
        )
        self._slices = _Slices(
            BatchStream(order, batch_size, groups),
            start_iteration=start_iteration,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
        )
        self._seed, self._num_workers, self._pin_memory = seed, num_workers, pin_memory

    def __iter__(self) -> Iterator[list[dict]]:
        """Start loading."""
        return iter(
            data.DataLoader(
                self._samples,
                batch_sampler=self._slices,
                num_workers=self._num_workers,
                collate_fn=_as_list,
                worker_init_fn=_init_worker,
                pin_memory=self._pin_memory,
                # Without it the loader would draw its base seed from this process's random numbers.
                generator=torch.Generator().manual_seed(self._seed),
            )
        )


def build_train_loader(
    cfg: CfgNode,
    mapper: Mapper,
    *,
    start_iteration: int = 0,
    seed: int,
    limit: int | None = None,
    build_source: Callable[[CfgNode, list[dict], int], Source] | None = None,
) -> TrainLoader:
    """Build the training loader of this process.

    Args:
        cfg: reads ``DATASETS.TRAIN``, ``DATALOADER``, ``SOLVER.IMS_PER_BATCH``,
            ``INSTSEG.ACCUMULATE``; with ``MODEL.LOAD_PROPOSALS`` also
            ``DATASETS.PROPOSAL_FILES_TRAIN``.
        mapper: see :class:`TrainLoader`.
        start_iteration: optimiser steps done before; the stream goes on exactly there.
        seed: non-negative and the same in all processes.
        limit: use only the first images, with proposals those of each set; None = all.
        build_source: from config, training set and seed to what draws the samples in place of the
            mapper.

    Returns:
        an endless iterable of micro-batches; ``INSTSEG.ACCUMULATE`` of them make one step.

    Raises:
        FileNotFoundError: if a file of proposals does not exist.
        ValueError: if a key has a value that is not allowed, or there is nothing to train on.
    """
    check_annotation_kind(cfg.DATASETS.TRAIN, mapper)
    if cfg.MODEL.LOAD_PROPOSALS:
        names = cfg.DATASETS.TRAIN
        sets = [training_dicts(cfg, [name], limit, may_be_empty=True) for name in names]
        if not any(sets):
            raise ValueError(f"DATASETS.TRAIN {list(names)}: no image has an object to train on.")
        dicts = assign_proposals(sets, cfg.DATASETS.PROPOSAL_FILES_TRAIN)
        mapper = ProposalMapper(mapper)
    else:
        dicts = training_dicts(cfg, cfg.DATASETS.TRAIN, limit)
    repeat = _repeat_factors(cfg, dicts)
    if build_source is not None and repeat is not None:
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN must be TrainingSampler: this model draws its samples itself."
        )
    return TrainLoader(
        dicts,
        mapper,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=seed,
        accumulate=cfg.INSTSEG.ACCUMULATE,
        start_iteration=start_iteration,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
        # Loaders of label maps may not know the sizes.
        group_by_aspect=cfg.DATALOADER.ASPECT_RATIO_GROUPING
        and build_source is None
        and all("width" in d for d in dicts),
        order=EpochOrder(len(dicts), seed, repeat_factors=repeat),
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
        source=None if build_source is None else build_source(cfg, dicts, seed),
    )


def _repeat_factors(cfg: CfgNode, dicts: list[dict]) -> list[float] | None:
    """Return how often each image is to appear in an epoch, None = once."""
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    if sampler == "TrainingSampler":
        return None
    if sampler != "RepeatFactorTrainingSampler":
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN is TrainingSampler or RepeatFactorTrainingSampler, not "
            f"{sampler!r}."
        )
    return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
    ).tolist()


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Mapper, limit: int | None = None
) -> data.DataLoader:
    """Build the loader of one test set: one image per forward pass, each image exactly once.

    Args:
        cfg: reads ``DATALOADER.NUM_WORKERS`` and ``MODEL.DEVICE``; with ``MODEL.LOAD_PROPOSALS``
            also ``DATASETS.TEST``, ``DATASETS.PROPOSAL_FILES_TEST`` and ``INSTSEG.PROPOSAL_MASKS``.
        dataset_name: a registered data set.
        mapper: from a data set dictionary to a model input.
        limit: use only the first images; None = all.

    Returns:
        an iterable of lists with one dictionary; each process gets its own share.

    Raises:
        FileNotFoundError: if the file of proposals does not exist.
        ValueError: if the data set has no image, or proposals are wanted and there are none.
    """
    require_packages(dataset_name)
    dicts = DatasetCatalog.get(dataset_name)[:limit]
    if not dicts:
        raise ValueError(f"Data set {dataset_name!r} has no image to test on.")
    if cfg.MODEL.LOAD_PROPOSALS:
        if any(cfg.INSTSEG.STRETCH):
            raise ValueError(
                "INSTSEG.STRETCH stretches images in the model, which boxes from a file would not "
                "follow: set it to [0, 0], or turn MODEL.LOAD_PROPOSALS off."
            )
        masks, file = cfg.INSTSEG.PROPOSAL_MASKS, proposal_file_of(cfg, dataset_name)
        dicts = assign_proposals([dicts], [file], split="TEST", masks=masks)
        mapper = ProposalMapper(mapper, masks=masks)
    return build_inference_loader(cfg, dicts, mapper)


def build_inference_loader(cfg: CfgNode, dicts: list[dict], mapper: Mapper) -> data.DataLoader:
    """Build the loader of given images: one per forward pass, each exactly once.

    Args:
        cfg: see ``build_test_loader``.
        dicts: at least one.
        mapper: from a dictionary to a model input.

    Returns:
        an iterable of lists with one dictionary; each process gets its own share.
    """
    return data.DataLoader(
        _Mapped(dicts, mapper),
        batch_size=1,
        sampler=InferenceSampler(len(dicts)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
        worker_init_fn=_init_worker,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )


class _Mapped(data.Dataset):
    """A list of dictionaries seen through a mapper."""

    def __init__(self, dicts: list[dict], mapper: Mapper):
        self.dicts, self.mapper = DatasetFromList(dicts, copy=False), mapper

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, index: int) -> dict | None:
        return self.mapper(self.dicts[index])


def _as_list(batch: list[dict]) -> list[dict]:
    """Leave a batch as it is; a module-level function, so that workers can be spawned."""
    return batch


def _init_worker(worker_id: int) -> None:
    """Keep a loading process to one thread: it shares the machine with the model."""
    torch.set_num_threads(1)
    cv2 = sys.modules.get("cv2")
    if cv2 is not None:
        cv2.setNumThreads(0)
