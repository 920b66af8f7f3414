"""DeepMask's training samples: patches drawn from the whole training set."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm

from instseg_ext.data.augmentation import augmentation_kwargs, build_augmentations
from instseg_ext.data.mapper import read_image
from instseg_ext.methods.deepmask.config import canonical_size, check_deepmask_config, patch_size
from instseg_ext.methods.deepmask.index import PatchIndex
from instseg_ext.methods.deepmask.legacy import LegacyWindowSampler
from instseg_ext.methods.deepmask.patches import crop_image, crop_segmentation
from instseg_ext.methods.deepmask.sampling import Geometry, Patch, WindowSampler
from instseg_ext.structures.rle import tight_box

__all__ = [
    "HeadPlan",
    "ImageCache",
    "PatchCutter",
    "PatchSource",
    "build_patch_source",
    "geometry_from_config",
    "index_from_config",
]

logger = logging.getLogger(__name__)

# Keeps the choice of a step's head apart from all other random numbers of a seed.
_HEADS = 4
# Counts closer than this to a whole number are one.
_EXACT = 1e-6


class HeadPlan:
    """Which positions of the training stream are patches for the score."""

    def __init__(self, score_share: float, batch: int, *, alternate: bool = False, seed: int = 0):
        """Keep the numbers.

        Args:
            score_share: of the patches; with ``alternate`` the probability of a step.
            batch: patches of a step.
            alternate: all patches of a step are for one head, which follows from the step's number.
            seed: of the run.
        """
        self.score_share, self.batch = score_share, batch
        self.alternate, self.seed = alternate, seed

    def warn_of_uneven_parts(self, parts: int) -> None:
        """Say so if slices of a batch that are worked on apart hold different numbers of each kind.

        Each of them averages its losses, so that a step then depends on how it is cut.

        Args:
            parts: processes times micro-batches.
        """
        share = self.score_share * self.batch / parts
        if not self.alternate and abs(share - round(share)) > _EXACT:
            logger.warning(
                "MODEL.DEEPMASK.SCORE_FREQ %g of SOLVER.IMS_PER_BATCH %d patches in %d processes "
                "times micro-batches makes %g score patches each: a batch that makes it a whole "
                "number weighs all patches alike.",
                self.score_share, self.batch, parts, share,
            )  # fmt: skip

    def is_mask(self, position: int) -> bool:
        """Tell whether a sample trains the mask head."""
        if self.alternate:
            step = position // self.batch
            draw = np.random.default_rng([self.seed, _HEADS, step]).random()
            return bool(draw >= self.score_share)
        # Spread evenly, so that every slice of a batch has its share.
        before, after = (
            math.floor(self.score_share * n + _EXACT) for n in (position, position + 1)
        )
        return before == after


class ImageCache:
    """Images that were read last, up to a number of bytes.

    Patches are drawn one image each, in any order: it pays where the images of a set, or a good
    part of them, fit.
    """

    def __init__(self, image_format: str, limit: int):
        """Keep the numbers.

        Args:
            image_format: ``BGR``, ``RGB``, ...
            limit: bytes; an image larger than that is not kept.
        """
        self.image_format, self.limit = image_format, limit
        self._images: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0

    def read(self, record: dict) -> np.ndarray:
        """Return the (H, W, C) uint8 image of a data set dictionary; not to be written to."""
        name = record["file_name"]
        if name in self._images:
            self._images.move_to_end(name)
            return self._images[name]
        image = read_image(record, self.image_format)
        if image.nbytes <= self.limit:
            self._images[name] = image
            self._bytes += image.nbytes
            while self._bytes > self.limit:
                self._bytes -= self._images.popitem(last=False)[1].nbytes
        return image


class PatchCutter:
    """Cuts patches and their masks out of the images of a data set."""

    def __init__(
        self,
        dicts: Sequence[dict],
        index: PatchIndex,
        geometry: Geometry,
        cache: ImageCache,
        *,
        photometric: Sequence[T.Augmentation] = (),
        geometric: Sequence[T.Augmentation] = (),
    ):
        """Keep the parts.

        Args:
            dicts: the data set in detectron2's format.
            index: of it.
            geometry: sizes.
            cache: reads the images.
            photometric: augmentations of the whole image, before the patch is cut: what lies
                outside the image keeps its value.
            geometric: flips and quarter turns of the patch.
        """
        self.dicts, self.index, self.geometry, self.cache = dicts, index, geometry, cache
        self.photometric = T.AugmentationList(list(photometric))
        self.geometric = T.AugmentationList(list(geometric))

    def __call__(self, patch: Patch) -> dict[str, Any]:
        """Make a sample, see :class:`PatchSource`; augmentations use NumPy's global state."""
        record = self.dicts[patch.image]
        image = self.cache.read(record)
        if self.photometric.augs:
            augmented = T.AugInput(image.copy())
            self.photometric(augmented)
            image = augmented.image
        size = self.geometry.patch
        cut = T.AugInput(crop_image(image, patch.window, size).numpy().transpose(1, 2, 0))
        transforms = self.geometric(cut)
        sample = {
            "image": torch.from_numpy(np.ascontiguousarray(cut.image.transpose(2, 0, 1))),
            "is_mask": patch.target is not None,
            "file_name": record["file_name"],
            "image_id": record.get("image_id", patch.image),
            "height": image.shape[0],
            "width": image.shape[1],
        }
        if patch.target is None:
            masks = np.zeros((0, size, size), dtype=bool)
            return {**sample, "label": patch.label, "instances": _instances(masks)}
        target = transforms.apply_segmentation(self._target(record, patch, image.shape[:2]))
        target = np.ascontiguousarray(target).view(bool)
        masks = _enlarged(target, self.geometry.window, size)
        return {**sample, "target": torch.from_numpy(target), "instances": _instances(masks)}

    def _target(self, record: dict, patch: Patch, image_hw: tuple[int, int]) -> np.ndarray:
        """Return the (gt_size, gt_size) uint8 mask of a patch's object."""
        row = patch.annotation - self.index.starts[patch.image]
        segmentation, size = record["annotations"][row]["segmentation"], self.geometry.gt_size
        return crop_segmentation(segmentation, patch.target, size, image_hw).numpy().view(np.uint8)


class PatchSource:
    """Makes the training sample of each position of the stream."""

    def __init__(self, windows: WindowSampler, plan: HeadPlan, cutter: PatchCutter):
        """Keep the parts.

        Args:
            windows: draws where patches are cut.
            plan: says which positions train which head.
            cutter: makes the samples.
        """
        self.windows, self.plan, self.cutter = windows, plan, cutter

    def __call__(self, position: int, generator: np.random.Generator) -> dict[str, Any] | None:
        """Make a sample.

        Args:
            position: in the training stream.
            generator: source of random numbers.

        Returns:
            ``image`` (C, P, P) float32 from 0 to 255, ``is_mask``, and either ``target``
            (gt_size, gt_size) bool or ``label`` 1.0 or -1.0; ``instances`` of the patch, for
            pictures; ``file_name``, ``image_id``, ``height`` and ``width`` of the file. None if
            another sample is to be drawn.
        """
        if self.plan.is_mask(position):
            patch = self.windows.mask_patch(generator)
        else:
            patch = self.windows.score_patch(generator)
        return None if patch is None else self.cutter(patch)


def _enlarged(target: np.ndarray, window: int, size: int) -> np.ndarray:
    """Return (1, P, P) bool: a (G, G) mask of the window in the middle of a patch."""
    nearest = np.arange(window) * len(target) // window
    first = (size - window) // 2
    mask = np.zeros((1, size, size), dtype=bool)
    mask[0, first : first + window, first : first + window] = target[nearest][:, nearest]
    return mask


def _instances(masks: np.ndarray) -> Instances:
    """Return (M, P, P) masks as objects of a patch."""
    instances = Instances(masks.shape[1:])
    boxes = [tight_box(mask) or (0, 0, 0, 0) for mask in masks]
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(masks), dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.from_numpy(masks))
    return instances


def geometry_from_config(cfg: CfgNode) -> Geometry:
    """Read ``MODEL.DEEPMASK``.

    Raises:
        ValueError: if a value is not allowed.
    """
    check_deepmask_config(cfg)
    node = cfg.MODEL.DEEPMASK
    return Geometry(
        patch=patch_size(cfg),
        window=node.INPUT_SIZE,
        canonical=canonical_size(cfg),
        gt_size=node.GT_SIZE,
        shift=node.SHIFT,
        scale=node.SCALE,
        neg_shift=node.NEG_SHIFT,
        neg_octaves=node.NEG_OCTAVES,
    )


def index_from_config(cfg: CfgNode, dicts: Sequence[dict], name: str) -> PatchIndex:
    """Read the annotations of a data set.

    Args:
        cfg: reads ``MODEL.DEEPMASK``.
        dicts: the data set in detectron2's format.
        name: of it, for the message.

    Raises:
        ValueError: if no object is large enough.
    """
    node = cfg.MODEL.DEEPMASK
    index = PatchIndex(
        dicts, canonical=canonical_size(cfg), min_area=node.MIN_AREA, min_side=node.MIN_SIDE
    )
    if not index.usable.any():
        raise ValueError(
            f"Data set {name}: none of {len(index.usable)} objects is large enough for a patch; "
            f"lower MODEL.DEEPMASK.MIN_AREA ({node.MIN_AREA:g}) or MODEL.DEEPMASK.MIN_SIDE "
            f"({node.MIN_SIDE:g})."
        )
    return index


def build_patch_source(cfg: CfgNode, dicts: list[dict], seed: int) -> PatchSource:
    """Build what the method's record names.

    Args:
        cfg: reads ``MODEL.DEEPMASK``, ``INPUT.FORMAT``, ``INPUT.RANDOM_FLIP``,
            ``INSTSEG.AUGMENTATIONS`` and what a batch is made of.
        dicts: the training set.
        seed: of the run.

    Raises:
        ValueError: if a value is not allowed, an augmentation is asked for that patches do not
            have, or no object is large enough.
    """
    geometry, node = geometry_from_config(cfg), cfg.MODEL.DEEPMASK
    index = index_from_config(cfg, dicts, str(list(cfg.DATASETS.TRAIN)))
    sampler = LegacyWindowSampler if node.LEGACY_SAMPLER else WindowSampler
    plan = HeadPlan(node.SCORE_FREQ, cfg.SOLVER.IMS_PER_BATCH, alternate=node.ALTERNATE, seed=seed)
    if comm.is_main_process():
        plan.warn_of_uneven_parts(comm.get_world_size() * cfg.INSTSEG.ACCUMULATE)
    photometric, geometric = _augmentations(cfg)
    cutter = PatchCutter(
        # Serialised: loading processes then share the memory.
        DatasetFromList(dicts, copy=False),
        index,
        geometry,
        ImageCache(cfg.INPUT.FORMAT, int(node.IMAGE_CACHE_MB * 2**20)),
        photometric=photometric,
        geometric=geometric,
    )
    return PatchSource(sampler(index, geometry), plan, cutter)


def _augmentations(cfg: CfgNode) -> tuple[list[T.Augmentation], list[T.Augmentation]]:
    """Return those of the image and those of the patch; the sampling itself crops and resizes."""
    refused = {
        "INPUT.CROP.ENABLED": cfg.INPUT.CROP.ENABLED,
        "INSTSEG.AUGMENTATIONS.SSD.ENABLED": cfg.INSTSEG.AUGMENTATIONS.SSD.ENABLED,
        "INSTSEG.STRETCH": any(cfg.INSTSEG.STRETCH),
    }
    for key, on in refused.items():
        if on:
            raise ValueError(f"{key} must be off: MODEL.DEEPMASK crops and resizes patches itself.")
    asked = augmentation_kwargs(cfg, True) | {"min_size": (0,)}
    photometric = {key: asked.pop(key) for key in ("brightness", "contrast", "saturation")}
    return build_augmentations(min_size=(0,), max_size=0, **photometric), build_augmentations(
        **asked
    )
