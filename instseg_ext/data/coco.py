"""Read COCO-format instance annotations into detectron2's list of dictionaries."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from instseg_ext.data.segmentation import clean_segmentation

__all__ = ["CocoFormatError", "load_coco", "paused_gc", "read_categories", "read_json"]

logger = logging.getLogger(__name__)


class CocoFormatError(ValueError):
    """An annotation file that is no COCO instance file; the message names file and remedy."""


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Hold off cyclic garbage collection: among millions of new lists it only costs time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_json(json_file: str | os.PathLike) -> dict:
    """Parse an annotation file and check its three lists.

    Raises:
        FileNotFoundError: if there is no such file.
        CocoFormatError: if it is no JSON object with ``images``, ``annotations`` and
            ``categories``.
    """
    path = Path(json_file)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no annotation file {path}; check the path you registered."
        )
    try:
        with paused_gc():
            content = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CocoFormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CocoFormatError(f"{path} holds a {type(content).__name__}, not a COCO dictionary.")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise CocoFormatError(
                f"{path} lacks the list {key!r} that every COCO instance file has."
            )
    return content


def read_categories(json_file: str | os.PathLike) -> list[dict]:
    """Return the categories of an annotation file, by ascending id.

    Only that list is parsed where it can be found, because large files take long to parse whole.

    Raises:
        FileNotFoundError: if there is no such file.
        CocoFormatError: if the file has no proper categories.
    """
    path = Path(json_file)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no annotation file {path}; check the path you registered."
        )
    text = path.read_text(encoding="utf-8")
    categories = _scan_categories(text)
    if categories is None:
        categories = read_json(path)["categories"]
    return _sorted_categories(categories, path)


def _scan_categories(text: str) -> list[dict] | None:
    """Parse the list after the only ``"categories"`` key of a file, None where that is unclear."""
    key = '"categories"'
    if text.count(key) != 1:
        return None
    rest = text.index(key) + len(key)
    start = text.find("[", rest)
    if start < 0 or text[rest:start].strip() != ":":
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError:
        return None
    well_formed = all(isinstance(c, dict) and "id" in c and "name" in c for c in value)
    return value if value and well_formed else None


def _sorted_categories(categories: list, path: Path) -> list[dict]:
    if not categories:
        raise CocoFormatError(
            f"{path} declares no categories; add at least one with an id and a name."
        )
    for category in categories:
        if not isinstance(category, dict) or "id" not in category or "name" not in category:
            raise CocoFormatError(f"{path}: category {category!r} lacks an id or a name.")
    repeated = [i for i, n in Counter(c["id"] for c in categories).items() if n > 1]
    if repeated:
        raise CocoFormatError(
            f"{path}: category id {repeated[0]} is used twice; give each its own."
        )
    return sorted(categories, key=lambda c: c["id"])


def load_coco(
    json_file: str | os.PathLike, image_root: str | os.PathLike
) -> tuple[list[dict], list[str], dict[int, int]]:
    """Read a COCO instance file.

    Polygons, compressed and uncompressed RLE may be mixed. Missing ``info``, ``iscrowd``, ``area``
    and annotation ids do no harm here. An annotation that cannot be trained on (no usable
    segmentation, no such image) is skipped, and the number of these is logged with the first
    example of each kind. Keypoints are moved from pixel indices to continuous pixels (+0.5), as
    detectron2's reader does.

    Args:
        json_file: the annotation file.
        image_root: folder that the ``file_name`` entries are relative to.

    Returns:
        detectron2 dictionaries by ascending image id; class names by ascending category id; and the
        map from category ids to contiguous class indices.

    Raises:
        FileNotFoundError: if the annotation file is missing.
        CocoFormatError: if an image or annotation lacks what cannot be guessed, an annotation has
            an undeclared category, or two images share an id.
    """
    with paused_gc():
        return _load_coco(Path(json_file), image_root)


def _load_coco(
    path: Path, image_root: str | os.PathLike
) -> tuple[list[dict], list[str], dict[int, int]]:
    content = read_json(path)
    categories = _sorted_categories(content["categories"], path)
    contiguous = {c["id"]: index for index, c in enumerate(categories)}
    num_keypoints = {c["id"]: len(c["keypoints"]) for c in categories if c.get("keypoints")}
    records = _image_records(content["images"], path, image_root)
    skipped = _Skipped()
    for annotation in content["annotations"]:
        _require(
            annotation,
            ("image_id", "category_id"),
            f"{path}: annotation {annotation.get('id', '?')}",
        )
        record = records.get(annotation["image_id"])
        if record is None:
            skipped.add("an unknown image", annotation)
            continue
        if annotation["category_id"] not in contiguous:
            raise CocoFormatError(
                f"{path}: annotation {annotation.get('id', '?')} of image {annotation['image_id']} "
                f"has category {annotation['category_id']}, which the file does not declare."
            )
        entry = _annotation_entry(annotation, record, contiguous, skipped)
        if entry is None:
            continue
        keypoints = _keypoints(annotation, num_keypoints, skipped)
        record["annotations"].append(entry | ({"keypoints": keypoints} if keypoints else {}))
    skipped.log(path)
    dicts = [records[key] for key in sorted(records)]
    return dicts, [str(c["name"]) for c in categories], contiguous


def _require(entry: dict, keys: tuple[str, ...], what: str) -> None:
    for key in keys:
        if key not in entry:
            raise CocoFormatError(
                f"{what} lacks {key!r}; `instseg check-dataset` lists every such entry."
            )


def _image_records(images: list[dict], path: Path, image_root: str | os.PathLike) -> dict:
    records: dict = {}
    for image in images:
        _require(
            image, ("id", "file_name", "height", "width"), f"{path}: image {image.get('id', '?')}"
        )
        if image["id"] in records:
            raise CocoFormatError(
                f"{path}: image id {image['id']} is used twice, by "
                f"{records[image['id']]['file_name']} and {image['file_name']}; ids must differ."
            )
        record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": int(image["height"]),
            "width": int(image["width"]),
            "image_id": image["id"],
            "annotations": [],
        }
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):  # kept for LVIS-style files
            if key in image:
                record[key] = image[key]
        records[image["id"]] = record
    return records


def _annotation_entry(
    annotation: dict, record: dict, contiguous: dict[int, int], skipped: _Skipped
) -> dict | None:
    size_hw = (record["height"], record["width"])
    segmentation, problems = clean_segmentation(annotation.get("segmentation"), size_hw)
    if segmentation is None:
        skipped.add(problems[0], annotation)
        return None
    if problems:
        skipped.add(f"{problems[0]} (other parts kept)", annotation)
    box = annotation.get("bbox")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not (box[2] > 0 and box[3] > 0):
        box = _box_of(segmentation, size_hw)
    entry = {
        "bbox": [float(v) for v in box],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": contiguous[annotation["category_id"]],
        "iscrowd": int(annotation.get("iscrowd", 0)),
        "segmentation": segmentation,
    }
    # Read by mappers that leave small objects out, as the area written in the file decides there.
    entry.update({key: annotation[key] for key in ("area", "ignore") if annotation.get(key)})
    return entry


def _keypoints(
    annotation: dict, num_keypoints: dict[int, int], skipped: _Skipped
) -> list[float] | None:
    """Return x, y, visibility of each point, None where no point is labelled."""
    flat = annotation.get("keypoints")
    if not flat or not any(flat[2::3]):
        return None
    if len(flat) != 3 * num_keypoints.get(annotation["category_id"], 0):
        skipped.add("keypoints that its category does not declare (mask kept)", annotation)
        return None
    return [float(v) + 0.5 * (index % 3 < 2) for index, v in enumerate(flat)]


def _box_of(segmentation: list | dict, size_hw: tuple[int, int]) -> list[float]:
    rle = segmentation
    if isinstance(segmentation, list):
        rle = mask_util.merge(mask_util.frPyObjects(segmentation, *size_hw))
    return [float(v) for v in mask_util.toBbox(rle)]


class _Skipped:
    """Counts of skipped annotations by reason, with the first example of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, annotation: dict) -> None:
        self.counts[reason] += 1
        example = f"annotation {annotation.get('id', '?')} of image {annotation['image_id']}"
        self.first.setdefault(reason, example)

    def log(self, path: Path) -> None:
        if not self.counts:
            return
        parts = [
            f"{n} with {reason} (first: {self.first[reason]})"
            for reason, n in self.counts.most_common(8)
        ]
        logger.warning(
            "%s: skipped %d unusable annotations or parts: %s. `instseg check-dataset` lists all.",
            path,
            sum(self.counts.values()),
            "; ".join(parts),
        )
