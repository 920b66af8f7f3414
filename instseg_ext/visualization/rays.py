"""Rays from a point and the polygon through their tips, on an enlarged part of a picture.

Points are (x, y) and number pixels, so (0, 0) is the centre of the first pixel. Pictures and
colours are BGR, uint8. Lines are anti-aliased and placed to a sixteenth of a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instseg_ext import compat
from instseg_ext.visualization.draw import put_text, text_width

__all__ = ["View", "close_up", "legend", "whole_picture"]

Colour = tuple[int, int, int]

# Bits behind the point of coordinates that OpenCV draws.
_SHIFT = 4
_SHADE = (30, 30, 30)
_PAPER, _INK = 250, (40, 40, 40)


@dataclass(frozen=True)
class View:
    """A part of a picture to draw on.

    Attributes:
        canvas: (h, w, 3) what is drawn on.
        origin_xy: pixel of the picture that is the upper left one of the part.
        factor_xy: enlargement along x and y.
    """

    canvas: np.ndarray
    origin_xy: tuple[float, float]
    factor_xy: tuple[float, float]

    def place(self, points: np.ndarray) -> np.ndarray:
        """Bring (..., 2) points of the picture to pixels of the canvas."""
        return (np.asarray(points) + 0.5 - self.origin_xy) * self.factor_xy - 0.5

    def outline(self, polygon: np.ndarray, colour: Colour, thickness: int = 2) -> None:
        """Draw the border of a (V, 2) polygon on a dark seam, to stand out from any ground."""
        path = [_fixed(self.place(polygon))]
        self._lines(path, True, _SHADE, thickness + 2)
        self._lines(path, True, colour, thickness)

    def rays(self, centre: np.ndarray, tips: np.ndarray, colour: Colour) -> None:
        """Draw lines from ``centre`` (2,) to each of the (R, 2) ``tips``, and dots on the tips."""
        places = _fixed(self.place(tips))
        start = _fixed(self.place(centre))
        self._lines([np.stack([start, place]) for place in places], False, colour, 1)
        for place in places:
            self._dot(place, 3, colour)

    def centre(self, point: np.ndarray, colour: Colour, radius: int = 4) -> None:
        """Mark a point (2,) with a dot that has a dark rim."""
        place = _fixed(self.place(point))
        self._dot(place, radius + 1.5, _SHADE)
        self._dot(place, radius, colour)

    def _lines(self, paths: list[np.ndarray], closed: bool, colour: Colour, thickness: int) -> None:
        cv2 = compat.opencv()
        cv2.polylines(self.canvas, paths, closed, colour, thickness, cv2.LINE_AA, _SHIFT)

    def _dot(self, place: np.ndarray, radius: float, colour: Colour) -> None:
        cv2 = compat.opencv()
        reach = round(radius * 2**_SHIFT)
        cv2.circle(self.canvas, place.tolist(), reach, colour, -1, cv2.LINE_AA, _SHIFT)


def close_up(picture: np.ndarray, points: np.ndarray, width: int, margin: float = 0.15) -> View:
    """Cut out a part around points, 5 wide and 4 high, and scale it.

    Args:
        picture: (H, W, 3); not modified. What lies outside it is the colour of paper.
        points: (n, 2), n >= 1, what has to be seen.
        width: of the canvas in pixels, a multiple of 5.
        margin: free space on each side, as a part of the extent of ``points``.

    Returns:
        The view, to draw on.
    """
    cv2 = compat.opencv()
    aspect = np.array([5, 4])
    low, high = points.min(axis=0), points.max(axis=0) + 1
    # Whole pixels and the same enlargement along both axes.
    unit = max(2, int(np.ceil(((high - low) / aspect).max() * (1 + 2 * margin))))
    columns, rows = (aspect * unit).tolist()
    left, top = np.floor((low + high - (columns, rows)) / 2).astype(int).tolist()
    height_in, width_in = picture.shape[:2]
    # The border is repeated beyond the picture and then painted over, so that the enlargement does
    # not mix it with paper.
    lines = np.arange(top, top + rows).clip(0, height_in - 1)
    part = picture[lines][:, np.arange(left, left + columns).clip(0, width_in - 1)]
    mode = cv2.INTER_AREA if width < columns else cv2.INTER_CUBIC
    canvas = cv2.resize(part, (width, width * 4 // 5), interpolation=mode)
    factor = width / columns
    x0, x1 = (max(0, round((x - left) * factor)) for x in (0, width_in))
    y0, y1 = (max(0, round((y - top) * factor)) for y in (0, height_in))
    canvas[:y0] = canvas[y1:] = canvas[:, :x0] = canvas[:, x1:] = _PAPER
    return View(canvas, (left, top), (factor, factor))


def whole_picture(picture: np.ndarray, frame_hw: tuple[int, int], min_side: int) -> View:
    """View all of a picture with points of another size of it.

    Args:
        picture: (H, W, 3); not modified.
        frame_hw: height and width of the picture at the size in which points are given.
        min_side: a picture with a shorter side below this is enlarged by a whole factor.

    Returns:
        The view, to draw on.
    """
    cv2 = compat.opencv()
    height, width = picture.shape[:2]
    factor = max(1, -(-min_side // max(1, min(height, width))))
    size = (width * factor, height * factor)
    canvas = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    return View(canvas, (0, 0), (size[0] / frame_hw[1], size[1] / frame_hw[0]))


def legend(entries: Sequence[tuple[Colour, str]], width: int, height: int = 12) -> np.ndarray:
    """Write what colours mean.

    Args:
        entries: colours and words.
        width: of the strip in pixels; entries that do not fit go to the next line.
        height: of capitals in pixels.

    Returns:
        (h, width, 3) uint8.
    """
    gap, line = height, 3 * height
    places, x, y = [], gap, 0
    for _, text in entries:
        needed = 3 * gap + text_width(text, height)
        if x > gap and x + needed > width:
            x, y = gap, y + line
        places.append((x, y))
        x += needed + gap
    strip = np.full((y + line, width, 3), _PAPER, dtype=np.uint8)
    for (colour, text), (x, y) in zip(entries, places, strict=True):
        box = strip[y + height : y + 2 * height, x : x + 2 * height]
        box[:] = _SHADE
        box[2:-2, 2:-2] = colour
        put_text(strip, text, (x + 2 * height + gap // 2, y + 2 * height), height, _INK)
    return strip


def _fixed(points: np.ndarray) -> np.ndarray:
    """Give OpenCV's fixed-point coordinates of (..., 2) points."""
    return np.rint(points * 2**_SHIFT).astype(np.int32)
