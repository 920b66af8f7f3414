"""What can be wrong with one image file or one box; shared by the check and the repair."""

from __future__ import annotations

import math

import numpy as np
from detectron2.data import detection_utils
from pycocotools import mask as mask_util

__all__ = ["BOX_TOLERANCE", "box_mask_problem", "box_problem", "image_problem"]

# Pixels by which a box may leave the image, or differ from the box of its mask.
BOX_TOLERANCE = 2.0


def image_problem(path: str, size_hw: tuple[int, int]) -> tuple[str, str, str] | None:
    """Open an image; return kind, severity and message of what is wrong with it, or None."""
    try:
        height, width = detection_utils.read_image(path, format="RGB").shape[:2]
    except (OSError, SyntaxError, ValueError) as error:
        return "unreadable-image", "error", f"cannot be read: {error}"
    if (height, width) != tuple(size_hw):
        message = f"is {width} x {height} pixels, annotated as {size_hw[1]} x {size_hw[0]}"
        return "size-mismatch", "error", message
    return None


def box_problem(box: object, size_hw: tuple[int, int]) -> tuple[str, str, str] | None:
    """Return kind, severity and message of what is wrong with an XYWH box, or None."""
    try:
        x, y, w, h = box
        finite = math.isfinite(x + y + w + h)
    except (TypeError, ValueError):
        return "bad-box", "error", f"bbox {box!r} is not [x, y, width, height]"
    if not finite or w <= 0 or h <= 0:
        return "bad-box", "error", f"bbox {list(box)} has no positive finite size"
    height, width = size_hw
    outside = max(-x, -y, x + w - width, y + h - height)
    if outside > BOX_TOLERANCE:
        message = f"bbox {list(box)} leaves the {width} x {height} image by {outside:.0f} pixels"
        return "box-outside-image", "error", message
    return None


def box_mask_problem(box: list[float], rle: dict) -> str | None:
    """Compare an XYWH box with the box of a mask; None if all sides agree within tolerance."""
    tight = np.asarray(mask_util.toBbox(rle), dtype=np.float64)
    given = np.asarray(box, dtype=np.float64)
    # (x, y, w, h) -> (x0, y0, x1, y1)
    to_corners = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    difference = np.abs((given - tight) @ to_corners)
    if difference.max() <= max(BOX_TOLERANCE, 0.05 * float(tight[2:].max())):
        return None
    return f"bbox {list(box)} is not the box of the mask, {tight.tolist()}"
