"""Arrange pictures with captions on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instseg_ext import compat
from instseg_ext.visualization.draw import put_text, text_width

__all__ = ["contact_sheet", "side_by_side", "write_image"]

_PAPER = 250
_INK = (40, 40, 40)


def contact_sheet(
    cells: Sequence[tuple[np.ndarray, str]],
    *,
    columns: int = 2,
    cell_width: int = 480,
    title: str = "",
) -> np.ndarray:
    """Lay out captioned pictures row by row, each fitted into a cell of its row.

    Args:
        cells: (H, W, 3) uint8 BGR pictures of any sizes, with captions.
        columns: cells per row.
        cell_width: width of a cell in pixels.
        title: a line at the top.

    Returns:
        (H, W, 3) uint8 BGR.

    Raises:
        ValueError: if there are no cells.
    """
    if not cells:
        raise ValueError("A contact sheet needs at least one picture.")
    columns = min(columns, len(cells))
    gap, text = max(6, cell_width // 60), max(9, cell_width // 72)
    fitted = [(_fit(image, cell_width), caption) for image, caption in cells]
    rows = [fitted[start : start + columns] for start in range(0, len(fitted), columns)]
    width = columns * cell_width + (columns + 1) * gap
    strips = [_title(title, width, text, gap)] if title else []
    for row in rows:
        height = max(image.shape[0] for image, _ in row)
        strip = np.full((height + 2 * text + 2 * gap, width, 3), _PAPER, dtype=np.uint8)
        for index, (image, caption) in enumerate(row):
            left = gap + index * (cell_width + gap) + (cell_width - image.shape[1]) // 2
            strip[gap : gap + image.shape[0], left : left + image.shape[1]] = image
            _caption(
                strip, caption, gap + index * (cell_width + gap), cell_width, height, gap, text
            )
        strips.append(strip)
    return np.concatenate(strips)


def side_by_side(left: np.ndarray, right: np.ndarray, gap: int = 8) -> np.ndarray:
    """Put two pictures of the same height beside each other."""
    middle = np.full((left.shape[0], gap, 3), _PAPER, dtype=np.uint8)
    return np.concatenate([left, middle, right], axis=1)


def write_image(path: str, image: np.ndarray) -> None:
    """Write a picture.

    Raises:
        ValueError: if OpenCV has no encoder for the suffix, or the folder cannot be written.
    """
    cv2 = compat.opencv()
    try:
        written = cv2.imwrite(str(path), image)
    except cv2.error as error:
        raise ValueError(f"{path} cannot be written: {error}.") from error
    if not written:
        raise ValueError(f"{path} cannot be written: does its folder exist, and is it writable?")


def _fit(image: np.ndarray, width: int) -> np.ndarray:
    """Scale to ``width``, or to 0.8 times that in height where that is less."""
    cv2 = compat.opencv()
    factor = min(width / image.shape[1], width * 0.8 / image.shape[0])
    if factor == 1:
        return image
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    mode = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, size, interpolation=mode)


def _caption(
    strip: np.ndarray, caption: str, left: int, width: int, height: int, gap: int, text: int
) -> None:
    while len(caption) > 4 and text_width(caption, text) > width:
        caption = caption[:-4] + "..."
    put_text(strip, caption, (left, height + gap + text + gap // 2 + 2), text, _INK)


def _title(title: str, width: int, text: int, gap: int) -> np.ndarray:
    height = round(text * 1.3)
    height = max(
        6, min(height, int(height * (width - 2 * gap) / max(1, text_width(title, height))))
    )
    strip = np.full((2 * text + 2 * gap, width, 3), _PAPER, dtype=np.uint8)
    put_text(strip, title, (gap, strip.shape[0] - gap), height, _INK)
    return strip
