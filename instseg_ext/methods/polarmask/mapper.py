"""PolarMask's training samples: contours and centres of mass instead of masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from torch import Tensor

from instseg_ext.compat import opencv
from instseg_ext.data import InstSegDatasetMapper
from instseg_ext.data.mapper import annotation_boxes
from instseg_ext.data.mask_crops import MaskCrop, transform_mask_crops
from instseg_ext.structures.contours import Contours, trace_contours
from instseg_ext.structures.rle import segmentation_rle

__all__ = ["PolarMaskMapper", "build_polarmask_mapper"]

# x + w - x is not always w; annotation files give hundredths of pixels.
_ROUNDING = 1e-6


class PolarMaskMapper(InstSegDatasetMapper):
    """Make samples with boxes of pixel indices, contours and centres of mass.

    Boxes are the annotated ones, moved with the image and cut at its border. They are inclusive:
    (x1, y1, x2, y2) are the indices of the first and the last pixel, so that the authors' distances
    come out (code of arXiv:1909.13226); a sample says so by ``boxes_inclusive``. With
    ``MODEL.POLARMASK.COORDINATES`` "areas" the pixels are those that the resized object covers,
    otherwise the resized indices, as the authors have it. Contours are those
    of :func:`instseg_ext.structures.contours.trace_contours` at the size of the network input.

    Left out are objects too small in the image file, those marked ``ignore``, crowds (whose pixels
    train as background), and objects of which nothing is left in the network input. An image that
    has lost all its objects is rejected; one that never had any is not.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str,
        min_area: float,
        min_size: float,
        coordinates: str = "indices",
        with_contours: bool = True,
    ):
        """Set up the mapper; with a config it is ``PolarMaskMapper(cfg, is_train)``.

        Args:
            is_train: False leaves the annotations out.
            augmentations: applied in order; axes may be swapped and mirrored, not turned otherwise.
            image_format: ``BGR``, ``RGB`` or another format of detectron2's reader.
            min_area: objects stay whose annotated area is above this many pixels of the image file
                and whose mask has at least as many; the mask's pixels count where there is no area.
            min_size: objects stay whose width or height is at least this many pixels of the file.
            coordinates: ``indices`` or ``areas``.
            with_contours: False for a box detector: no masks are drawn, boxes alone decide what is
                left of an object.

        Raises:
            ValueError: if ``min_area`` or ``min_size`` is negative.
        """
        super().__init__(is_train=is_train, augmentations=augmentations, image_format=image_format)
        for key, value in (("MIN_AREA", min_area), ("MIN_SIZE", min_size)):
            if value < 0:
                raise ValueError(f"MODEL.POLARMASK.{key} is 0 or more, not {value}.")
        self.min_area, self.min_size, self.with_contours = min_area, min_size, with_contours
        self.coordinates = coordinates

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Read what the shared mapper reads, and ``MODEL.POLARMASK``."""
        arguments = super().from_config(cfg, is_train)
        # dense methods read no proposals
        del arguments["keep_crowd"], arguments["proposal_topk"]
        node = cfg.MODEL.POLARMASK
        return {
            **arguments,
            "min_area": node.MIN_AREA,
            "min_size": node.MIN_SIZE,
            "coordinates": node.COORDINATES,
            "with_contours": node.WITH_MASK or node.CENTER == "mass",
        }

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Map one image.

        Args:
            dataset_dict: detectron2's format; not modified.

        Returns:
            as :class:`InstSegDatasetMapper`, with ``boxes_inclusive`` True and ``instances`` with
            ``gt_boxes`` (inclusive), ``gt_classes`` (M,) int64 and, unless they are switched off,
            ``gt_contours`` (:class:`Contours`) and ``gt_centers`` (M, 2) int64 as x and y; no
            ``gt_masks``. None rejects the image.

        Raises:
            FileNotFoundError: if the image is missing.
            ValueError: if it cannot be read or its size differs from the annotation file's.
        """
        sample = super().__call__(dataset_dict)
        if "instances" not in sample:
            return sample
        if len(sample["instances"]) == 0 and self.usable(dataset_dict["annotations"]):
            return None
        return {**sample, "boxes_inclusive": True}

    def make_instances(
        self,
        annotations: list[dict],
        transforms: T.TransformList,
        source_hw: tuple[int, int],
        size_hw: tuple[int, int],
    ) -> Instances:
        """Transform the annotations of one image; see the base class and ``__call__``."""
        boxes = annotation_boxes(annotations)
        large = self._large_enough(annotations, boxes, source_hw)
        if self.coordinates == "areas":
            moved = (transforms.apply_box(boxes) - [0, 0, 1, 1]).astype(np.float32)
        else:
            moved = inclusive_boxes(boxes, transforms, source_hw)
        height, width = size_hw
        seen = (moved[:, 2:] >= 0) & (moved[:, :2] <= np.array([width - 1, height - 1]))
        kept = np.flatnonzero(large & seen.all(axis=1)).tolist()

        limits = np.array([width - 1, height - 1] * 2, dtype=np.float32)
        classes = [int(annotations[i]["category_id"]) for i in kept]
        instances = Instances(tuple(size_hw))
        instances.gt_boxes = Boxes(torch.from_numpy(moved[kept].clip(0, limits)))
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        if not self.with_contours:
            return instances
        segmentations = [annotations[i]["segmentation"] for i in kept]
        crops = transform_mask_crops(segmentations, transforms, source_hw, size_hw)
        instances.gt_contours, instances.gt_centers, found = _trace(crops, size_hw)
        return instances[found]

    def _large_enough(
        self, annotations: list[dict], boxes: np.ndarray, source_hw: tuple[int, int]
    ) -> np.ndarray:
        """Return (M,) bool: which annotations are neither ignored nor too small.

        Args:
            annotations: M annotations; not modified.
            boxes: (M, 4) theirs, XYXY in pixels of the image file.
            source_hw: size of the image file.
        """
        keep = (boxes[:, 2:] - boxes[:, :2] >= self.min_size - _ROUNDING).any(axis=1)
        for i in np.flatnonzero(keep):
            annotation = annotations[i]
            pixels = _pixel_count(annotation["segmentation"], source_hw)
            area = annotation.get("area", pixels)
            keep[i] = (
                not annotation.get("ignore", False)
                and area > self.min_area
                and pixels >= self.min_area
            )
        return keep


def build_polarmask_mapper(cfg: CfgNode, is_train: bool) -> PolarMaskMapper:
    """Build the mapper that the method's record names."""
    return PolarMaskMapper(cfg, is_train)


def inclusive_boxes(
    boxes: np.ndarray, transforms: T.TransformList, source_hw: tuple[int, int]
) -> np.ndarray:
    """Carry boxes through a transform as the authors' code does, as indices of pixels.

    The last pixel of a box of width w is x + w - 1. An index i becomes i * scale, or W - 1 - i *
    scale where the image is mirrored.

    Args:
        boxes: (M, 4) XYXY in pixels of the image file, the far sides exclusive; not modified.
        transforms: scales, shifts, mirrors and swaps axes.
        source_hw: size of the image file.

    Returns:
        (M, 4) float32, XYXY indices of the first and last pixel in the result, not clipped. A box
        narrower than one pixel has its sides in reverse order.

    Raises:
        ValueError: if ``transforms`` turns or shears the image.
    """
    height, width = source_hw
    corners = np.array([[0, 0], [width, 0], [0, height]], dtype=np.float64)
    origin, right, down = transforms.apply_coords(corners)
    matrix = np.stack([(right - origin) / width, (down - origin) / height], axis=1)
    if (np.abs(matrix) > _ROUNDING).sum() != 2:
        raise ValueError(
            "PolarMask's boxes can be scaled, shifted, mirrored and turned by right angles, but "
            f"not moved by {transforms}."
        )
    mirrored = matrix.sum(axis=1) < 0  # of each axis of the result one entry is not 0
    indices = (boxes - [0, 0, 1, 1]).astype(np.float32).reshape(-1, 2, 2)
    # In float32 and in this order, which gives the authors' bits: a location on a side of a box is
    # not inside.
    moved = indices @ matrix.T.astype(np.float32) + origin.astype(np.float32)
    moved -= mirrored.astype(np.float32)
    moved[..., mirrored] = moved[:, ::-1, mirrored]
    return moved.reshape(-1, 4)


def _pixel_count(segmentation: list | dict | np.ndarray, size_hw: tuple[int, int]) -> int:
    """Count the pixels of a mask without drawing it."""
    if isinstance(segmentation, np.ndarray):
        return int(np.count_nonzero(segmentation))
    rle = segmentation_rle(segmentation, *size_hw)
    return 0 if rle is None else int(mask_util.area(rle))


def _trace(crops: list[MaskCrop], size_hw: tuple[int, int]) -> tuple[Contours, Tensor, Tensor]:
    """Trace masks known by their boxes; see ``trace_contours`` for the result.

    One canvas serves all: a stack of them would take longer to fill than to trace. Everything right
    of and below a mask is left out.
    """
    canvas, transpose = np.zeros(size_hw, dtype=bool), opencv().transpose
    traced = []
    for left, top, pixels in crops:
        bottom, right = top + pixels.shape[0], left + pixels.shape[1]
        if pixels.size and not pixels.flags.c_contiguous:
            # Drawn column by column. NumPy takes ten times as long to bring that into rows.
            pixels = transpose(pixels.T.view(np.uint8)).view(bool)
        canvas[top:bottom, left:right] = pixels
        traced.append(trace_contours(canvas[None, :bottom, :right]))
        canvas[top:bottom, left:right] = False
    contours = Contours.cat([part for part, _, _ in traced])
    centers = torch.cat([torch.zeros((0, 2), dtype=torch.int64), *(c for _, c, _ in traced)])
    return contours, centers, contours.lengths > 0
