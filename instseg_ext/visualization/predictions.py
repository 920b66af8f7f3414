"""Ground truth beside prediction, worst images first.

The quality of an image is its panoptic quality over instances: detections and annotations of one
class are matched one to one where their masks overlap by more than half, and the sum of the matched
overlaps is divided by the mean number of detections and annotations. It is an F score whose hits
count by their overlap.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from instseg_ext.structures.rle import segmentation_rle
from instseg_ext.visualization.contact_sheet import contact_sheet, side_by_side, write_image
from instseg_ext.visualization.draw import DrawStyle, draw_instances

__all__ = ["ImageReport", "draw_reports", "image_quality", "match_instances", "rank_images"]

logger = logging.getLogger(__name__)

MATCH_IOU = 0.5


@dataclass(frozen=True)
class ImageReport:
    """What one image shows and how well it was predicted.

    Attributes:
        image: entry of the data set's ``images``.
        annotations: its annotations, masks as compressed RLE.
        detections: its detections above the threshold, highest score first.
        matches: per detection, the index of its annotation or ``None``.
        quality: 0 (all wrong) to 1; 1 where there is nothing to find and nothing was found.
        missed: annotations without a detection.
        spurious: detections without an annotation.
    """

    image: Mapping[str, Any]
    annotations: Sequence[Mapping[str, Any]]
    detections: Sequence[Mapping[str, Any]]
    matches: Sequence[int | None]
    quality: float
    missed: int
    spurious: int


def match_instances(
    annotations: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]]
) -> list[tuple[int | None, float]]:
    """Give each detection the annotation it stands for.

    Args:
        annotations: with ``category_id``, ``segmentation`` (compressed RLE) and ``iscrowd``.
        detections: with ``category_id`` and ``segmentation``; earlier ones choose first.

    Returns:
        Per detection, the index of its annotation and their overlap. ``None`` stands for no
        annotation, with an overlap above 0.5 where the detection lies in a crowd by so much.
    """
    matches: list[tuple[int | None, float]] = [(None, 0.0)] * len(detections)
    for category in {entry["category_id"] for entry in detections}:
        wanted = [i for i, a in enumerate(annotations) if a["category_id"] == category]
        found = [i for i, d in enumerate(detections) if d["category_id"] == category]
        crowd = np.array([bool(annotations[i].get("iscrowd", 0)) for i in wanted], dtype=bool)
        overlaps = _overlaps(
            [detections[i] for i in found], [annotations[i] for i in wanted], crowd
        )
        free = ~crowd
        for detection, row in zip(found, overlaps, strict=True):
            candidates = np.where(free, row, 0.0)
            best = int(candidates.argmax()) if len(candidates) else -1
            if best >= 0 and candidates[best] > MATCH_IOU:
                free[best] = False
                matches[detection] = wanted[best], float(candidates[best])
            else:
                matches[detection] = None, float(row[crowd].max(initial=0.0))
    return matches


def image_quality(
    annotations: Sequence[Mapping[str, Any]],
    matches: Sequence[tuple[int | None, float]],
) -> tuple[float, int, int]:
    """Judge the detections of one image.

    Crowd annotations are neither wanted nor held against a detection that lies in them by more
    than half.

    Args:
        annotations: see ``match_instances``.
        matches: what it returned.

    Returns:
        Quality in [0, 1], number of annotations missed, number of spurious detections.
    """
    hits = [overlap for index, overlap in matches if index is not None]
    spurious = sum(index is None and overlap <= MATCH_IOU for index, overlap in matches)
    missed = sum(not annotation.get("iscrowd", 0) for annotation in annotations) - len(hits)
    total = len(hits) + (missed + spurious) / 2
    return (sum(hits) / total if total else 1.0), missed, spurious


def _overlaps(
    found: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]], crowd: np.ndarray
) -> np.ndarray:
    if not found or not wanted:
        return np.zeros((len(found), len(wanted)))
    masks = [[_packed(entry["segmentation"]) for entry in side] for side in (found, wanted)]
    return np.asarray(coco_mask.iou(*masks, crowd.astype(np.uint8))).reshape(len(found), -1)


def _packed(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {"size": rle["size"], "counts": counts.encode() if isinstance(counts, str) else counts}


def rank_images(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    threshold: float = 0.5,
    order: str = "worst",
    only_with_results: bool = False,
) -> list[ImageReport]:
    """Judge every image of a data set and sort the images.

    Args:
        dataset: COCO data set with ``images`` and ``annotations``.
        results: detections in COCO's result format.
        threshold: detections with a lower score are left out.
        order: ``worst`` or ``best`` first, or ``dataset`` to keep the data set's order.
        only_with_results: leave out images without any result, for results of part of a data set.

    Returns:
        One report per image; ties keep the order of the data set.

    Raises:
        ValueError: if ``order`` is unknown, or results belong to images that the data set does not
            hold.
    """
    if order not in ("worst", "best", "dataset"):
        raise ValueError(f"Order {order!r} is unknown; known are worst, best and dataset.")
    by_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    strange = set(by_image) - {image["id"] for image in dataset["images"]}
    if strange:
        raise ValueError(
            f"The results mention image id {min(strange, key=str)}, which the data set lacks; "
            "they belong to another data set."
        )
    truth: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in dataset.get("annotations", []):
        truth[annotation["image_id"]].append(annotation)
    reports = [
        _report(image, truth[image["id"]], by_image[image["id"]], threshold)
        for image in dataset["images"]
        if not only_with_results or by_image[image["id"]]
    ]
    if order == "dataset":
        return reports
    return sorted(reports, key=lambda report: report.quality, reverse=order == "best")


def _report(
    image: Mapping[str, Any],
    truth: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    threshold: float,
) -> ImageReport:
    annotations = []
    for annotation in truth:
        rle = segmentation_rle(annotation.get("segmentation"), image["height"], image["width"])
        if rle is not None:
            annotations.append({**annotation, "segmentation": rle})
    kept = [r for r in results if r["score"] >= threshold and "segmentation" in r]
    kept.sort(key=lambda result: -result["score"])
    matches = match_instances(annotations, kept)
    quality = image_quality(annotations, matches)
    return ImageReport(image, annotations, kept, [index for index, _ in matches], *quality)


def draw_reports(
    reports: Sequence[ImageReport],
    categories: Sequence[Mapping[str, Any]],
    read_image: Callable[[Mapping[str, Any]], np.ndarray],
    output_dir: str | Path,
    *,
    count: int = 12,
    title: str = "",
    columns: int = 0,
) -> list[Path]:
    """Draw the first reports, ground truth left and prediction right, and a sheet of all.

    Args:
        reports: see ``rank_images``.
        categories: of the data set.
        read_image: gives the (H, W, 3) uint8 BGR picture of an ``images`` entry.
        output_dir: made if missing; files are named by rank.
        count: images at most.
        title: first line of the sheet.
        columns: pairs per row of the sheet; 0 takes 2 where there are more than 4 pairs.

    Returns:
        The files; the sheet is the last.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(categories, key=lambda category: category["id"])
    index = {category["id"]: position for position, category in enumerate(ordered)}
    names = [str(category.get("name", category["id"])) for category in ordered]
    files, cells = [], []
    for rank, report in enumerate(reports[:count], start=1):
        pair = _pair(read_image(report.image), report, index, names)
        stem = Path(str(report.image.get("file_name", report.image["id"]))).stem
        files.append(folder / f"{rank:03d}_{stem}.png")
        write_image(files[-1], pair)
        objects = _real(report.annotations)
        caption = (
            f"{stem}   quality {report.quality:.2f}   {objects} object{'s' * (objects != 1)}, "
            f"{report.missed} missed, {report.spurious} spurious"
        )
        cells.append((pair, caption))
    if cells:
        files.append(folder / "contact_sheet.png")
        heading = f"{title}   left: ground truth, right: prediction".strip()
        columns = columns or (1 if len(cells) <= 4 else 2)
        sheet = contact_sheet(cells, columns=columns, cell_width=800, title=heading)
        write_image(files[-1], sheet)
    return files


def _real(annotations: Sequence[Mapping[str, Any]]) -> int:
    return sum(not annotation.get("iscrowd", 0) for annotation in annotations)


def _pair(
    image: np.ndarray, report: ImageReport, index: Mapping[int, int], names: Sequence[str]
) -> np.ndarray:
    style = DrawStyle(min_side=400)
    # One class needs no name at every object.
    show = len(names) > 1
    wanted, found = report.annotations, report.detections
    left = draw_instances(
        image,
        [annotation["segmentation"] for annotation in wanted],
        classes=[index[a["category_id"]] for a in wanted] if show else None,
        names=names,
        ids=[-1 if a.get("iscrowd", 0) else i for i, a in enumerate(wanted)],
        style=style,
    )
    right = draw_instances(
        image,
        [detection["segmentation"] for detection in found],
        classes=[index[d["category_id"]] for d in found] if show else None,
        scores=[detection["score"] for detection in found],
        names=names,
        # A hit has the colour of its object.
        ids=[len(wanted) + i if m is None else m for i, m in enumerate(report.matches)],
        style=style,
    )
    return side_by_side(left, right)
