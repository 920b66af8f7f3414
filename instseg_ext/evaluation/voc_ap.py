"""Average precision of regions, AP^r, by the rules of PASCAL VOC and of SDS.

Unlike COCO's, it counts every detection, ranks them class by class over all images, and is reported
at single thresholds of mask IoU: 0.5, 0.7, and "vol", the mean over 0.1, 0.2 ... 0.9. Two rules are
in use, and their numbers must not be mixed:

``voc`` (the codes of MNC and FCIS): a detection belongs to the object it overlaps most. It is right
    if IoU >= t and no detection of a higher score took that object. AP is the mean over the
    recalls 0, 0.1 ... 1 of the highest precision at that recall or a higher one.
``sds`` (the code of "Simultaneous Detection and Segmentation", arXiv:1407.1808): a detection
    belongs to the object it overlaps most among those that are not taken yet. It is right if
    IoU > t. AP is the area under the precision envelope.

Shapes: N detections, G objects, T thresholds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from instseg_ext.structures.rle import segmentation_rle

__all__ = [
    "RULES",
    "THRESHOLDS",
    "all_point_ap",
    "by_image",
    "detected_region",
    "eleven_point_ap",
    "image_regions",
    "mask_overlaps",
    "match_best",
    "match_free",
    "ranked_ap",
    "region_average_precision",
]

THRESHOLDS = tuple(k / 10 for k in range(1, 10))


def all_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Integrate the precision envelope over recall.

    Args:
        recall: (N,) after each detection by falling score.
        precision: (N,) likewise.

    Returns:
        AP in [0, 1]; 0 for N = 0.
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def eleven_point_ap(recall: np.ndarray, precision: np.ndarray) -> float:
    """Average the highest precision at recalls of at least 0, 0.1 ... 1.

    The recalls are the multiples of the floating point number 0.1, as in the published codes: 3 of
    10 objects are less than the fourth, 0.30000000000000004.

    Args:
        recall: (N,) after each detection by falling score.
        precision: (N,) likewise.

    Returns:
        AP in [0, 1]; 0 for N = 0.
    """
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(envelope[np.searchsorted(recall, np.arange(11) * 0.1)].mean())


def match_best(overlaps: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Find the right detections of one class in one image by the rule ``voc``.

    Args:
        overlaps: (N, G) mask IoU, G > 0, detections by falling score.
        thresholds: (T,), above 0.

    Returns:
        (N, T) bool.
    """
    mine = overlaps.argmax(axis=1)[:, None] == np.arange(overlaps.shape[1])
    hits = mine[:, :, None] & (overlaps[:, :, None] >= thresholds)
    return (hits & (hits.cumsum(axis=0) == 1)).any(axis=1)


def match_free(overlaps: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Find the right detections of one class in one image by the rule ``sds``.

    Args:
        overlaps: (N, G) mask IoU, G > 0, detections by falling score.
        thresholds: (T,).

    Returns:
        (N, T) bool.
    """
    right = np.zeros((len(overlaps), len(thresholds)), dtype=bool)
    free = np.ones((len(thresholds), overlaps.shape[1]), dtype=bool)
    rows = np.arange(len(thresholds))
    # Who was matched before decides who is free, so this goes detection by detection.
    for index in np.flatnonzero((overlaps > thresholds.min()).any(axis=1)):
        candidates = np.where(free, overlaps[index], -1.0)
        best = candidates.argmax(axis=1)
        right[index] = candidates[rows, best] > thresholds
        free[rows, best] &= ~right[index]
    return right


def ranked_ap(
    right: np.ndarray, objects: int, average: Callable[[np.ndarray, np.ndarray], float]
) -> float:
    """Compute AP of detections.

    Args:
        right: (N,) bool by falling score.
        objects: how many there are to find, above 0.
        average: ``all_point_ap`` or ``eleven_point_ap``.

    Returns:
        AP in [0, 1].
    """
    hits = right.cumsum()
    return average(hits / objects, hits / np.arange(1, len(hits) + 1))


class Rule(NamedTuple):
    """What tells one rule from the other."""

    match: Callable[[np.ndarray, np.ndarray], np.ndarray]
    # Whether an overlap of exactly the threshold is enough.
    reached: Callable[[np.ndarray, np.ndarray], np.ndarray]
    average: Callable[[np.ndarray, np.ndarray], float]


RULES = {
    "voc": Rule(match_best, np.greater_equal, eleven_point_ap),
    "sds": Rule(match_free, np.greater, all_point_ap),
}


@dataclass
class _Class:
    """What is known of the detections of one class, by image."""

    objects: int = 0
    scores: list[np.ndarray] = field(default_factory=list)
    right: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    ignored: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))


def region_average_precision(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    image_ids: Sequence[int] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, dict[int, np.ndarray]]:
    """Compute AP^r of every category at every threshold by both rules.

    Detections of equal score rank by image, in the order of the data set, then as they come in
    ``results``. A region that the ground truth marks as a crowd is not an object to find; a
    detection that is not right does not count as wrong either where its share inside a crowd of
    its class reaches the threshold, as in COCO's evaluation.

    Args:
        dataset: COCO ground truth, see ``load_ground_truth``. Not modified.
        results: detections in COCO's result format with ``segmentation`` as compressed RLE. Not
            modified.
        image_ids: judge these images only; ``None`` means all.
        thresholds: T values of mask IoU above 0.

    Returns:
        ``{rule: {category id: (T,) AP in [0, 1]}}``; NaN where the judged images have no object of
        the category.

    Raises:
        ValueError: if a detection's mask is not of the size of its image, or it belongs to no image
            of the data set.
    """
    levels = np.asarray(thresholds, dtype=np.float64)
    chosen = None if image_ids is None else set(image_ids)
    images = [image for image in dataset["images"] if chosen is None or image["id"] in chosen]
    truth, found = by_image(dataset["annotations"]), by_image(results)
    unknown = found.keys() - {image["id"] for image in dataset["images"]}
    if unknown:
        raise ValueError(
            f"A detection has image id {min(unknown, key=str)!r}, which the ground truth does not "
            "contain; results and annotations belong to different data sets."
        )
    classes = {category["id"]: _Class() for category in dataset["categories"]}
    for image in images:
        _judge_image(image, truth.get(image["id"], {}), found.get(image["id"], {}), classes, levels)
    return {
        name: {key: _average(name, rule, record, levels) for key, record in classes.items()}
        for name, rule in RULES.items()
    }


def by_image(entries: Sequence[Mapping[str, Any]]) -> dict[int, dict[int, list[Mapping]]]:
    """Group annotations or results by image, then by category."""
    groups: dict[int, dict[int, list[Mapping]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        groups[entry["image_id"]][entry["category_id"]].append(entry)
    return groups


def _judge_image(
    image: Mapping[str, Any],
    truth: Mapping[int, list[Mapping]],
    found: Mapping[int, list[Mapping]],
    classes: Mapping[int, _Class],
    levels: np.ndarray,
) -> None:
    """Add the objects and the detections of one image to the records of their classes."""
    for category in classes.keys() & (truth.keys() | found.keys()):
        record = classes[category]
        objects, crowds = image_regions(image, truth.get(category, ()))
        record.objects += len(objects)
        detections = found.get(category)
        if not detections:
            continue
        scores = np.array([detection["score"] for detection in detections])
        order = np.argsort(-scores, kind="stable")
        masks = [detected_region(image, detections[index]) for index in order]
        overlaps = mask_overlaps(masks, objects, crowd=False)
        inside = mask_overlaps(masks, crowds, crowd=True).max(axis=1, initial=0.0)[:, None]
        record.scores.append(scores[order])
        for name, rule in RULES.items():
            right = np.zeros((len(masks), len(levels)), dtype=bool)
            if objects:
                right = rule.match(overlaps, levels)
            record.right[name].append(right)
            record.ignored[name].append(~right & rule.reached(inside, levels))


def image_regions(
    image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the masks of objects, and those of crowds; what has no outline is neither."""
    objects, crowds = [], []
    for annotation in annotations:
        rle = segmentation_rle(annotation.get("segmentation"), image["height"], image["width"])
        if rle is not None:
            (crowds if annotation.get("iscrowd") else objects).append(rle)
    return objects, crowds


def detected_region(image: Mapping[str, Any], detection: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mask of a detection.

    Raises:
        ValueError: if it is not of the size of the image.
    """
    rle = detection["segmentation"]
    if list(rle["size"]) != [image["height"], image["width"]]:
        raise ValueError(
            f"Image {image['id']}: a predicted mask is {rle['size'][1]} x {rle['size'][0]} pixels, "
            f"the image {image['width']} x {image['height']}; masks are compared at the size that "
            "the annotation file states."
        )
    return rle


def mask_overlaps(masks: list[dict], regions: list[dict], *, crowd: bool) -> np.ndarray:
    """Return (N, G) IoU, or with ``crowd`` the share of each mask that lies in the region."""
    if not regions or not masks:
        return np.zeros((len(masks), len(regions)))
    return np.asarray(coco_mask.iou(masks, regions, [int(crowd)] * len(regions)))


def _average(name: str, rule: Rule, record: _Class, levels: np.ndarray) -> np.ndarray:
    """Return (T,) AP of one class, NaN without objects."""
    if record.objects == 0:
        return np.full(len(levels), math.nan)
    if not record.scores:
        return np.zeros(len(levels))
    order = np.argsort(-np.concatenate(record.scores), kind="stable")
    right = np.concatenate(record.right[name])[order]
    counted = ~np.concatenate(record.ignored[name])[order]
    return np.array(
        [
            ranked_ap(right[counted[:, level], level], record.objects, rule.average)
            for level in range(len(levels))
        ]
    )
