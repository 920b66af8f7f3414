"""COCO-style evaluation of boxes, masks and keypoints as a detectron2 ``DatasetEvaluator``."""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from pycocotools import mask as coco_mask

from instseg_ext import data
from instseg_ext.evaluation.coco_ap import (
    MASK_TASKS,
    METRICS,
    average_precision,
    average_precision_backend,
    load_ground_truth,
    normalise_ground_truth,
)
from instseg_ext.evaluation.report import write_json
from instseg_ext.structures.rle import encode_masks

__all__ = [
    "InstSegCOCOEvaluator",
    "dataset_ground_truth",
    "instances_to_results",
    "ranked_for",
]

logger = logging.getLogger(__name__)

RESULTS_FILE = "coco_instances_results.json"
# Image names in a warning; more would bury the message.
_NAMED = 5


class InstSegCOCOEvaluator(DatasetEvaluator):
    """Collect detections of all processes and compute COCO's average precision on the main one.

    Masks may come as ``pred_masks`` (bool, (N, H, W), original image size) or as ``pred_masks_rle``
    (COCO run-length dictionaries), which keeps memory independent of the image size. Numbers do not
    depend on the number of processes: detections are put back into the order of the data set, so
    that equal scores rank equally.
    """

    # Read by the inference loop, which then asks the model for run-length encoded masks.
    accepts_rle = True

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path | None = None,
        *,
        segm_score_field: str | None = None,
        seen_images_only: bool = False,
        keypoint_sigmas: Sequence[float] = (),
        max_detections: int = 100,
        boundary: bool = False,
    ) -> None:
        """Load the ground truth of ``dataset_name``.

        Args:
            dataset_name: registered data set with a COCO file (metadata ``json_file``) or
                detectron2's own dictionaries.
            output_dir: where ``coco_instances_results.json`` goes; ``None`` writes nothing.
            segm_score_field: field of the ``Instances`` that ranks masks; boxes keep ``scores``.
            seen_images_only: judge only the images that ``process`` met, for a run on part of a
                data set.
            keypoint_sigmas: see ``average_precision``.
            max_detections: detections per image and category that count; COCO's own limit is 100.
            boundary: masks are judged by Boundary AP, too.

        Raises:
            FileNotFoundError: if the annotation file is missing.
            ImportError: if ``boundary`` is asked for without faster-coco-eval.
        """
        if boundary and average_precision_backend() != "faster_coco_eval":
            raise ImportError(
                "INSTSEG.BOUNDARY_AP needs the package faster-coco-eval: pip install "
                "faster-coco-eval, or turn the key off."
            )
        self._metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._segm_score_field = segm_score_field
        self._seen_images_only = seen_images_only
        self._keypoint_sigmas = keypoint_sigmas
        self._max_detections = max_detections
        self._boundary = boundary
        self._dataset = dataset_ground_truth(dataset_name)
        self._category_ids = _category_ids(self._metadata, self._dataset)
        self._records: list[dict[str, Any]] = []

    def reset(self) -> None:
        """Forget the detections of an earlier run."""
        self._records = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keep the detections of a batch.

        Args:
            inputs: dictionaries with ``image_id``.
            outputs: dictionaries with ``instances``; read, not modified.

        Raises:
            ValueError: if a predicted class does not exist in the data set.
        """
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            results = instances_to_results(
                instances, image["image_id"], self._category_ids, self._segm_score_field
            )
            tasks = {"bbox"}
            if instances.has("pred_masks") or instances.has("pred_masks_rle"):
                tasks.add("segm")
            if instances.has("pred_keypoints"):
                tasks.add("keypoints")
            self._records.append(
                {"image_id": image["image_id"], "tasks": sorted(tasks), "results": results}
            )

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Gather, write the result file and compute the metrics.

        Returns:
            ``{"bbox": {"AP": ..., "AP50": ..., ..., "AP-<class>": ...}, "segm": {...}}`` in percent
            on the main process, empty on the others and for data without annotations; ``boundary``
            beside ``segm`` where asked for. NaN stands for "no such ground truth".
        """
        comm.synchronize()
        gathered = comm.gather(self._records, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        records = self._ordered(itertools.chain.from_iterable(gathered))
        results = [result for record in records for result in record["results"]]
        if self._output_dir is not None:
            write_json(self._output_dir / RESULTS_FILE, results)
        if "annotations" not in self._dataset:
            logger.warning(
                "%s has no annotations: detections were written, nothing is measured.",
                self._dataset_name,
            )
            return OrderedDict()
        seen = [record["image_id"] for record in records] if self._seen_images_only else None
        return self._measure(results, self._tasks(records), seen)

    def _measure(
        self, results: Sequence[Mapping[str, Any]], tasks: Sequence[str], seen: list[int] | None
    ) -> OrderedDict[str, dict[str, float]]:
        """Compute the metrics of every task, on the images ``seen`` unless it is ``None``."""
        backend = average_precision_backend()
        if backend == "pycocotools":
            logger.info(
                "faster-coco-eval is not installed; pycocotools computes AP (same numbers, slower)."
            )
        scores: OrderedDict[str, dict[str, float]] = OrderedDict()
        for task in tasks:
            summary, per_class = average_precision(
                self._dataset,
                ranked_for(task, results),
                task,
                image_ids=seen,
                backend=backend,
                keypoint_sigmas=self._keypoint_sigmas,
                max_detections=self._max_detections,
            )
            scores[task] = summary | {f"AP-{name}": value for name, value in per_class.items()}
        return scores

    def _ordered(self, records: Any) -> list[dict[str, Any]]:
        """Sort by position in the data set, once per image; name images that were left out."""
        by_image = {record["image_id"]: record for record in records}
        order = {image["id"]: index for index, image in enumerate(self._dataset["images"])}
        missing = [image_id for image_id in order if image_id not in by_image]
        if missing and not self._seen_images_only:
            logger.warning(
                "%d of %d images of %s were not evaluated and count as missed, among them image "
                "ids %s.",
                len(missing),
                len(order),
                self._dataset_name,
                missing[:_NAMED],
            )
        return sorted(
            by_image.values(), key=lambda record: order.get(record["image_id"], len(order))
        )

    def _tasks(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
        """Name the tasks that both the detections and the ground truth can serve."""
        offered = (
            set().union(*(record["tasks"] for record in records)) if records else {"bbox", "segm"}
        )
        annotations = self._dataset["annotations"]
        for task, key in (("segm", "segmentation"), ("keypoints", "keypoints")):
            if task in offered and annotations and not any(a.get(key) for a in annotations):
                logger.warning(
                    "No annotation of %s has %s: %s AP is not computed.",
                    self._dataset_name,
                    key,
                    task,
                )
                offered.discard(task)
        if self._boundary and "segm" in offered:
            offered.add("boundary")
        return [task for task in METRICS if task in offered]


def dataset_ground_truth(dataset_name: str) -> dict[str, Any]:
    """Return the COCO dictionary of a registered data set, see ``normalise_ground_truth``.

    Raises:
        FileNotFoundError: if the annotation file is missing.
    """
    metadata = MetadataCatalog.get(dataset_name)
    data.ensure_files(dataset_name)
    if not metadata.get("json_file"):
        DatasetCatalog.get(dataset_name)  # loading may be what sets the metadata
    if metadata.get("json_file"):
        return load_ground_truth(metadata.json_file)
    return normalise_ground_truth(convert_to_coco_dict(dataset_name))


def _category_ids(metadata: Any, dataset: Mapping[str, Any]) -> list[int]:
    """Give the data set's category id of each contiguous class index."""
    mapping = metadata.get("thing_dataset_id_to_contiguous_id")
    if not mapping:
        return sorted(category["id"] for category in dataset["categories"])
    return [category_id for category_id, _ in sorted(mapping.items(), key=lambda item: item[1])]


def ranked_for(task: str, results: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Copy results for a task; of masks, ``mask_score`` becomes the score where there is one."""
    if task not in MASK_TASKS:
        return results
    return [{**r, "score": r["mask_score"]} if "mask_score" in r else r for r in results]


def instances_to_results(
    instances: Instances,
    image_id: int,
    category_ids: Sequence[int],
    segm_score_field: str | None = None,
) -> list[dict[str, Any]]:
    """Convert the detections of one image to COCO's result format.

    Detections with a score of either kind that is not finite are left out and counted in a warning.

    Args:
        instances: N detections with ``scores``, ``pred_classes``, and ``pred_boxes`` and/or masks.
            Not modified.
        image_id: id of the image in the data set.
        category_ids: the data set's category id for each contiguous class index.
        segm_score_field: see ``InstSegCOCOEvaluator``; its value is stored as ``mask_score``.

    Returns:
        N dictionaries with ``image_id, category_id, bbox`` (XYWH), ``score`` and, as far as
        predicted, ``segmentation`` (compressed RLE, text), ``mask_score``, ``keypoints``.

    Raises:
        ValueError: if a class index is out of range or there are neither boxes nor masks.
        KeyError: if ``segm_score_field`` is not a field of ``instances``.
    """
    if len(instances) == 0:
        return []
    scores = _to_numpy(instances.scores)
    classes = _to_numpy(instances.pred_classes).tolist()
    if min(classes) < 0 or max(classes) >= len(category_ids):
        raise ValueError(
            f"Image {image_id}: predicted class {max(classes)} but the data set has "
            f"{len(category_ids)} classes; "
            "the model's class count does not fit this data set."
        )
    finite = np.isfinite(scores)
    rles = _masks(instances)
    columns: dict[str, list[Any]] = {"bbox": _boxes(instances, rles)}
    if rles is not None:
        columns["segmentation"] = rles
        if segm_score_field:
            if not instances.has(segm_score_field):
                raise KeyError(
                    f"Image {image_id}: detections have no field {segm_score_field!r} to rank "
                    "masks by."
                )
            mask_scores = _to_numpy(instances.get(segm_score_field))
            columns["mask_score"] = mask_scores.tolist()
            finite &= np.isfinite(mask_scores)
    if instances.has("pred_keypoints"):
        columns["keypoints"] = _keypoints(instances.pred_keypoints)
    if not finite.all():
        logger.warning(
            "Image %s: %d detections without a finite score left out.", image_id, (~finite).sum()
        )
    return [
        {"image_id": image_id, "category_id": category_ids[classes[i]], "score": float(scores[i])}
        | {key: column[i] for key, column in columns.items()}
        for i in np.flatnonzero(finite)
    ]


def _to_numpy(values: torch.Tensor) -> np.ndarray:
    if values.is_floating_point():
        values = values.float()  # numpy knows no bfloat16
    return values.detach().cpu().numpy()


def _masks(instances: Instances) -> list[dict[str, Any]] | None:
    if instances.has("pred_masks_rle"):
        return [_text_rle(rle) for rle in instances.pred_masks_rle]
    if instances.has("pred_masks"):
        return encode_masks(instances.pred_masks)
    return None


def _text_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def _boxes(instances: Instances, rles: Sequence[Mapping[str, Any]] | None) -> list[list[float]]:
    """Give XYWH boxes, tight around the masks where the model predicts no boxes."""
    if instances.has("pred_boxes"):
        xyxy = _to_numpy(instances.pred_boxes.tensor)
        return np.concatenate((xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]), axis=1).tolist()
    if rles is None:
        raise ValueError(
            "Detections have neither pred_boxes nor masks; there is nothing to evaluate."
        )
    packed = [{"size": rle["size"], "counts": rle["counts"].encode("ascii")} for rle in rles]
    return np.asarray(coco_mask.toBbox(packed)).tolist()


def _keypoints(keypoints: torch.Tensor) -> list[list[float]]:
    """Flatten (N, P, 3); COCO's coordinates are pixel indices, detectron2's are continuous."""
    shifted = keypoints.detach().float().cpu().clone()
    shifted[:, :, :2] -= 0.5
    return shifted.flatten(start_dim=1).tolist()
