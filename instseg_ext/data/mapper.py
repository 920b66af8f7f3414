"""From a data set dictionary to what a model eats: an image tensor and instances with bit masks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, Keypoints
from pycocotools import mask as mask_util

from instseg_ext.data.augmentation import (
    InstanceInput,
    augmentation_kwargs,
    build_augmentations,
)
from instseg_ext.data.keypoints import transform_keypoints
from instseg_ext.data.mask_crops import transform_mask_crops
from instseg_ext.data.proposal_mapper import transform_proposals
from instseg_ext.data.registration import load_keypoint_metadata
from instseg_ext.data.segmentation import compress_rle

__all__ = [
    "InstSegDatasetMapper",
    "KeypointDatasetMapper",
    "annotation_boxes",
    "build_mapper",
    "read_image",
    "transform_masks",
]

logger = logging.getLogger(__name__)


class InstSegDatasetMapper:
    """Read an image, augment it, and give its instances as full-image bit masks.

    Polygons are transformed as polygons and then drawn; run-length masks are resampled to the
    nearest pixel. Boxes are tight around the transformed masks. Instances whose mask is empty after
    the augmentation are dropped, crowds as well unless ``keep_crowd``. Augmentations see the
    annotations' boxes, see :class:`instseg_ext.data.augmentation.InstanceInput`.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        keep_crowd: bool = False,
        proposal_topk: int = 2000,
    ):
        """Set up the mapper; with a config it is ``InstSegDatasetMapper(cfg, is_train)``.

        Args:
            is_train: False leaves the annotations out.
            augmentations: applied in order.
            image_format: ``BGR``, ``RGB`` or another format of detectron2's reader.
            keep_crowd: keep crowds, marked in the field ``gt_is_crowd``.
            proposal_topk: keep at most so many of an image's precomputed proposals, the best.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.keep_crowd = keep_crowd
        self.proposal_topk = proposal_topk

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True, keep_crowd: bool = False) -> dict:
        """Read ``INPUT``, ``INSTSEG`` and how many precomputed proposals are kept."""
        split = "TRAIN" if is_train else "TEST"
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(**augmentation_kwargs(cfg, is_train)),
            "image_format": cfg.INPUT.FORMAT,
            "keep_crowd": keep_crowd,
            "proposal_topk": cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"],
        }

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Map one image.

        Args:
            dataset_dict: detectron2's format; not modified.

        Returns:
            the dictionary without ``annotations``, with ``image`` (C, H, W) uint8, or float32 after
            a stretch or ``INSTSEG.AUGMENTATIONS.SSD``, and in training ``instances`` with
            ``gt_boxes``, ``gt_classes`` (M,) int64 and ``gt_masks`` (BitMasks, M x H x W), where M
            may be 0; precomputed ``proposal_boxes`` become ``proposals``, at the size of the image,
            and ``proposal_rles`` beside them the masks of the same proposals.
            A subclass may return None to have the image replaced by another one.

        Raises:
            FileNotFoundError: if the image is missing.
            ValueError: if it cannot be read or its size differs from the annotation file's.
        """
        dataset_dict = dict(dataset_dict)
        annotations = dataset_dict.pop("annotations", None)
        image = read_image(dataset_dict, self.image_format)
        source_hw = image.shape[:2]
        usable = self.usable(annotations or []) if self.is_train else []
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in usable], dtype=bool)
        aug_input = InstanceInput(image, annotation_boxes(usable), crowd)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if "proposal_boxes" in dataset_dict:
            transform_proposals(dataset_dict, image.shape[:2], transforms, self.proposal_topk)
        if self.is_train and annotations is not None:
            left = [usable[i] for i in aug_input.index]
            dataset_dict["instances"] = self.make_instances(
                left, transforms, source_hw, image.shape[:2]
            )
        return dataset_dict

    def usable(self, annotations: list[dict]) -> list[dict]:
        """Return the annotations that can become instances; the list given is not modified."""
        return [
            a
            for a in annotations
            if a.get("segmentation") and (self.keep_crowd or not a.get("iscrowd", 0))
        ]

    def make_instances(
        self,
        annotations: list[dict],
        transforms: T.TransformList,
        source_hw: tuple[int, int],
        size_hw: tuple[int, int],
    ) -> Instances:
        """Transform the annotations of one image.

        Args:
            annotations: the usable ones of one image; not modified.
            transforms: what happened to the image.
            source_hw: size of the image file.
            size_hw: size of the transformed image.

        Returns:
            instances of size ``size_hw``; empty ones have all fields with correct types.
        """
        masks = transform_masks(
            [a["segmentation"] for a in annotations], transforms, source_hw, size_hw
        )
        boxes, keep = self.boxes(annotations, masks, transforms)
        classes = torch.tensor([int(a["category_id"]) for a in annotations], dtype=torch.int64)
        instances = Instances(tuple(size_hw))
        instances.gt_boxes = Boxes(boxes[keep])
        instances.gt_classes = classes[keep]
        instances.gt_masks = BitMasks(masks[keep])
        for name, values in self.further_fields(annotations, transforms, size_hw).items():
            instances.set(name, values[keep])
        return instances

    def further_fields(
        self, annotations: list[dict], transforms: T.TransformList, size_hw: tuple[int, int]
    ) -> dict[str, Any]:
        """Return fields beside boxes, classes and masks, for instances with and without a mask.

        Args:
            annotations: M annotations.
            transforms: what happened to the image.
            size_hw: size of the transformed image.

        Returns:
            name -> M values that an (M,) bool tensor can index.
        """
        if not self.keep_crowd:
            return {}
        crowd = [bool(a.get("iscrowd", 0)) for a in annotations]
        return {"gt_is_crowd": torch.tensor(crowd, dtype=torch.bool)}

    def boxes(
        self, annotations: list[dict], masks: torch.Tensor, transforms: T.TransformList
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the boxes of instances, and which instances stay.

        Args:
            annotations: M annotations.
            masks: (M, H, W) bool, transformed.
            transforms: what happened to the image.

        Returns:
            (M, 4) float32, XYXY in pixels of the masks; and (M,) bool.
        """
        return mask_boxes(masks)


class KeypointDatasetMapper(InstSegDatasetMapper):
    """The shared mapper with ``gt_keypoints`` (``Keypoints``, M x K x 3) of each instance.

    Instances without annotated keypoints have K unlabelled ones.
    """

    @configurable
    def __init__(self, *, flip_indices: Sequence[int], **kwargs: Any):
        """Set up the mapper; with a config it is ``KeypointDatasetMapper(cfg, is_train)``.

        Args:
            flip_indices: for each keypoint the one that takes its place in a mirrored image.
            **kwargs: the arguments of ``InstSegDatasetMapper``.
        """
        super().__init__(**kwargs)
        self.flip_indices = list(flip_indices)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True, keep_crowd: bool = False) -> dict:
        """Read what the shared mapper reads, ``DATASETS.TRAIN`` and the number of keypoints."""
        arguments = super().from_config(cfg, is_train, keep_crowd)
        return {**arguments, "flip_indices": _flip_indices(cfg)}

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Map one image; ValueError if an object has other than no or three numbers a keypoint."""
        expected = 3 * len(self.flip_indices)
        for annotation in self.usable(dataset_dict.get("annotations") or []):
            found = len(annotation.get("keypoints") or ())
            if self.is_train and found not in (0, expected):
                raise ValueError(
                    f"Image {dataset_dict['file_name']} (image id "
                    f"{dataset_dict.get('image_id', '?')}): an object has {found} numbers under "
                    f"'keypoints', not {expected} (x, y and visibility of "
                    f"{len(self.flip_indices)}); `instseg check-dataset` lists all such objects."
                )
        return super().__call__(dataset_dict)

    def further_fields(
        self, annotations: list[dict], transforms: T.TransformList, size_hw: tuple[int, int]
    ) -> dict[str, Any]:
        """Add the keypoints."""
        keypoints = np.zeros((len(annotations), len(self.flip_indices), 3))
        for row, annotation in enumerate(annotations):
            if annotation.get("keypoints"):
                keypoints[row] = np.reshape(annotation["keypoints"], (-1, 3))
        moved = transform_keypoints(keypoints, transforms, size_hw, self.flip_indices)
        fields = super().further_fields(annotations, transforms, size_hw)
        return {**fields, "gt_keypoints": Keypoints(moved)}


def _flip_indices(cfg: CfgNode) -> list[int]:
    """Return what takes the place of each keypoint in a mirror; check that all sets have them."""
    names = list(cfg.DATASETS.TRAIN)
    for name in names:
        load_keypoint_metadata(name)
        if not MetadataCatalog.get(name).get("keypoint_names"):
            raise ValueError(
                f"MODEL.KEYPOINT_ON is True, but data set {name!r} declares no keypoints: a "
                "category of its annotation file needs the list 'keypoints' with their names; or "
                "turn the key off."
            )
    indices = detection_utils.create_keypoint_hflip_indices(names)
    expected = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if len(indices) != expected:
        raise ValueError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {expected}, but data set {names[0]!r} "
            f"declares {len(indices)} keypoints; set the key to {len(indices)}."
        )
    # Said now rather than by the evaluation after the training.
    if cfg.DATASETS.TEST and (len(cfg.TEST.KEYPOINT_OKS_SIGMAS) or 17) != expected:
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS needs a number for each of {expected} keypoints, not "
            f"{list(cfg.TEST.KEYPOINT_OKS_SIGMAS)} ([] = the 17 of COCO's persons)."
        )
    return indices


def build_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict], dict | None]:
    """Build the mapper that methods use unless they bring their own.

    Raises:
        ValueError: if a training set lacks the keypoints that ``MODEL.KEYPOINT_ON`` asks for.
    """
    if is_train and cfg.MODEL.KEYPOINT_ON:
        return KeypointDatasetMapper(cfg, is_train)
    return InstSegDatasetMapper(cfg, is_train)


def read_image(dataset_dict: dict, image_format: str) -> np.ndarray:
    """Read the image of a data set dictionary.

    Args:
        dataset_dict: with ``file_name``; ``height`` and ``width`` are filled in where missing.
        image_format: ``BGR``, ``RGB``, ...

    Returns:
        (H, W, C) uint8, a copy that may be written to; upright according to its EXIF tag.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no readable image, or its size differs from the one annotated.
    """
    name, image_id = dataset_dict["file_name"], dataset_dict.get("image_id", "?")
    try:
        image = detection_utils.read_image(name, format=image_format)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"Image {name} (image id {image_id}) is missing; check the data set's image folder."
        ) from error
    except (OSError, SyntaxError) as error:
        # Pillow reports some broken files, PNGs among them, as SyntaxError.
        raise ValueError(f"Image {name} (image id {image_id}) cannot be read: {error}") from error
    height, width = image.shape[:2]
    expected = (dataset_dict.get("height", height), dataset_dict.get("width", width))
    if expected != (height, width):
        raise ValueError(
            f"Image {name} (image id {image_id}) is {width} x {height} pixels, but its annotation "
            f"file says {expected[1]} x {expected[0]}; `instseg check-dataset` lists all of them."
        )
    dataset_dict["height"], dataset_dict["width"] = height, width
    return np.array(image)


def annotation_boxes(annotations: Sequence[dict]) -> np.ndarray:
    """Return the boxes of annotations.

    Args:
        annotations: N of one image. Where there is no ``bbox`` with a ``bbox_mode`` of XYXY_ABS or
            XYWH_ABS, the box of the segmentation (polygons or RLE) is taken.

    Returns:
        (N, 4) float64, XYXY in pixels of the image file.
    """
    boxes = np.zeros((len(annotations), 4))
    has_size = np.zeros(len(annotations), dtype=bool)
    for row, annotation in enumerate(annotations):
        mode = annotation.get("bbox_mode")
        if "bbox" in annotation and mode in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            boxes[row], has_size[row] = annotation["bbox"], mode == BoxMode.XYWH_ABS
        else:
            boxes[row] = _segmentation_box(annotation["segmentation"])
    boxes[has_size, 2:] += boxes[has_size, :2]
    return boxes


def transform_masks(
    segmentations: Sequence[list | dict | np.ndarray],
    transforms: T.TransformList,
    source_hw: tuple[int, int],
    size_hw: tuple[int, int],
) -> torch.Tensor:
    """Carry segmentations through a geometric transform.

    Args:
        segmentations: M polygon lists, RLE dictionaries or (H, W) arrays, mixed as they come.
        transforms: from the source image to the result.
        source_hw: height and width of the source image.
        size_hw: height and width of the result.

    Returns:
        (M, h, w) bool.
    """
    masks = np.zeros((len(segmentations), *size_hw), dtype=bool)
    crops = transform_mask_crops(segmentations, transforms, source_hw, size_hw)
    for mask, crop in zip(masks, crops, strict=True):
        crop.paste(mask)
    return torch.from_numpy(masks)


def _segmentation_box(segmentation: list | dict) -> list[float]:
    """Return the XYXY box of polygons or an RLE dictionary."""
    if isinstance(segmentation, dict):
        x, y, width, height = mask_util.toBbox(compress_rle(segmentation))
        return [x, y, x + width, y + height]
    points = np.concatenate([np.reshape(part, (-1, 2)) for part in segmentation])
    return [*points.min(axis=0), *points.max(axis=0)]


def mask_boxes(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tight boxes of masks, and which masks are not empty.

    Args:
        masks: (M, H, W) bool.

    Returns:
        (M, 4) float32, XYXY in pixels, the right and lower edges exclusive, zeros for empty masks;
        and (M,) bool.
    """
    height, width = masks.shape[1:]
    columns, rows = masks.any(dim=1), masks.any(dim=2)
    keep = columns.any(dim=1)
    left, top = columns.int().argmax(dim=1), rows.int().argmax(dim=1)
    right = width - columns.flip(1).int().argmax(dim=1)
    bottom = height - rows.flip(1).int().argmax(dim=1)
    boxes = torch.stack([left, top, right, bottom], dim=1).float()
    return boxes * keep[:, None], keep
