"""Average precision over COCO-format ground truth and results.

The matching and the accumulation are those of ``faster-coco-eval`` (compiled, the same numbers as
pycocotools) or, where that package is absent, of pycocotools itself. Metrics are read from the
accumulated precision array by one function for both, so that the two cannot drift apart in their
summaries.

Shapes: T IoU thresholds, R recall points, K categories, A area ranges, M detection limits.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from instseg_ext.structures.rle import segmentation_rle

__all__ = [
    "average_precision",
    "average_precision_backend",
    "category_names",
    "load_ground_truth",
    "normalise_ground_truth",
]

logger = logging.getLogger(__name__)

METRICS = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "boundary": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
}


# Tasks that compare masks.
MASK_TASKS = ("segm", "boundary", "map_r")


def average_precision_backend() -> str:
    """Name the package that computes: ``faster_coco_eval``, or without it ``pycocotools``."""
    try:
        importlib.import_module("faster_coco_eval")
    except ImportError:
        return "pycocotools"
    return "faster_coco_eval"


def load_ground_truth(path: str | Path) -> dict[str, Any]:
    """Read an annotation file and fill it as ``normalise_ground_truth`` does.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no JSON or has no ``images`` or ``categories``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Annotation file {path} does not exist; check the JSON path of the data set."
        )
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"Annotation file {path} is not valid JSON: {error}.") from error
    missing = [key for key in ("images", "categories") if key not in dataset]
    if missing:
        raise ValueError(
            f"Annotation file {path} has no {' and no '.join(missing)}; `instseg check-dataset` "
            "lists what is missing."
        )
    return normalise_ground_truth(dataset)


def normalise_ground_truth(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a COCO data set with what is often missing: ``info``, ``id``, ``iscrowd``, ``area``.

    A file without the key ``annotations`` (a test set whose ground truth is kept secret) stays
    without it.

    Args:
        dataset: parsed COCO JSON; not modified.

    Returns:
        A copy that pycocotools accepts. Annotation dictionaries are new, what they hold is shared.
    """
    result = dict(dataset)
    result.setdefault("info", {})
    if "annotations" not in dataset:
        return result
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in dataset["images"]}
    annotations = [dict(annotation) for annotation in dataset["annotations"]]
    ids = [annotation.get("id") for annotation in annotations]
    # pycocotools takes id 0 for "no match", so a file that uses it is numbered anew as well.
    renumber = not all(ids) or len(set(ids)) != len(ids)
    for index, annotation in enumerate(annotations, start=1):
        if renumber:
            annotation["id"] = index
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = _area(annotation, sizes.get(annotation["image_id"]))
    result["annotations"] = annotations
    return result


def _area(annotation: Mapping[str, Any], size_hw: tuple | None) -> float:
    if size_hw and None not in size_hw:
        rle = segmentation_rle(annotation.get("segmentation"), *size_hw)
        if rle is not None:
            return float(coco_mask.area(rle))
    _, _, width, height = annotation.get("bbox", (0, 0, 0, 0))
    return float(width * height)


def average_precision(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    iou_type: str,
    *,
    image_ids: Sequence[int] | None = None,
    backend: str | None = None,
    keypoint_sigmas: Sequence[float] = (),
    max_detections: int = 100,
) -> tuple[dict[str, float], dict[str, float]]:
    """Compute COCO's average precision.

    Args:
        dataset: what ``load_ground_truth`` gives, with ``annotations``. Not modified.
        results: detections in COCO's result format; ``category_id`` as in the data set. Not
            modified.
        iou_type: ``bbox``, ``segm``, ``keypoints`` or ``boundary``. The last one compares masks by
            the smaller one of mask IoU and boundary IoU (arXiv:2103.16562), the boundary
            being what is at most 2 % of the image's diagonal inside the mask; crowds are matched
            by their masks. Only faster-coco-eval has it.
        image_ids: evaluate these images only; ``None`` means all.
        backend: ``faster_coco_eval`` or ``pycocotools``; ``None`` takes the first that is
            installed.
        keypoint_sigmas: per-keypoint standard deviations; empty means COCO's person keypoints.
        max_detections: the highest-scoring detections per image and category that count (boxes and
            masks).

    Returns:
        Two dictionaries in percent: ``AP AP50 AP75 APs APm APl`` (keypoints without ``APs``), and
            AP by category
        name in order of category id. NaN means that there is no ground truth to measure against;
        ground truth without any detection gives 0.

    Raises:
        ValueError: if a detection belongs to no image of the data set, the backend does not know
            ``iou_type``, or there are not as many sigmas as keypoints.
    """
    known = {image["id"] for image in dataset["images"]}
    for result in results:
        if result["image_id"] not in known:
            raise ValueError(
                f"A detection has image id {result['image_id']!r}, which the ground truth does "
                "not contain; "
                "results and annotations belong to different data sets."
            )
    backend = backend or average_precision_backend()
    if iou_type == "boundary" and backend != "faster_coco_eval":
        raise ValueError(f"{backend} does not compute Boundary AP; install faster-coco-eval.")
    evaluation = _evaluation_class(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both packages report through print
        truth = _index(backend, dataset, _comparable(dataset["annotations"], iou_type))
        found = _index(backend, dataset, _detections(results, iou_type))
        run = evaluation(truth, found, iou_type)
        run.params.imgIds = sorted(known if image_ids is None else image_ids)
        run.params.catIds = sorted(category["id"] for category in dataset["categories"])
        if iou_type == "keypoints":
            if len(keypoint_sigmas):
                run.params.kpt_oks_sigmas = np.asarray(keypoint_sigmas)
            _check_sigmas(run.params.kpt_oks_sigmas, dataset["annotations"])
        else:
            run.params.maxDets = [1, 10, max_detections]
        run.evaluate()
        run.accumulate()
    precision = np.asarray(run.eval["precision"])
    names = category_names(dataset["categories"])
    per_class = {
        names[category_id]: _mean(precision[:, :, index, 0, -1])
        for index, category_id in enumerate(run.params.catIds)
    }
    return _summary(precision, iou_type), per_class


def _check_sigmas(sigmas: Sequence[float], annotations: Sequence[Mapping[str, Any]]) -> None:
    counts = {len(a["keypoints"]) // 3 for a in annotations if a.get("keypoints")}
    if counts - {len(sigmas)}:
        raise ValueError(
            f"Objects have {', '.join(map(str, sorted(counts)))} keypoints and there are "
            f"{len(sigmas)} standard deviations; set TEST.KEYPOINT_OKS_SIGMAS, a number for each "
            "keypoint."
        )


def category_names(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Name each category by its id; a name that several share gets the id behind it."""
    names = {category["id"]: str(category.get("name", category["id"])) for category in categories}
    count = Counter(names.values())
    return {i: name if count[name] == 1 else f"{name} ({i})" for i, name in names.items()}


def _comparable(annotations: Sequence[Mapping[str, Any]], iou_type: str) -> list[dict[str, Any]]:
    """Copy the annotations that can be compared; those without an outline are left out."""
    copies = [dict(annotation) for annotation in annotations]
    if iou_type == "keypoints":
        return _with_keypoint_counts(copies)
    if iou_type not in MASK_TASKS:
        return copies
    for annotation in copies:
        if isinstance(annotation.get("segmentation"), list):
            annotation["segmentation"] = [p for p in annotation["segmentation"] if len(p) >= 6]
    usable = [annotation for annotation in copies if annotation.get("segmentation")]
    if len(usable) < len(copies):
        logger.warning(
            "%d annotations without a usable mask are left out of mask AP.",
            len(copies) - len(usable),
        )
    return usable


def _with_keypoint_counts(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep annotations with keypoints; fill in how many of these are labelled where it is missing.

    pycocotools cannot do without ``num_keypoints``; faster-coco-eval takes a missing one for 0,
    which leaves the object out.
    """
    kept = [annotation for annotation in annotations if annotation.get("keypoints")]
    for annotation in kept:
        if annotation.get("num_keypoints") is None:
            visibility = annotation["keypoints"][2::3]
            annotation["num_keypoints"] = sum(value > 0 for value in visibility)
    return kept


def _evaluation_class(backend: str) -> type:
    if backend == "faster_coco_eval":
        return importlib.import_module("faster_coco_eval").COCOeval_faster
    return importlib.import_module("pycocotools.cocoeval").COCOeval


def _index(backend: str, dataset: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
    """Build the package's own data set object without touching the disk."""
    module = "faster_coco_eval" if backend == "faster_coco_eval" else "pycocotools.coco"
    api = importlib.import_module(module).COCO()
    api.dataset = {
        "info": {},
        "images": list(dataset["images"]),
        "categories": copy.deepcopy(list(dataset["categories"])),
        "annotations": annotations,
    }
    api.createIndex()
    return api


def _detections(results: Sequence[Mapping[str, Any]], iou_type: str) -> list[dict[str, Any]]:
    """Give results the keys of annotations; the area is that of the thing that is compared."""
    annotations = []
    for index, result in enumerate(results, start=1):
        annotation = {key: result[key] for key in ("image_id", "category_id", "score")}
        annotation |= {"id": index, "iscrowd": 0}
        if iou_type in MASK_TASKS:
            annotation["segmentation"] = result["segmentation"]
            annotation["area"] = float(coco_mask.area(_as_bytes(result["segmentation"])))
            annotation["bbox"] = list(
                result.get("bbox") or coco_mask.toBbox(_as_bytes(result["segmentation"]))
            )
        elif iou_type == "bbox":
            annotation["bbox"] = list(result["bbox"])
            annotation["area"] = float(result["bbox"][2] * result["bbox"][3])
        else:
            annotation |= _keypoint_extent(result["keypoints"])
        annotations.append(annotation)
    return annotations


def _as_bytes(rle: Mapping[str, Any]) -> Mapping[str, Any]:
    counts = rle["counts"]
    return (
        {"size": rle["size"], "counts": counts.encode("ascii")} if isinstance(counts, str) else rle
    )


def _keypoint_extent(keypoints: Sequence[float]) -> dict[str, Any]:
    x, y = np.asarray(keypoints[0::3]), np.asarray(keypoints[1::3])
    width, height = float(np.ptp(x)), float(np.ptp(y))
    return {
        "keypoints": list(keypoints),
        "bbox": [float(x.min()), float(y.min()), width, height],
        "area": width * height,
    }


def _mean(precision: np.ndarray) -> float:
    """Average in percent over the entries that exist (COCO marks the others by -1)."""
    valid = precision[precision > -1]
    return float(valid.mean() * 100) if valid.size else math.nan


def _summary(precision: np.ndarray, iou_type: str) -> dict[str, float]:
    """Read the metrics from a (T, R, K, A, M) precision array; T = 0.50, 0.55 ... 0.95."""
    everything = precision[:, :, :, 0, -1]
    values = [_mean(everything), _mean(everything[0]), _mean(everything[5])]
    values += [_mean(precision[:, :, :, area, -1]) for area in range(1, precision.shape[3])]
    return dict(zip(METRICS[iou_type], values, strict=True))
