"""Semantic segmentation data: data sets with label maps, and their mapper.

detectron2's form: dictionaries with ``sem_seg_file_name``, class names in ``stuff_classes`` and an
``ignore_label`` in the metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image

from instseg_ext.data.augmentation import augmentation_kwargs, build_augmentations
from instseg_ext.data.mapper import read_image
from instseg_ext.data.registration import is_semantic
from instseg_ext.data.ssd_augmentation import PhotometricDistortion

__all__ = [
    "SemanticDatasetMapper",
    "check_annotation_kind",
    "open_labels",
    "read_labels",
    "semantic_augmentations",
]


class SemanticDatasetMapper:
    """Read an image and its label map, and augment both."""

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        num_classes: int,
        ignore_value: int,
    ):
        """Set up the mapper; with a config it is ``SemanticDatasetMapper(cfg, is_train)``.

        Args:
            is_train: False leaves the label map out.
            augmentations: applied in order.
            image_format: ``BGR``, ``RGB`` or another format of detectron2's reader.
            num_classes: labels are below it.
            ignore_value: but for this one.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.num_classes = num_classes
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Read ``INPUT``, ``INSTSEG``, and classes and ignored label of the head.

        Raises:
            ValueError: if a value is not allowed; the message names the config key.
        """
        if is_train and cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
            raise ValueError(
                "DATALOADER.SAMPLER_TRAIN must be TrainingSampler for label maps, not "
                f"{cfg.DATALOADER.SAMPLER_TRAIN!r}, which counts instances."
            )
        kwargs = augmentation_kwargs(cfg, is_train)
        augmentations = build_augmentations(**kwargs)
        return {
            "is_train": is_train,
            "augmentations": semantic_augmentations(cfg) if is_train else augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one image.

        Args:
            dataset_dict: detectron2's format; not modified.

        Returns:
            the dictionary without ``sem_seg_file_name``, with ``image`` (C, H, W) uint8, or float32
            after a stretch or colour jitter, and in training ``sem_seg`` (H, W) int64.

        Raises:
            FileNotFoundError: if image or label map are missing.
            ValueError: if one of them cannot be read, or they do not belong together.
        """
        dataset_dict = {k: v for k, v in dataset_dict.items() if k != "annotations"}
        image = read_image(dataset_dict, self.image_format)
        labels = None
        if self.is_train:
            labels = read_labels(dataset_dict, self.num_classes, self.ignore_value)
        dataset_dict.pop("sem_seg_file_name", None)
        aug_input = T.AugInput(image, sem_seg=labels)
        self.augmentations(aug_input)
        image = aug_input.image
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.is_train:
            dataset_dict["sem_seg"] = torch.as_tensor(aug_input.sem_seg.astype(np.int64))
        return dataset_dict


def open_labels(path: str, dtype: np.dtype | type | None = None) -> np.ndarray:
    """Return the pixels of an image file as they are stored, of a palette image the indices.

    Args:
        path: of the file.
        dtype: of the result; None = that of the file.
    """
    with PathManager.open(path, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)


def read_labels(dataset_dict: dict, num_classes: int, ignore_value: int) -> np.ndarray:
    """Read the label map of a data set dictionary.

    Args:
        dataset_dict: with ``file_name``, ``height`` and ``width``, and ``sem_seg_file_name``.
        num_classes: labels are below it.
        ignore_value: but for this one.

    Returns:
        (H, W) uint8, or float32 where numbers are higher: these types can be resized.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no label map of this image and these classes.
    """
    name, image = dataset_dict.get("sem_seg_file_name"), dataset_dict["file_name"]
    if not name:
        raise ValueError(
            f"Image {image} has no label map: a data set for semantic segmentation needs "
            "'sem_seg_file_name' for every image."
        )
    try:
        labels = open_labels(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Label map {name} of image {image} is missing; check the data set's folder of labels."
        ) from error
    except (OSError, SyntaxError) as error:
        # Pillow reports some broken files, PNGs among them, as SyntaxError.
        raise ValueError(f"Label map {name} of image {image} cannot be read: {error}") from error
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise ValueError(
            f"{name} of image {image} is no label map: it needs one whole number per pixel, but "
            f"has the shape {labels.shape} of {labels.dtype}."
        )
    height, width = dataset_dict["height"], dataset_dict["width"]
    if labels.shape != (height, width):
        raise ValueError(
            f"Label map {name} is {labels.shape[1]} x {labels.shape[0]} pixels, but image {image} "
            f"is {width} x {height}."
        )
    wrong = labels[((labels >= num_classes) | (labels < 0)) & (labels != ignore_value)]
    if wrong.size:
        raise ValueError(
            f"Label map {name} of image {image} holds {np.unique(wrong)[:5].tolist()}: labels are "
            f"0 to {num_classes - 1}, or {ignore_value} where pixels do not count "
            "(MODEL.SEM_SEG_HEAD.IGNORE_VALUE)."
        )
    in_bytes = labels.min() >= 0 and labels.max() < 256
    return labels.astype(np.uint8 if in_bytes else np.float32)


def semantic_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the augmentations of training: resize, crop, colours, flips, stretch.

    Args:
        cfg: reads ``INPUT``, ``INSTSEG`` and the ignored label of the head.

    Raises:
        ValueError: if a value is not allowed; the message names the config key.
    """
    if cfg.INSTSEG.AUGMENTATIONS.SSD.ENABLED:
        raise ValueError(
            "INSTSEG.AUGMENTATIONS.SSD.ENABLED is for instances: for semantic segmentation set "
            "INPUT.COLOR_AUG_SSD."
        )
    kwargs = augmentation_kwargs(cfg, True)
    resize = {key: kwargs.pop(key) for key in ("min_size", "max_size", "sampling")}
    crop = _crop(cfg) if kwargs.pop("crop") else []
    colours = []
    if cfg.INPUT.COLOR_AUG_SSD:
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(
                f"INPUT.COLOR_AUG_SSD needs INPUT.FORMAT RGB or BGR, not {cfg.INPUT.FORMAT!r}."
            )
        # detectron2's project turns by up to 18 steps of OpenCV's hue, which are 2 degrees each.
        colours = [PhotometricDistortion(cfg.INPUT.FORMAT, hue=36.0), _Clip()]
    rest = build_augmentations(min_size=(0,), max_size=0, **{**kwargs, "ssd": colours})
    return [*build_augmentations(**resize), *crop, *rest]


def _crop(cfg: CfgNode) -> list[T.Augmentation]:
    node = cfg.INPUT.CROP
    if not 0 < node.SINGLE_CATEGORY_MAX_AREA <= 1:
        raise ValueError(
            "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA is above 0 and at most 1 (any crop will do), not "
            f"{node.SINGLE_CATEGORY_MAX_AREA}."
        )
    return [
        T.RandomCrop_CategoryAreaConstraint(
            node.TYPE,
            node.SIZE,
            node.SINGLE_CATEGORY_MAX_AREA,
            cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        )
    ]


class _Clip(T.Augmentation):
    """Bring colours back to 0 to 255, where a camera's are."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Return the transform, the same for every image."""
        return T.ColorTransform(_clip)


def _clip(image: np.ndarray) -> np.ndarray:
    return image.clip(0, 255)


def check_annotation_kind(names: Sequence[str], mapper: Callable[[dict], dict | None]) -> None:
    """Make sure that data sets hold what a model is trained or judged on.

    Args:
        names: of registered data sets.
        mapper: the model's.

    Raises:
        ValueError: naming a data set that holds label maps where the model predicts instances, or
            the other way round.
    """
    wanted = isinstance(mapper, SemanticDatasetMapper)
    for name in names:
        if is_semantic(name) == wanted:
            continue
        held, needed = ("label maps", "instances")[:: -1 if wanted else 1]
        raise ValueError(
            f"Data set {name!r} holds {held}, but the configured model predicts {needed}; choose "
            "another data set or another config."
        )
