"""What kinds of wrong detections cost how much AP^r, as the code of SDS tells it.

A detection that is not right at IoU 0.5 is, the first that holds:

``localisation``: its IoU with an object of its class is above 0.1: badly outlined, or a double.
``similar``: its IoU with an object of a similar class is above 0.1. Classes are similar if the data
    set gives them the same ``supercategory``.
``other``: its IoU with an object of another class is above 0.1.
``background``: none of these.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from instseg_ext.evaluation.voc_ap import (
    all_point_ap,
    by_image,
    detected_region,
    image_regions,
    mask_overlaps,
    match_free,
    ranked_ap,
)

__all__ = ["GAINS", "error_gains"]

_KINDS = ("localisation", "similar", "other", "background")
# What ``error_gains`` gives for a class.
GAINS = ("localisation", "outlines", *_KINDS[1:])
_HIGH, _LOW = 0.5, 0.1


def error_gains(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    image_ids: Sequence[int] | None = None,
) -> dict[int, np.ndarray]:
    """Compute by how much AP^r at IoU 0.5 would rise without the errors of each kind.

    By the rule ``sds`` of ``region_average_precision``, whose arguments these are.

    Args:
        dataset: COCO ground truth, categories with ``supercategory`` if any are similar.
        results: detections.
        image_ids: judge these images only; ``None`` means all.

    Returns:
        By category id, the five gains of ``GAINS``, in [0, 1] but for ``outlines``: for that,
        badly outlined detections are not left out but count as right, and only doubles are left
        out. NaN without objects of the category.
    """
    chosen = None if image_ids is None else set(image_ids)
    truth, found = by_image(dataset["annotations"]), by_image(results)
    groups = {c["id"]: c.get("supercategory") or c["id"] for c in dataset["categories"]}
    objects: dict[int, int] = defaultdict(int)
    rows: dict[int, list[np.ndarray]] = defaultdict(list)
    for image in dataset["images"]:
        if chosen is not None and image["id"] not in chosen:
            continue
        annotated = {
            key: image_regions(image, entries)
            for key, entries in truth.get(image["id"], {}).items()
        }
        for key, (regions, _) in annotated.items():
            objects[key] += len(regions)
        for key, entries in found.get(image["id"], {}).items():
            if key in groups:
                rows[key].append(_judge(image, key, entries, annotated, groups))
    return {key: _gains(rows[key], objects[key]) for key in groups}


def _judge(
    image: Mapping[str, Any],
    category: int,
    detections: Sequence[Mapping[str, Any]],
    annotated: Mapping[int, tuple[list[dict], list[dict]]],
    groups: Mapping[int, Any],
) -> np.ndarray:
    """Describe the detections of one class in one image that do not fall to a crowd.

    Args:
        image: of the data set.
        category: of the detections.
        detections: N of them.
        annotated: masks of objects and of crowds, by category.
        groups: what similar categories have in common, by category.

    Returns:
        (M, 4): score; whether right at 0.5; whether right at 0.1; index of the kind it is of if it
        is wrong. By falling score.
    """
    scores = np.array([detection["score"] for detection in detections])
    order = np.argsort(-scores, kind="stable")
    masks = [detected_region(image, detections[index]) for index in order]
    own, crowds = annotated.get(category, ([], []))
    right = _match(mask_overlaps(masks, own, crowd=False), _HIGH)
    inside = mask_overlaps(masks, crowds, crowd=True).max(axis=1, initial=0.0)
    kept = np.flatnonzero(right | (inside <= _HIGH))
    masks = [masks[index] for index in kept]
    similar, other = [], []
    for key, (regions, _) in annotated.items():
        if key != category:
            (similar if groups.get(key) == groups[category] else other).extend(regions)
    near = [mask_overlaps(masks, regions, crowd=False) for regions in (own, similar, other)]
    touched = [overlaps.max(axis=1, initial=0.0) > _LOW for overlaps in near]
    kinds = np.argmax([*touched, np.ones(len(masks), dtype=bool)], axis=0)
    return np.stack([scores[order][kept], right[kept], _match(near[0], _LOW), kinds], axis=1)


def _match(overlaps: np.ndarray, threshold: float) -> np.ndarray:
    """Tell which of N detections are right at one threshold; see ``match_free``."""
    if not overlaps.shape[1]:
        return np.zeros(len(overlaps), dtype=bool)
    return match_free(overlaps, np.array([threshold]))[:, 0]


def _gains(rows: Sequence[np.ndarray], objects: int) -> np.ndarray:
    if objects == 0:
        return np.full(len(GAINS), math.nan)
    if not rows:
        return np.zeros(len(GAINS))
    table = np.concatenate(rows)
    _, right, nearly, kinds = table[np.argsort(-table[:, 0], kind="stable")].T
    right, nearly = right > 0, nearly > 0
    plain = ranked_ap(right, objects, all_point_ap)
    without = [
        ranked_ap(right[right | (kinds != kind)], objects, all_point_ap)
        for kind in range(len(_KINDS))
    ]
    # Doubles overlap an object of their class, and others took all of these.
    outlined = ranked_ap(nearly[nearly | (kinds != 0)], objects, all_point_ap)
    return np.array([without[0], outlined, *without[1:]]) - plain
