"""Write a copy of a COCO-format annotation file that trains and evaluates."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

from detectron2.data import detection_utils
from pycocotools import mask as mask_util

from instseg_ext.data.check_keypoints import keypoint_names, keypoint_problems
from instseg_ext.data.coco import CocoFormatError, read_json
from instseg_ext.data.foreign import is_lvis
from instseg_ext.data.segmentation import as_rle, clean_segmentation
from instseg_ext.data.validity import box_mask_problem, box_problem

__all__ = ["repair", "write_repaired"]


def write_repaired(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    out_file: str | os.PathLike,
    *,
    force: bool = False,
) -> Counter[str]:
    """Repair an annotation file into a new one; the old one stays as it is.

    Args:
        json_file: COCO-format annotations.
        image_root: folder of the images.
        out_file: file to write.
        force: overwrite an existing ``out_file``.

    Returns:
        how often what was changed.

    Raises:
        FileExistsError: if ``out_file`` exists and ``force`` is not given.
        ValueError: if it is the input file itself, the input is an LVIS file, or nothing usable
            would remain.
    """
    out = Path(out_file)
    if out.exists() and out.samefile(json_file):
        raise ValueError(f"--fix {out} is the annotation file itself; name a new file.")
    if out.exists() and not force:
        raise FileExistsError(f"--fix {out} exists already; name another file or add --force.")
    content = read_json(json_file)
    if is_lvis(content):
        raise ValueError(f"{json_file} is an LVIS file; --fix mends COCO files.")
    content, changes = repair(content, image_root)
    if not content["annotations"]:
        raise CocoFormatError(
            f"{json_file}: no annotation is usable, so there is nothing to write."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(content, stream)
    os.chmod(scratch, 0o644)
    os.replace(scratch, out)
    return changes


def repair(content: dict, image_root: str | os.PathLike) -> tuple[dict, Counter[str]]:
    """Repair what can be repaired, drop what cannot; sound entries stay as they are.

    Dropped: images that are missing, unreadable or share an id with an earlier one, their
    annotations, annotations of unknown images or categories, without a usable mask. Corrected:
    image sizes, missing keys, boxes that are wrong or missing, annotation ids used twice, bad
    polygon parts, the number of labelled keypoints. Keypoints that make no sense are taken away
    from their annotation.

    Args:
        content: the parsed file; not modified.
        image_root: folder of the images.

    Returns:
        the repaired file and how often what was changed.
    """
    changes: Counter[str] = Counter()
    fixed = dict(content)
    for key, default in (("info", {"description": ""}), ("licenses", [])):
        if key not in fixed:
            fixed[key] = default
            changes[f"section {key} added"] += 1
    fixed["categories"] = _categories(content["categories"], changes)
    fixed["images"] = _images(content["images"], Path(image_root), changes)
    images = {image["id"]: image for image in fixed["images"]}
    named = keypoint_names(fixed["categories"])
    keypoints = {c["id"]: named.get(c["id"], []) for c in fixed["categories"]}
    annotations = []
    for annotation in content["annotations"]:
        entry = _annotation(annotation, images, keypoints, changes)
        if entry is not None:
            annotations.append(entry)
    _number(annotations, changes)
    fixed["annotations"] = annotations
    return fixed, changes


def _categories(categories: list, changes: Counter[str]) -> list[dict]:
    kept: dict[object, dict] = {}
    for category in categories:
        if not isinstance(category, dict) or "id" not in category or category["id"] in kept:
            changes["category dropped"] += 1
            continue
        if "name" not in category:
            category = {**category, "name": f"class {category['id']}"}
            changes["category name added"] += 1
        kept[category["id"]] = category
    return list(kept.values())


def _images(images: list, root: Path, changes: Counter[str]) -> list[dict]:
    kept: dict[object, dict] = {}
    for image in images:
        if not isinstance(image, dict) or "id" not in image or "file_name" not in image:
            changes["image without id or file name dropped"] += 1
            continue
        if image["id"] in kept:
            changes["image with a repeated id dropped"] += 1
            continue
        try:
            path = os.path.join(root, image["file_name"])
            height, width = detection_utils.read_image(path, format="RGB").shape[:2]
        except (OSError, SyntaxError, ValueError):
            changes["missing or unreadable image dropped"] += 1
            continue
        if (image.get("height"), image.get("width")) != (height, width):
            image = {**image, "height": height, "width": width}
            changes["image size corrected"] += 1
        kept[image["id"]] = image
    return list(kept.values())


def _annotation(
    annotation: object, images: dict, keypoints: dict[object, list[str]], changes: Counter[str]
) -> dict | None:
    if not isinstance(annotation, dict) or annotation.get("category_id") not in keypoints:
        changes["annotation of an unknown category dropped"] += 1
        return None
    image = images.get(annotation.get("image_id"))
    if image is None:
        changes["annotation of an unknown or dropped image dropped"] += 1
        return None
    size_hw = (image["height"], image["width"])
    segmentation, problems = clean_segmentation(annotation.get("segmentation"), size_hw)
    rle = None if segmentation is None else as_rle(segmentation, size_hw)
    if rle is None or not int(mask_util.area(rle)):
        changes["annotation without a usable mask dropped"] += 1
        return None
    entry = dict(annotation)
    if problems:
        entry["segmentation"] = segmentation
        changes["bad polygon part dropped"] += 1
    elif isinstance(entry["segmentation"], list) and entry["segmentation"] != segmentation:
        entry["segmentation"] = segmentation
        changes["flat polygon wrapped in a list"] += 1
    box = entry.get("bbox")
    if box is None or box_problem(box, size_hw) or box_mask_problem(box, rle):
        entry["bbox"] = [float(v) for v in mask_util.toBbox(rle)]
        changes["box taken from the mask"] += 1
    if "area" not in entry:
        entry["area"] = float(mask_util.area(rle))
        changes["area added"] += 1
    if "iscrowd" not in entry:
        entry["iscrowd"] = 0
        changes["iscrowd added"] += 1
    return _keypoints(entry, keypoints[annotation["category_id"]], size_hw, changes)


def _keypoints(
    entry: dict, names: list[str], size_hw: tuple[int, int], changes: Counter[str]
) -> dict:
    kinds = {kind for kind, _, _ in keypoint_problems(entry, names, size_hw)}
    if kinds & {"bad-keypoints", "bad-visibility"}:
        changes["keypoints that make no sense dropped"] += 1
        return {k: v for k, v in entry.items() if k not in ("keypoints", "num_keypoints")}
    if "wrong-num-keypoints" in kinds:
        entry["num_keypoints"] = sum(v > 0 for v in entry["keypoints"][2::3])
        changes["number of keypoints corrected"] += 1
    return entry


def _number(annotations: list[dict], changes: Counter[str]) -> None:
    """Give an id to each annotation that has none or one that was used before."""
    numbers = [a["id"] for a in annotations if isinstance(a.get("id"), int)]
    free = max(numbers, default=0) + 1
    seen: set[object] = set()
    for annotation in annotations:
        if annotation.get("id") is None or annotation["id"] in seen:
            annotation["id"] = free
            free += 1
            changes["annotation id assigned"] += 1
        seen.add(annotation["id"])
