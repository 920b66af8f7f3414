"""The augmentation of single-shot detectors that YOLACT's recipe uses.

Colours are distorted, the image is laid on a larger canvas, and a window is cut out of it (Liu et
al., arXiv:1512.02325, sections 2.2 and 3.6). Results are float32 and never clipped to [0, 255]. All
random numbers come from numpy's global state, as those of detectron2's augmentations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from instseg_ext.compat import opencv

if TYPE_CHECKING:
    from instseg_ext.data.augmentation import InstanceInput

__all__ = [
    "ExpandAndCrop",
    "PhotometricDistortion",
    "WindowTransform",
    "box_centres",
    "distort_colours",
    "draw_crop",
    "draw_expansion",
]

# The published crop draws one of six modes: keep the whole image, a free crop, or a crop with a
# least IoU of .1, .3, .7 or .9. Its IoU test rejects only windows whose IoU also exceeds an upper
# limit, which is infinite, so that the five crops are one and the same. Making the test work halved
# the authors' AP.
CROP_MODES = 6
CROP_TRIES = 50  # per mode drawn
CROP_SIDES = (0.3, 1.0)  # of the image's sides
CROP_RATIOS = (0.5, 2.0)  # height / width


class PhotometricDistortion(T.Augmentation):
    """Shift the brightness, then scale contrast and saturation and turn the hue.

    Each of the four happens with probability 1/2. The published augmentation also draws whether the
    contrast comes before or after saturation and hue; as it multiplies all channels alike, which
    changes neither of them, both orders give the same image and it is not drawn here.
    """

    def __init__(
        self,
        image_format: str,
        *,
        brightness: float = 32.0,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: float = 18.0,
    ):
        """Set up the limits.

        Args:
            image_format: ``RGB`` or ``BGR``.
            brightness: largest shift, in grey levels.
            contrast: lowest and highest factor.
            saturation: lowest and highest factor.
            hue: largest turn, in degrees.

        Raises:
            ValueError: if the format is another one.
        """
        super().__init__()
        if image_format not in ("RGB", "BGR"):
            raise ValueError(
                "INSTSEG.AUGMENTATIONS.SSD.PHOTOMETRIC needs INPUT.FORMAT RGB or BGR, not "
                f"{image_format!r}."
            )
        opencv()  # a missing library is reported at the start, not by a loading process
        self.image_format, self.brightness, self.contrast = image_format, brightness, contrast
        self.saturation, self.hue = saturation, hue

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the changes."""
        return T.ColorTransform(
            partial(
                distort_colours,
                image_format=self.image_format,
                brightness=_maybe(-self.brightness, self.brightness, otherwise=0.0),
                contrast=_maybe(*self.contrast, otherwise=1.0),
                saturation=_maybe(*self.saturation, otherwise=1.0),
                hue=_maybe(-self.hue, self.hue, otherwise=0.0),
            )
        )


class ExpandAndCrop(T.Augmentation):
    """Lay the image on a larger canvas, then cut a random window out of it.

    Both are drawn before pixels are touched, so that only the window is ever painted. Objects whose
    centre is not strictly inside the window are dropped, crowds as well.
    """

    def __init__(self, *, expand_ratio: float, fill: Sequence[float], crop: bool):
        """Set up the limits.

        Args:
            expand_ratio: the canvas has up to this many times the image's width and height; 1 = no
                canvas. A canvas that is not cropped needs its square times the image's memory.
            fill: value of the canvas for each channel.
            crop: False keeps the whole canvas.

        Raises:
            ValueError: if the ratio is below 1.
        """
        super().__init__()
        if expand_ratio < 1:
            raise ValueError(
                f"INSTSEG.AUGMENTATIONS.SSD.EXPAND_RATIO is 1.0 (off) or more, not {expand_ratio}."
            )
        self.expand_ratio, self.crop = expand_ratio, crop
        self.fill = tuple(float(value) for value in fill)

    def get_transform(self, image: np.ndarray, boxes: np.ndarray, crowd: np.ndarray) -> Transform:
        """Draw the window.

        Args:
            image: (H, W, C).
            boxes: (N, 4) XYXY.
            crowd: (N,) bool; a window that holds only centres of crowds is not taken.
        """
        height, width = image.shape[:2]
        left = top = 0
        if self.expand_ratio > 1 and np.random.randint(2):  # noqa: NPY002
            left, top, height, width = draw_expansion((height, width), self.expand_ratio)
        window = (0, 0, width, height)
        if self.crop:
            centres = box_centres(boxes[~crowd]) + np.array([left, top])
            window = draw_crop((height, width), centres) or window
        x0, y0, x1, y1 = window
        return WindowTransform(x0 - left, y0 - top, x1 - x0, y1 - y0, self.fill)

    def __call__(self, aug_input: InstanceInput) -> Transform:
        """Cut the window out of the input, and drop the objects outside."""
        transform = super().__call__(aug_input)
        height, width = aug_input.image.shape[:2]
        centres = box_centres(aug_input.boxes)
        aug_input.select(((centres > 0) & (centres < (width, height))).all(axis=1))
        return transform


class WindowTransform(Transform):
    """Cut out a window that may reach beyond the image; what lies outside is filled."""

    def __init__(self, x0: int, y0: int, width: int, height: int, fill: Sequence[float]):
        """Set up the window.

        Args:
            x0: its left column in the image, possibly negative.
            y0: its upper row, possibly negative.
            width: its columns.
            height: its rows.
            fill: value of the outside for each channel of an image; segmentations get 0.
        """
        super().__init__()
        self.x0, self.y0, self.width, self.height, self.fill = x0, y0, width, height, fill

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Cut an (H, W, C) image; the result is float32."""
        return self._cut(img, np.asarray(self.fill, dtype=np.float32))

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Cut an (H, W) or (H, W, C) label image; the type stays."""
        return self._cut(segmentation, segmentation.dtype.type(0))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Shift (N, 2) coordinates; a new array is returned."""
        return coords - (self.x0, self.y0)

    def _cut(self, pixels: np.ndarray, fill: np.ndarray) -> np.ndarray:
        rows = slice(max(self.y0, 0), max(self.y0 + self.height, 0))
        columns = slice(max(self.x0, 0), max(self.x0 + self.width, 0))
        part = pixels[rows, columns]
        if part.shape[:2] == (self.height, self.width):
            return part.astype(fill.dtype, copy=False)
        # Row by row: filling pixel by pixel takes eight times as long.
        row = np.broadcast_to(fill, (self.width, *pixels.shape[2:])).copy()
        canvas = np.empty((self.height, *row.shape), dtype=fill.dtype)
        canvas[:] = row
        y, x = rows.start - self.y0, columns.start - self.x0
        canvas[y : y + part.shape[0], x : x + part.shape[1]] = part
        return canvas


def distort_colours(
    image: np.ndarray,
    *,
    image_format: str,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> np.ndarray:
    """Change the colours of an image: ``(image + brightness) * contrast``, then the others.

    Args:
        image: (H, W, 3), 0 to 255, uint8 or float.
        image_format: ``RGB`` or ``BGR``.
        brightness: added to all channels.
        contrast: factor of all channels.
        saturation: factor of the saturation in HSV.
        hue: added to the hue in HSV, in degrees, -360 to 360.

    Returns:
        (H, W, 3) float32, a new array, not clipped.
    """
    cv2 = opencv()
    to_hsv, from_hsv = {
        "RGB": (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB),
        "BGR": (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR),
    }[image_format]
    changed = np.multiply(image, np.float32(contrast), dtype=np.float32)
    changed += np.float32(brightness * contrast)
    # The way to HSV and back is taken even when neither changes: it is no identity for negative
    # values, and the published augmentation takes it always.
    hsv = cv2.cvtColor(changed, to_hsv)
    if saturation != 1:
        hsv[..., 1] *= np.float32(saturation)
    if hue:
        degrees = hsv[..., 0]
        degrees += np.float32(hue)
        # OpenCV promises the right colour for 0 to 360 degrees only.
        if hue > 0:
            np.subtract(degrees, np.float32(360), out=degrees, where=degrees > 360)
        else:
            np.add(degrees, np.float32(360), out=degrees, where=degrees < 0)
    return cv2.cvtColor(hsv, from_hsv)


def draw_expansion(size_hw: tuple[int, int], max_ratio: float) -> tuple[int, int, int, int]:
    """Draw a canvas and the image's place on it.

    Args:
        size_hw: height and width of the image.
        max_ratio: the canvas has 1 to this many times these sides, the same for both.

    Returns:
        left and top of the image on the canvas, height and width of the canvas, in whole pixels.
    """
    height, width = size_hw
    ratio = np.random.uniform(1, max_ratio)  # noqa: NPY002
    left, top = np.random.uniform(0, (width * (ratio - 1), height * (ratio - 1)))  # noqa: NPY002
    return int(left), int(top), int(height * ratio), int(width * ratio)


def draw_crop(size_hw: tuple[int, int], centres: np.ndarray) -> tuple[int, int, int, int] | None:
    """Draw a window with at least one centre strictly inside, or none.

    With probability 1/6 the whole image is kept. Otherwise up to 50 windows are drawn, each side
    0.3 to 1 of the image's, height / width 0.5 to 2, anywhere in the image; the first that holds a
    centre is taken. If none does, all is drawn anew, so that without centres the image stays whole.

    Args:
        size_hw: height and width of the image.
        centres: (N, 2) x and y of the centres that count.

    Returns:
        XYXY in whole pixels, right and lower edge exclusive; None = the whole image.
    """
    height, width = size_hw
    while np.random.randint(CROP_MODES):  # noqa: NPY002
        # All tries at once, (tries, 2) as x and y: the first good one is what a loop would find.
        sides = np.random.uniform(*CROP_SIDES, (CROP_TRIES, 2)) * (width, height)  # noqa: NPY002
        corner = np.random.uniform(size=(CROP_TRIES, 2)) * ((width, height) - sides)  # noqa: NPY002
        low, high = corner.astype(np.int64), (corner + sides).astype(np.int64)
        ratios = sides[:, 1] / sides[:, 0]
        good = (ratios >= CROP_RATIOS[0]) & (ratios <= CROP_RATIOS[1])
        inside = (low[:, None] < centres) & (centres < high[:, None])
        good &= inside.all(axis=2).any(axis=1)
        if good.any():
            first = int(good.argmax())
            return (*low[first].tolist(), *high[first].tolist())
    return None


def box_centres(boxes: np.ndarray) -> np.ndarray:
    """Return the (N, 2) centres, x and y, of (N, 4) XYXY boxes."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _maybe(low: float, high: float, *, otherwise: float) -> float:
    """Draw between two limits with probability 1/2."""
    return np.random.uniform(low, high) if np.random.randint(2) else otherwise  # noqa: NPY002
