"""Training and test loaders.

The training loader gives the same samples whatever the number of workers, processes and
micro-batches; see ``stream.py``.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.data.build import filter_images_with_few_keypoints
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils import data

from instseg_ext.data.foreign import require_packages
from instseg_ext.data.proposals import ProposalMapper, assign_proposals
from instseg_ext.data.registration import is_semantic
from instseg_ext.data.semantic import check_annotation_kind
from instseg_ext.data.stream import BatchStream, EpochOrder, seeded, slice_batch

__all__ = [
    "TrainLoader",
    "build_inference_loader",
    "build_test_loader",
    "build_train_loader",
    "load_training_dicts",
    "training_dicts",
]

logger = logging.getLogger(__name__)

Mapper = Callable[[dict], "dict | None"]

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
        mapper: Mapper,
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
    ):
        """Set up the loader.

        Args:
            dicts: the training set in detectron2's format.
            mapper: from one of them to a sample, or to None to have it replaced by another image.
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
        self._samples = _Samples(dicts, mapper, seed)
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
    cfg: CfgNode, mapper: Mapper, *, start_iteration: int = 0, seed: int, limit: int | None = None
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
    sampler, repeat = cfg.DATALOADER.SAMPLER_TRAIN, None
    if sampler == "RepeatFactorTrainingSampler":
        repeat = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        ).tolist()
    elif sampler != "TrainingSampler":
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN is TrainingSampler or RepeatFactorTrainingSampler, not "
            f"{sampler!r}."
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
        group_by_aspect=cfg.DATALOADER.ASPECT_RATIO_GROUPING and all("width" in d for d in dicts),
        order=EpochOrder(len(dicts), seed, repeat_factors=repeat),
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
    )


def training_dicts(
    cfg: CfgNode, names: Sequence[str], limit: int | None = None, *, may_be_empty: bool = False
) -> list[dict]:
    """Load training sets as the training of a config uses them, without proposals.

    Args:
        cfg: reads what says which images are left out.
        names: of ``DATASETS.TRAIN``, or some of them.
        limit: return only the first images; None = all.
        may_be_empty: see ``load_training_dicts``.

    Returns:
        detectron2 dictionaries.

    Raises:
        ValueError: see ``load_training_dicts``.
    """
    return load_training_dicts(
        list(names),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        ),
        may_be_empty=may_be_empty,
    )[:limit]


def load_training_dicts(
    names: list[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    *,
    may_be_empty: bool = False,
) -> list[dict]:
    """Load and join training sets.

    Args:
        names: registered data sets with the same classes, all of them with instances or all of them
            with label maps; of the latter no image is left out.
        filter_empty: leave out images that have nothing but crowds.
        min_keypoints: leave out images with fewer labelled keypoints than this.
        may_be_empty: return an empty list if no image remains: the sets are some of several.

    Returns:
        detectron2 dictionaries.

    Raises:
        ValueError: if no data set is named, their classes differ, or no image remains.
    """
    if not names:
        raise ValueError(
            "DATASETS.TRAIN is empty; name a data set or give --train-json and --train-images."
        )
    dicts, classes = [], None
    for name in names:
        require_packages(name)
        dicts += DatasetCatalog.get(name)
        metadata = MetadataCatalog.get(name)
        these = list(metadata.stuff_classes if is_semantic(name) else metadata.thing_classes)
        if classes is not None and these != classes:
            raise ValueError(
                f"DATASETS.TRAIN: {name} has classes {these[:5]}, {names[0]} has {classes[:5]}; "
                "data sets that are trained together need the same classes in the same order."
            )
        classes = these
    if dicts and is_semantic(names[0]):
        logger.info("Training on %d images with label maps of %d classes", len(dicts), len(classes))
        return dicts
    total = len(dicts)
    if filter_empty:
        dicts = [d for d in dicts if any(not a.get("iscrowd", 0) for a in d["annotations"])]
    if min_keypoints > 0:
        dicts = filter_images_with_few_keypoints(dicts, min_keypoints)
    if not dicts and not may_be_empty:
        raise ValueError(
            f"DATASETS.TRAIN {names}: none of {total} images has an object to train on."
        )
    objects = Counter(
        a["category_id"] for d in dicts for a in d["annotations"] if not a.get("iscrowd", 0)
    )
    logger.info(
        "Training on %d of %d images with %d objects of %d of %d classes",
        len(dicts), total, sum(objects.values()), len(objects), len(classes or []),
    )  # fmt: skip
    return dicts


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Mapper, limit: int | None = None
) -> data.DataLoader:
    """Build the loader of one test set: one image per forward pass, each image exactly once.

    Args:
        cfg: reads ``DATALOADER.NUM_WORKERS`` and ``MODEL.DEVICE``.
        dataset_name: a registered data set.
        mapper: from a data set dictionary to a model input.
        limit: use only the first images; None = all.

    Returns:
        an iterable of lists with one dictionary; each process gets its own share.

    Raises:
        ValueError: if the data set has no image, or the model wants proposals from files.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is for training only: give the model a proposal generator and "
            "turn the key off to evaluate it."
        )
    require_packages(dataset_name)
    dicts = DatasetCatalog.get(dataset_name)[:limit]
    if not dicts:
        raise ValueError(f"Data set {dataset_name!r} has no image to test on.")
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
