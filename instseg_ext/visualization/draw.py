"""Draw instances over a picture with OpenCV, quickly enough for video.

Every mask is touched inside its box only. Shapes: N instances, (H, W) image; images are BGR, uint8.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instseg_ext import compat
from instseg_ext.structures.rle import decode_masks, rle_boxes

__all__ = ["DrawStyle", "class_label", "draw_instances", "enlarge", "instance_colour", "put_text"]

Masks = np.ndarray | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class DrawStyle:
    """How instances look.

    Attributes:
        opacity: of the fill, 0 to 1.
        labels: ``auto`` leaves out labels that would cover another one, ``all`` draws every one,
            ``none`` none.
        boxes: draw boxes too.
        min_side: pictures with a shorter side below this are enlarged by a whole factor first, in
            pixels.
        text_height: of capitals, in pixels of the result; 0 chooses by picture size.
    """

    opacity: float = 0.45
    labels: str = "auto"
    boxes: bool = False
    min_side: int = 0
    text_height: int = 0


def instance_colour(number: int) -> tuple[int, int, int]:
    """Give a bright BGR colour; equal numbers get equal ones, neighbours different ones.

    Negative numbers are grey: instances that do not count.
    """
    if number < 0:
        return 160, 160, 160
    hue = (0.58 + number * 0.618033988749895) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(
        hue, (0.85, 0.6, 1.0)[number % 3], (1.0, 1.0, 0.9)[number % 3]
    )
    return int(blue * 255), int(green * 255), int(red * 255)


def class_label(class_index: int | None, score: float | None, names: Sequence[str] = ()) -> str:
    """Compose a label: class name, or ``class 7`` where it has none, and score."""
    words = []
    if class_index is not None:
        words.append(names[class_index] if class_index < len(names) else f"class {class_index}")
    if score is not None:
        words.append(f"{score:.2f}")
    return " ".join(words)


def enlarge(image: np.ndarray, min_side: int) -> tuple[np.ndarray, int]:
    """Enlarge by the smallest whole factor that makes the shorter side at least ``min_side``."""
    factor = max(1, -(-min_side // max(1, min(image.shape[:2]))))
    if factor == 1:
        return image, 1
    cv2 = compat.opencv()
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), factor


def draw_instances(
    image_bgr: np.ndarray,
    masks: Masks | None = None,
    boxes: np.ndarray | None = None,
    classes: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
    names: Sequence[str] = (),
    *,
    ids: Sequence[int] | None = None,
    style: DrawStyle | None = None,
) -> np.ndarray:
    """Draw filled masks with outlines, boxes and labels.

    Args:
        image_bgr: (H, W, 3) uint8; not modified.
        masks: (N, H, W) bool or N COCO RLE dictionaries; ``None`` draws boxes instead.
        boxes: (N, 4) XYXY in image pixels; needed where there are no masks.
        classes: N class indices, or ``None`` for labels without a class.
        scores: N scores, or ``None`` for labels without a score.
        names: class names by index.
        ids: N numbers that choose the colours, for instance track ids; by position if ``None``,
            grey if negative.
        style: see ``DrawStyle``.

    Returns:
        (H, W, 3) uint8, enlarged by a whole factor where ``style.min_side`` asks for it.

    Raises:
        ValueError: if there are neither masks nor boxes, or their numbers or sizes disagree.
    """
    style = style or DrawStyle()
    count = _count(image_bgr, masks, boxes)
    canvas, factor = enlarge(image_bgr, style.min_side)
    canvas = canvas.copy() if canvas is image_bgr else canvas
    ids = range(count) if ids is None else ids
    colours = [instance_colour(int(number)) for number in ids]
    crops = [] if masks is None else _crops(masks, factor)
    extents = np.zeros((count, 4)) if masks is None else np.array([crop[0] for crop in crops])
    if boxes is not None:
        extents = np.asarray(boxes, dtype=np.float64).reshape(count, 4) * factor
    anchors = extents.copy()
    thickness = max(1, round(min(canvas.shape[:2]) / 500))
    area = (extents[:, 2:] - extents[:, :2]).prod(axis=1) if count else np.zeros(0)
    for index in np.argsort(-area, kind="stable"):  # small ones on top
        if masks is not None:
            _fill(canvas, *crops[index], colours[index], style.opacity)
    for index in range(count):
        if masks is not None:
            anchor = _outline(canvas, *crops[index], colours[index], thickness)
            anchors[index] = extents[index] if anchor is None or style.boxes else anchor
        if masks is None or style.boxes:
            _rectangle(canvas, extents[index], colours[index], thickness)
    if style.labels != "none" and (classes is not None or scores is not None):
        texts = [
            class_label(
                None if classes is None else int(classes[i]),
                None if scores is None else float(scores[i]),
                names,
            )
            for i in range(count)
        ]
        rank = (
            np.argsort(-np.asarray(scores), kind="stable")
            if scores is not None
            else np.argsort(-area)
        )
        _labels(canvas, anchors, texts, colours, rank, style)
    return canvas


def _count(image: np.ndarray, masks: Masks | None, boxes: np.ndarray | None) -> int:
    given = [len(entry) for entry in (masks, boxes) if entry is not None]
    if not given:
        raise ValueError("draw_instances needs masks or boxes.")
    if len(set(given)) > 1:
        raise ValueError(f"There are {given[0]} masks but {given[1]} boxes.")
    if masks is not None and given[0]:
        size = masks.shape[1:] if isinstance(masks, np.ndarray) else tuple(masks[0]["size"])
        if tuple(size) != image.shape[:2]:
            raise ValueError(
                f"Masks of size {tuple(size)} do not fit an image of size {image.shape[:2]}."
            )
    return given[0]


def _crops(masks: Masks, factor: int) -> list[tuple[tuple[int, int, int, int], np.ndarray]]:
    """Give ``(x0, y0, x1, y1)`` and the uint8 mask inside it per instance, when enlarged."""
    dense = isinstance(masks, np.ndarray)
    found = []
    extents = None if dense else rle_boxes(masks)
    for index in range(len(masks)):
        if dense:
            x0, y0, x1, y1 = _tight(masks[index])
            crop = masks[index][y0:y1, x0:x1]
        else:
            x0, y0, x1, y1 = extents[index]
            crop = decode_masks([masks[index]])[0][y0:y1, x0:x1]
        box = (x0 * factor, y0 * factor, x1 * factor, y1 * factor)
        found.append((box, _enlarge_mask(np.ascontiguousarray(crop, dtype=np.uint8), factor)))
    return found


def _tight(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return 0, 0, 0, 0
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return int(columns[0]), top, int(columns[-1]) + 1, bottom


def _enlarge_mask(crop: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge a (h, w) uint8 mask of 0 and 1 with smooth edges."""
    if factor == 1 or crop.size == 0:
        return crop
    cv2 = compat.opencv()
    padded = np.pad(crop * 255, 1)
    size = (padded.shape[1] * factor, padded.shape[0] * factor)
    smooth = cv2.resize(padded, size, interpolation=cv2.INTER_LINEAR)
    return (smooth[factor:-factor, factor:-factor] > 127).astype(np.uint8)


def _fill(
    canvas: np.ndarray,
    box: tuple[int, int, int, int],
    mask: np.ndarray,
    colour: tuple[int, int, int],
    opacity: float,
) -> None:
    if mask.size == 0:
        return
    cv2 = compat.opencv()
    x0, y0, x1, y1 = box
    region = canvas[y0:y1, x0:x1]
    tint = np.empty_like(region)
    tint[:] = colour
    cv2.copyTo(cv2.addWeighted(region, 1 - opacity, tint, opacity, 0), mask, region)


def _outline(
    canvas: np.ndarray,
    box: tuple[int, int, int, int],
    mask: np.ndarray,
    colour: tuple[int, int, int],
    thickness: int,
) -> np.ndarray | None:
    """Draw the border of a mask; returns the XYXY box of its largest part, for the label."""
    if mask.size == 0:
        return None
    cv2 = compat.opencv()
    offset = np.array(box[:2], dtype=np.int32)
    paths = [path + offset for path in compat.find_contours(mask, external=False)]
    cv2.polylines(canvas, paths, True, colour, thickness, cv2.LINE_AA)
    spans = np.array([[*path.min(axis=0), *(path.max(axis=0) + 1)] for path in paths])
    return spans[(spans[:, 2:] - spans[:, :2]).prod(axis=1).argmax()]


def _rectangle(
    canvas: np.ndarray, box: np.ndarray, colour: tuple[int, int, int], thickness: int
) -> None:
    cv2 = compat.opencv()
    x0, y0, x1, y1 = (round(float(side)) for side in box)
    cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), colour, thickness)


def put_text(
    canvas: np.ndarray,
    text: str,
    corner_xy: tuple[int, int],
    height: int,
    colour: tuple[int, int, int] = (255, 255, 255),
) -> None:
    """Write one line, capitals ``height`` pixels high, from its lower left corner on."""
    cv2 = compat.opencv()
    scale, thickness = _font(height)
    cv2.putText(
        canvas, text, corner_xy, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thickness, cv2.LINE_AA
    )


def _font(height: int) -> tuple[float, int]:
    """Give scale and thickness of the Hershey font (capitals of 21 pixels at scale 1)."""
    return height / 21.0, max(1, round(height / 12))


def text_width(text: str, height: int) -> int:
    """Give the width in pixels of a line that ``put_text`` writes."""
    cv2 = compat.opencv()
    scale, thickness = _font(height)
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)[0][0]


def _labels(
    canvas: np.ndarray,
    extents: np.ndarray,
    texts: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    rank: np.ndarray,
    style: DrawStyle,
) -> None:
    """Place the labels in order of ``rank``, each at the first free place near its instance."""
    height = style.text_height or int(np.clip(min(canvas.shape[:2]) / 45, 8, 22))
    pad = max(2, height // 3)
    placed: list[tuple[int, int, int, int]] = []
    for index in rank:
        width = text_width(texts[index], height) + 2 * pad
        places = _places(extents[index], width, height + 2 * pad, canvas.shape)
        free = [place for place in places if not any(_overlap(place, other) for other in placed)]
        if not free and style.labels == "auto":
            continue
        x0, y0, x1, y1 = (free or places)[0]
        placed.append((x0, y0, x1, y1))
        colour = colours[index]
        canvas[y0:y1, x0:x1] = colour
        dark = 0.114 * colour[0] + 0.587 * colour[1] + 0.299 * colour[2] < 128
        put_text(
            canvas, texts[index], (x0 + pad, y1 - pad), height, (255,) * 3 if dark else (0,) * 3
        )


def _places(
    box: np.ndarray, width: int, height: int, shape: tuple[int, ...]
) -> list[tuple[int, int, int, int]]:
    """Propose places for a label around and inside its box, moved into the picture."""
    x0, y0, x1, y1 = (int(side) for side in box)
    middle = (x0 + x1 - width) // 2, (y0 + y1 - height) // 2
    corners = [(x0, y0 - height), (x0, y0), (x0, y1), (x1 - width, y1), (x1 - width, y0)]
    if x1 - x0 > 1.3 * width and y1 - y0 > 3 * height:
        corners.insert(0, (x0, y0))
    corners.append(middle)
    places = []
    for left, top in corners:
        left = max(0, min(left, shape[1] - width))
        top = max(0, min(top, shape[0] - height))
        places.append((left, top, min(left + width, shape[1]), min(top + height, shape[0])))
    return places


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
