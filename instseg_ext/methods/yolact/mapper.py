"""YOLACT's training samples: crowds stay, and boxes are those of the annotation file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from instseg_ext.data import InstSegDatasetMapper
from instseg_ext.data.mapper import annotation_boxes

__all__ = ["YOLACTMapper", "build_yolact_mapper"]


class YOLACTMapper(InstSegDatasetMapper):
    """Make samples with crowds, last and marked by ``gt_is_crowd``, and the annotated boxes.

    A box is moved with the image and cut at its border, never taken from the mask: the box alone
    decides whether an object stays, so that one may have an empty mask. An image whose objects,
    crowds aside, are all lost in the augmentation is rejected; one that never had any is not.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        min_box_size: float,
    ):
        """Set up the mapper; with a config it is ``YOLACTMapper(cfg, is_train)``.

        Args:
            is_train: False leaves the annotations out.
            augmentations: applied in order; the last one gives the size of the network input.
            image_format: ``BGR``, ``RGB`` or another format of detectron2's reader.
            min_box_size: objects and crowds stay whose width and height are above this many pixels
                after the augmentation; at least 0.

        Raises:
            ValueError: if ``min_box_size`` is negative.
        """
        super().__init__(
            is_train=is_train,
            augmentations=augmentations,
            image_format=image_format,
            keep_crowd=True,
        )
        if min_box_size < 0:
            raise ValueError(f"MODEL.YOLACT.MIN_BOX_SIZE is 0.0 or more, not {min_box_size}.")
        self.min_box_size = min_box_size

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Read what the shared mapper reads, and ``MODEL.YOLACT.MIN_BOX_SIZE``."""
        arguments = super().from_config(cfg, is_train)
        # dense methods read no proposals
        del arguments["keep_crowd"], arguments["proposal_topk"]
        return {**arguments, "min_box_size": cfg.MODEL.YOLACT.MIN_BOX_SIZE}

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Map one image; None rejects it. See :class:`InstSegDatasetMapper`."""
        sample = super().__call__(dataset_dict)
        if "instances" not in sample or not sample["instances"].gt_is_crowd.all():
            return sample
        annotations = self.usable(dataset_dict["annotations"])
        return sample if all(a.get("iscrowd", 0) for a in annotations) else None

    def usable(self, annotations: list[dict]) -> list[dict]:
        """Return the annotations that can become instances, crowds last."""
        return sorted(super().usable(annotations), key=lambda a: bool(a.get("iscrowd", 0)))

    def boxes(
        self, annotations: list[dict], masks: torch.Tensor, transforms: T.TransformList
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the annotated boxes, moved and cut at the border, and which are large enough."""
        height, width = masks.shape[1:]
        boxes = transforms.apply_box(annotation_boxes(annotations))
        boxes = boxes.clip(0, np.array([width, height, width, height]))
        keep = (boxes[:, 2:] - boxes[:, :2] > self.min_box_size).all(axis=1)
        return torch.from_numpy(boxes).float(), torch.from_numpy(keep)


def build_yolact_mapper(cfg: CfgNode, is_train: bool) -> YOLACTMapper:
    """Build the mapper that the method's record names."""
    return YOLACTMapper(cfg, is_train)
