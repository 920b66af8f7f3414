"""Find what is wrong with a COCO-format data set before training does.

``cheap_check`` looks at the annotation file and at which images exist; ``check_dataset`` also opens
every image and draws every mask.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.data import MetadataCatalog
from pycocotools import mask as mask_util

from instseg_ext.data.check_keypoints import (
    category_keypoint_problems,
    keypoint_names,
    keypoint_problems,
)
from instseg_ext.data.coco import paused_gc, read_json
from instseg_ext.data.foreign import is_lvis, lvis_as_coco, lvis_problems
from instseg_ext.data.registration import dataset_files, ensure_files
from instseg_ext.data.segmentation import as_rle, clean_segmentation
from instseg_ext.data.validity import box_mask_problem, box_problem, image_problem

__all__ = ["Finding", "Report", "cheap_check", "check_dataset", "iter_lines"]

logger = logging.getLogger(__name__)

MAX_KEPT = 1000  # findings of one kind that are kept in full; all are counted

# Kinds that make training stop or learn something wrong; others are skipped or repaired by the
# loader.
_BLOCKS_TRAINING = frozenset(
    {"bad-entry", "bad-category", "missing-image", "unreadable-image", "size-mismatch"}
    | {"unknown-category", "duplicate-image-id", "missing-essential", "nothing-to-train"}
)
# COCO evaluation reads these of every annotation.
_BLOCKS_EVALUATION = _BLOCKS_TRAINING - {"nothing-to-train"} | {"missing-key", "duplicate-id"}


@dataclass(frozen=True)
class Finding:
    """One thing that was found: its kind, its severity, and where."""

    kind: str  # such as "missing-image"
    severity: str  # "error", "warning" or "note"
    message: str
    file: str  # the image file where there is one, else the annotation file
    image_id: object = None
    annotation_id: object = None

    def __str__(self) -> str:
        """Return the line that the command prints."""
        where = [self.file]
        if self.image_id is not None:
            where.append(f"image {self.image_id}")
        if self.annotation_id is not None:
            where.append(f"annotation {self.annotation_id}")
        return f"{self.severity}: {self.kind}: {', '.join(where)}: {self.message}"


@dataclass
class Report:
    """What a check found. ``findings`` keeps the first thousand of each kind, ``counts`` all."""

    json_file: str
    image_root: str
    num_images: int = 0
    num_annotations: int = 0
    num_classes: int = 0
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        kind: str,
        severity: str,
        message: str,
        *,
        file: str | None = None,
        image_id: object = None,
        annotation_id: object = None,
    ) -> None:
        """Count a finding and keep it unless there are very many of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_KEPT:
            file = file or self.json_file
            finding = Finding(kind, severity, message, file, image_id, annotation_id)
            self.findings.append(finding)

    def of(self, severity: str) -> list[Finding]:
        """Return the kept findings of one severity."""
        return [f for f in self.findings if f.severity == severity]

    @property
    def errors(self) -> list[Finding]:
        """Everything that makes the command exit with a status other than 0."""
        return self.of("error")

    def blocking(self, training: bool = True) -> list[Finding]:
        """Return what must be mended before training, or before evaluation."""
        kinds = _BLOCKS_TRAINING if training else _BLOCKS_EVALUATION
        return [f for f in self.findings if f.kind in kinds]

    def summary(self) -> str:
        """Return one line with the number of findings of each kind."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.counts.most_common()) or "nothing found"
        return (
            f"{self.json_file}: {self.num_images} images, {self.num_annotations} annotations, "
            f"{self.num_classes} classes: {kinds}"
        )


def check_dataset(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    decode: bool = True,
    lvis: bool | None = None,
) -> Report:
    """Check an annotation file and its images; nothing is changed.

    Args:
        json_file: COCO-format or LVIS-format annotations.
        image_root: folder that the ``file_name`` entries, or the ends of ``coco_url``, are
            relative to.
        decode: open every image and draw every mask; False only looks whether the images exist.
        lvis: whether the file is read as an LVIS file; None decides by its images.

    Returns:
        the findings.

    Raises:
        FileNotFoundError: if the annotation file is missing.
        CocoFormatError: if it is not a COCO dictionary at all.
    """
    with paused_gc():
        return _check(json_file, image_root, decode, lvis)


def cheap_check(name: str, *, training: bool = True) -> Report | None:
    """Check a registered data set before a run, without opening images or drawing masks.

    Errors that the loader gets by (it skips such annotations) and warnings go to the log.

    Args:
        name: a registered data set.
        training: False checks what evaluation needs.

    Returns:
        the findings; None for a data set that has no COCO-format files.

    Raises:
        ValueError: if the run would fail or learn something wrong; the message says where.
        FileNotFoundError: if the annotation file is missing.
        KeyError: if no data set has this name.
    """
    files = dataset_files(name)
    if files is None:
        return None
    ensure_files(name)
    lvis = MetadataCatalog.get(name).get("evaluator_type") == "lvis"
    report = check_dataset(*files, decode=False, lvis=lvis)
    remedy = f"instseg check-dataset {files[0]} {files[1]}"
    blocking = report.blocking(training)
    if blocking:
        kinds = Counter({k: report.counts[k] for k in {f.kind for f in blocking}})
        counted = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        raise ValueError(
            f"Data set {name!r} cannot be used ({counted}). First: {blocking[0]}. `{remedy}` lists "
            "everything, and with --fix OUT.json writes a mended copy."
        )
    if report.errors or report.of("warning"):
        logger.warning("%s; `%s` lists them", report.summary(), remedy)
    return report


def _check(
    json_file: str | os.PathLike, image_root: str | os.PathLike, decode: bool, lvis: bool | None
) -> Report:
    content = read_json(json_file)
    report = Report(str(json_file), str(image_root))
    if is_lvis(content) if lvis is None else lvis:
        for problem, image_id in lvis_problems(content):
            report.add("missing-key", "error", problem, image_id=image_id)
        content = lvis_as_coco(content)
    report.num_images, report.num_annotations = len(content["images"]), len(content["annotations"])
    for key in ("info", "licenses"):
        if key not in content:
            report.add("missing-section", "warning", f"the file has no {key!r} section")
    category_names = _check_categories(content["categories"], report)
    report.num_classes = len(category_names)
    for problem in category_keypoint_problems(content["categories"]):
        report.add(*problem)
    images = _check_images(content["images"], report)
    _check_files(images, Path(image_root), report, decode)
    usable = _check_annotations(content, images, category_names, report, decode)
    with_instances = {category_id for category_id, _ in usable}
    for category_id, name in category_names.items():
        if category_id not in with_instances:
            message = f"class {name!r} (id {category_id}) has no usable instance"
            report.add("class-without-instances", "warning", message)
    with_objects = {image_id for _, image_id in usable}
    for image_id, image in images.items():
        if image_id not in with_objects:
            report.add("image-without-objects", "note", "no object", **_image_at(image))
    if not usable:
        report.add("nothing-to-train", "error", "no annotation can be trained on")
    return report


def _check_annotations(
    content: dict,
    images: dict[object, dict],
    category_names: dict[object, str],
    report: Report,
    decode: bool,
) -> set[tuple[object, object]]:
    """Check all annotations; return category and image ids of those that can be trained on."""
    usable: set[tuple[object, object]] = set()
    seen: set[object] = set()
    keypoints = keypoint_names(content["categories"])
    for annotation in content["annotations"]:
        image = _check_references(annotation, images, category_names, seen, report)
        if image is None:
            continue
        size_hw = (image["height"], image["width"])
        names = keypoints.get(annotation["category_id"], [])
        for problem in keypoint_problems(annotation, names, size_hw):
            report.add(*problem, **_where(annotation))
        good = _check_geometry(annotation, size_hw, report, decode)
        if annotation.get("iscrowd", 0):
            report.add("crowd", "note", "crowd region", **_where(annotation))
        elif good:
            usable.add((annotation["category_id"], annotation["image_id"]))
    return usable


def _check_categories(categories: list, report: Report) -> dict[object, str]:
    names: dict[object, str] = {}
    for category in categories:
        if not isinstance(category, dict) or "id" not in category or "name" not in category:
            report.add("bad-category", "error", f"category {category!r} lacks an id or a name")
        elif category["id"] in names:
            report.add("bad-category", "error", f"category id {category['id']} is used twice")
        else:
            names[category["id"]] = str(category["name"])
    for name, count in Counter(names.values()).items():
        if count > 1:
            report.add("repeated-name", "warning", f"{count} categories are called {name!r}")
    return names


def _check_images(entries: list, report: Report) -> dict[object, dict]:
    images: dict[object, dict] = {}
    files: dict[object, object] = {}
    for image in entries:
        if not isinstance(image, dict):
            report.add("bad-entry", "error", f"an image entry is a {type(image).__name__}")
            continue
        missing = [k for k in ("id", "file_name", "height", "width") if k not in image]
        if missing:
            message = f"the image entry lacks {', '.join(missing)}"
            report.add("missing-essential", "error", message, **_image_at(image))
            continue
        if image["id"] in images:
            message = f"its id is also that of {images[image['id']]['file_name']}"
            report.add("duplicate-image-id", "error", message, **_image_at(image))
            continue
        if image["file_name"] in files:
            message = f"the same file is image {files[image['file_name']]}"
            report.add("repeated-file", "warning", message, **_image_at(image))
        images[image["id"]] = image
        files[image["file_name"]] = image["id"]
    return images


def _check_files(images: dict[object, dict], root: Path, report: Report, decode: bool) -> None:
    listings: dict[str, set[str]] = {}
    for image in images.values():
        path = os.path.join(root, image["file_name"])
        folder, name = os.path.split(path)
        if folder not in listings:
            # One listing per folder: much quicker than asking for each file on a network disk.
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder]:
            message = "no such file" + _hint(root, image["file_name"])
            report.add("missing-image", "error", message, file=path, image_id=image["id"])
        elif decode:
            problem = image_problem(path, (image["height"], image["width"]))
            if problem:
                report.add(*problem, file=path, image_id=image["id"])


def _hint(root: Path, file_name: str) -> str:
    if not root.is_dir():
        return f"; the image folder {root} does not exist"
    if (root / Path(file_name).name).is_file():
        return f"; the folder does hold {Path(file_name).name}, so file_name has a folder too many"
    return ""


def _check_references(
    annotation: object,
    images: dict[object, dict],
    categories: dict[object, str],
    seen: set[object],
    report: Report,
) -> dict | None:
    """Check the keys and ids of one annotation; return its image, None if it has no use at all."""
    if not isinstance(annotation, dict):
        report.add("bad-entry", "error", f"an annotation is a {type(annotation).__name__}")
        return None
    where = _where(annotation)
    missing = [k for k in ("image_id", "category_id") if k not in annotation]
    if missing:
        message = f"the annotation lacks {', '.join(missing)}"
        report.add("missing-essential", "error", message, **where)
        return None
    missing = [k for k in ("id", "area", "iscrowd", "bbox") if k not in annotation]
    if missing:
        report.add("missing-key", "error", f"lacks {', '.join(missing)}", **where)
    if "id" in annotation:
        if annotation["id"] in seen:
            report.add("duplicate-id", "error", "another annotation has the same id", **where)
        seen.add(annotation["id"])
    if annotation["category_id"] not in categories:
        message = f"category {annotation['category_id']} is not declared"
        report.add("unknown-category", "error", message, **where)
    image = images.get(annotation["image_id"])
    if image is None:
        report.add("unknown-image", "error", "no image has this id", **where)
    return image


def _check_geometry(
    annotation: dict, size_hw: tuple[int, int], report: Report, decode: bool
) -> bool:
    """Check box and segmentation of one annotation; return whether it can be trained on."""
    where = _where(annotation)
    box = annotation.get("bbox")
    bad_box = None if box is None else box_problem(box, size_hw)
    if bad_box:
        report.add(*bad_box, **where)
    segmentation, problems = clean_segmentation(annotation.get("segmentation"), size_hw)
    for problem in problems:
        kind = "bad-rle" if "RLE" in problem else "bad-polygon"
        kind = "no-segmentation" if problem == "no segmentation" else kind
        report.add(kind, "error", problem, **where)
    raw = annotation.get("segmentation")
    if segmentation is not None and isinstance(raw, dict) and isinstance(raw["counts"], list):
        report.add("uncompressed-rle", "note", "run lengths are a list of numbers", **where)
    if segmentation is None or not decode:
        return segmentation is not None
    rle = as_rle(segmentation, size_hw)
    if not int(mask_util.area(rle)):
        report.add("empty-mask", "error", "the mask has no pixel inside the image", **where)
        return False
    if box is not None and not bad_box:
        message = box_mask_problem(box, rle)
        if message:
            report.add("box-differs-from-mask", "warning", message, **where)
    return True


def _where(annotation: dict) -> dict:
    return {"image_id": annotation.get("image_id"), "annotation_id": annotation.get("id", "?")}


def _image_at(image: dict) -> dict:
    return {"file": image.get("file_name"), "image_id": image.get("id", "?")}


def iter_lines(report: Report, limit: int | None = 10) -> Iterator[str]:
    """Yield the lines of a report: errors first, ``limit`` of each kind at most."""
    rank = {"error": 0, "warning": 1, "note": 2}
    shown: Counter[str] = Counter()
    for finding in sorted(report.findings, key=lambda f: (rank[f.severity], f.kind)):
        shown[finding.kind] += 1
        most = limit if finding.severity != "note" or limit is None else min(limit, 3)
        if most is None or shown[finding.kind] <= most:
            yield str(finding)
        elif shown[finding.kind] == most + 1:
            more = report.counts[finding.kind] - most
            yield f"{finding.severity}: {finding.kind}: ... and {more} more"
    yield report.summary()
