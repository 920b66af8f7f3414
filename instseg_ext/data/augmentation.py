"""Augmentations built from config values, and the geometric transforms that detectron2 lacks.

Transforms take (H, W, C) numpy images and (N, 2) coordinates as (x, y) in continuous pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from instseg_ext.data.ssd_augmentation import ExpandAndCrop, PhotometricDistortion
from instseg_ext.layers.stretch import stretch

__all__ = [
    "InstanceInput",
    "RandomRotate90",
    "Rotate90Transform",
    "Stretch",
    "StretchTransform",
    "augmentation_kwargs",
    "build_augmentations",
    "ssd_augmentations",
]


class InstanceInput(T.AugInput):
    """An image with its objects, for augmentations that look at them or drop some.

    An augmentation whose ``get_transform`` names ``boxes`` or ``crowd`` is given them.

    Attributes:
        image: (H, W, C).
        boxes: (N, 4) float64, XYXY in pixels of the image, moved along with it, never clipped.
        crowd: (N,) bool.
        index: (N,) row of each object in the arrays that the input was made of.
    """

    def __init__(self, image: np.ndarray, boxes: np.ndarray, crowd: np.ndarray):
        """Keep the arrays; none is changed."""
        super().__init__(image, boxes=boxes)
        self.crowd = crowd
        self.index = np.arange(len(boxes))

    def select(self, keep: np.ndarray) -> None:
        """Drop the objects for which the (N,) bool array is False."""
        self.boxes, self.crowd, self.index = self.boxes[keep], self.crowd[keep], self.index[keep]


class Rotate90Transform(Transform):
    """Rotate counter-clockwise by ``turns`` quarter turns, without resampling."""

    def __init__(self, turns: int, height: int, width: int):
        """Set up the rotation.

        Args:
            turns: 0 to 3.
            height: rows of the input image.
            width: columns of the input image.
        """
        super().__init__()
        self.turns, self.height, self.width = turns % 4, height, width

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Rotate an (H, W) or (H, W, C) image."""
        return np.ascontiguousarray(np.rot90(img, self.turns, axes=(0, 1)))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Rotate (N, 2) coordinates; a new array is returned."""
        x, y = coords[:, 0], coords[:, 1]
        if self.turns == 1:
            x, y = y, self.width - x
        elif self.turns == 2:
            x, y = self.width - x, self.height - y
        elif self.turns == 3:
            x, y = self.height - y, x
        return np.stack([x, y], axis=1)

    def inverse(self) -> Transform:
        """Return the rotation back."""
        height, width = self.height, self.width
        if self.turns % 2:
            height, width = width, height
        return Rotate90Transform(-self.turns % 4, height, width)


class RandomRotate90(T.Augmentation):
    """Rotate by 0, 90, 180 or 270 degrees, each with probability 1/4."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the rotation."""
        turns = int(np.random.randint(4))  # noqa: NPY002 - detectron2's state
        return Rotate90Transform(turns, *image.shape[:2])


class StretchTransform(Transform):
    """Resize to a fixed size with :func:`instseg_ext.layers.stretch.stretch`, as the model does."""

    def __init__(self, height: int, width: int, new_height: int, new_width: int):
        """Set up the resize.

        Args:
            height: rows of the input image.
            width: columns of the input image.
            new_height: rows of the result.
            new_width: columns of the result.
        """
        super().__init__()
        self.size, self.new_size = (height, width), (new_height, new_width)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Resize an (H, W, C) image; the result is float32."""
        # Channels stay last in memory: that saves a slow copy, and the kernel for that order, which
        # gives the same bits, is faster.
        tensor = torch.from_numpy(np.ascontiguousarray(img)).permute(2, 0, 1)
        return stretch(tensor, self.new_size).numpy().transpose(1, 2, 0)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resize an (H, W) or (H, W, C) label image, nearest neighbour about pixel centres."""
        rows, columns = (
            ((np.arange(new) + 0.5) * old / new).astype(np.int64).clip(0, old - 1)
            for old, new in zip(self.size, self.new_size, strict=True)
        )
        return segmentation[rows][:, columns]

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Scale (N, 2) coordinates; a new array is returned."""
        scale = np.array([self.new_size[1] / self.size[1], self.new_size[0] / self.size[0]])
        return coords * scale

    def inverse(self) -> Transform:
        """Return the resize back."""
        return StretchTransform(*self.new_size, *self.size)


class Stretch(T.Augmentation):
    """Always stretch to one size, or to one width and a random height."""

    def __init__(self, size_hw: tuple[int, int], heights: tuple[int, int] | None = None):
        """Keep the sizes.

        Args:
            size_hw: (height, width) of the result.
            heights: lowest and highest height of the result, drawn uniformly instead of
                ``size_hw[0]``; None = off.
        """
        super().__init__()
        self.size_hw = (int(size_hw[0]), int(size_hw[1]))
        self.heights = heights

    def get_transform(self, image: np.ndarray) -> Transform:
        """Return the transform for an image of this size; draws the height."""
        height, width = self.size_hw
        if self.heights is not None:
            low, high = self.heights
            height = int(np.random.randint(low, high + 1))  # noqa: NPY002 - detectron2's state
        return StretchTransform(*image.shape[:2], height, width)


def build_augmentations(
    *,
    min_size: Sequence[int],
    max_size: int,
    sampling: str = "choice",
    flip: str = "none",
    vertical_flip: bool = False,
    rotate90: bool = False,
    crop: tuple[str, Sequence[float]] | None = None,
    brightness: Sequence[float] = (),
    contrast: Sequence[float] = (),
    saturation: Sequence[float] = (),
    ssd: Sequence[T.Augmentation] = (),
    stretch_hw: Sequence[int] = (0, 0),
    stretch_heights: Sequence[int] = (),
) -> list[T.Augmentation]:
    """Make the list of augmentations, in the order in which they are applied.

    The resize comes late because the file's resolution is usually the smaller one; the stretch is
    last, so that the model's input has its size.

    Args:
        min_size: shortest sides in pixels to choose from (or to draw between); 0 = no resize.
        max_size: longest side in pixels.
        sampling: ``choice`` or ``range``.
        flip: ``horizontal``, ``vertical`` or ``none``; with probability 1/2.
        vertical_flip: flip upside down with probability 1/2, beside ``flip``.
        rotate90: rotate by a random multiple of 90 degrees.
        crop: type and size as in ``INPUT.CROP``, None = no crop.
        brightness: factor range (low, high), empty = off.
        contrast: factor range (low, high), empty = off.
        saturation: factor range (low, high), empty = off; needs an image with three channels.
        ssd: those of :func:`ssd_augmentations`; they come after the factors above, because they
            give float images, and before everything that moves pixels.
        stretch_hw: (height, width) of the stretch; (0, 0) = off.
        stretch_heights: lowest and highest height to stretch to, drawn uniformly instead of
            ``stretch_hw[0]``; empty = off.

    Raises:
        ValueError: if a value is not allowed; the message names the config key.
    """
    if flip not in ("horizontal", "vertical", "none"):
        raise ValueError(f"INPUT.RANDOM_FLIP is horizontal, vertical or none, not {flip!r}.")
    photometric = (
        ("BRIGHTNESS", brightness, T.RandomBrightness),
        ("CONTRAST", contrast, T.RandomContrast),
        ("SATURATION", saturation, T.RandomSaturation),
    )
    augmentations: list[T.Augmentation] = []
    for key, bounds, kind in photometric:
        if not len(bounds):
            continue
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
            raise ValueError(
                f"INSTSEG.AUGMENTATIONS.{key} is [] or [low, high] with 0 <= low <= high, not "
                f"{list(bounds)}."
            )
        augmentations.append(kind(*bounds))
    augmentations.extend(ssd)
    if crop is not None:
        augmentations.append(T.RandomCrop(*crop))
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    if vertical_flip:
        augmentations.append(T.RandomFlip(horizontal=False, vertical=True))
    if rotate90:
        augmentations.append(RandomRotate90())
    if max(min_size) > 0:
        augmentations.append(T.ResizeShortestEdge(tuple(min_size), max_size, sampling))
    if any(stretch_hw) or len(stretch_heights):
        augmentations.append(_build_stretch(stretch_hw, stretch_heights))
    return augmentations


def _build_stretch(size_hw: Sequence[int], heights: Sequence[int]) -> Stretch:
    """Check the values of ``INSTSEG.STRETCH`` and ``INSTSEG.STRETCH_HEIGHTS``, one of them set."""
    if not any(size_hw):
        raise ValueError(
            f"INSTSEG.STRETCH_HEIGHTS is {list(heights)}, which needs INSTSEG.STRETCH for the "
            "width and for the size of inference."
        )
    if len(size_hw) != 2 or min(size_hw) <= 0:
        raise ValueError(
            f"INSTSEG.STRETCH is [height, width], both positive, or [0, 0], not {list(size_hw)}."
        )
    if not len(heights):
        return Stretch((size_hw[0], size_hw[1]))
    whole = all(isinstance(height, int) for height in heights)
    if len(heights) != 2 or not whole or not 0 < heights[0] <= heights[1]:
        raise ValueError(
            "INSTSEG.STRETCH_HEIGHTS is [] or [low, high], two whole numbers with 0 < low <= high, "
            f"not {list(heights)}."
        )
    return Stretch((size_hw[0], size_hw[1]), (heights[0], heights[1]))


def ssd_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Build what ``INSTSEG.AUGMENTATIONS.SSD`` asks for, in the published order.

    Args:
        cfg: reads that node, ``INPUT.FORMAT`` and ``MODEL.PIXEL_MEAN``.

    Returns:
        an empty list unless the node is enabled.

    Raises:
        ValueError: if a value is not allowed; the message names the config key.
    """
    ssd = cfg.INSTSEG.AUGMENTATIONS.SSD
    if not ssd.ENABLED:
        return []
    fill = list(ssd.EXPAND_FILL) or list(cfg.MODEL.PIXEL_MEAN)
    if len(fill) != len(cfg.MODEL.PIXEL_MEAN):
        raise ValueError(
            "INSTSEG.AUGMENTATIONS.SSD.EXPAND_FILL is [] or has a value for each of the "
            f"{len(cfg.MODEL.PIXEL_MEAN)} channels, not {fill}."
        )
    augmentations: list[T.Augmentation] = []
    if ssd.PHOTOMETRIC:
        augmentations.append(PhotometricDistortion(cfg.INPUT.FORMAT))
    if ssd.CROP or ssd.EXPAND_RATIO != 1:
        augmentations.append(ExpandAndCrop(expand_ratio=ssd.EXPAND_RATIO, fill=fill, crop=ssd.CROP))
    return augmentations


def augmentation_kwargs(cfg: CfgNode, is_train: bool) -> dict:
    """Read the arguments of :func:`build_augmentations` from a config.

    In testing only the resize of ``INPUT.MIN_SIZE_TEST`` remains: the model itself stretches.

    Raises:
        ValueError: if ``INSTSEG.STRETCH`` is on while an ``INPUT.MIN_SIZE_*`` asks for another
            resize.
    """
    size_key = "MIN_SIZE_TRAIN" if is_train else "MIN_SIZE_TEST"
    min_size = cfg.INPUT[size_key]
    min_size = tuple(min_size) if isinstance(min_size, (list, tuple)) else (min_size,)
    if any(cfg.INSTSEG.STRETCH) and max(min_size) > 0:
        raise ValueError(
            f"INSTSEG.STRETCH is {list(cfg.INSTSEG.STRETCH)}, so INPUT.{size_key} must be 0, not "
            f"{list(min_size)}: images would be resized twice."
        )
    if not is_train:
        return {"min_size": min_size, "max_size": cfg.INPUT.MAX_SIZE_TEST}
    extra = cfg.INSTSEG.AUGMENTATIONS
    crop = cfg.INPUT.CROP
    return {
        "min_size": min_size,
        "max_size": cfg.INPUT.MAX_SIZE_TRAIN,
        "sampling": cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
        "flip": cfg.INPUT.RANDOM_FLIP,
        "vertical_flip": extra.VERTICAL_FLIP,
        "rotate90": extra.ROTATE90,
        "crop": (crop.TYPE, crop.SIZE) if crop.ENABLED else None,
        "brightness": extra.BRIGHTNESS,
        "contrast": extra.CONTRAST,
        "saturation": extra.SATURATION,
        "ssd": ssd_augmentations(cfg),
        "stretch_hw": cfg.INSTSEG.STRETCH,
        "stretch_heights": cfg.INSTSEG.STRETCH_HEIGHTS,
    }
