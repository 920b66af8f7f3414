"""Evaluation of class-agnostic proposals as a detectron2 ``DatasetEvaluator``."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.structures import Instances
from detectron2.utils import comm
from pycocotools import mask as coco_mask

from instseg_ext.evaluation.coco import dataset_ground_truth
from instseg_ext.evaluation.proposal_recall import (
    AREAS,
    RecallTable,
    counted_objects,
    match_ranks,
)
from instseg_ext.structures.rle import encode_masks, segmentation_rle

__all__ = ["ProposalEvaluator", "WithProposals"]

logger = logging.getLogger(__name__)

TASK = "proposals"
COUNTS = (10, 100, 1000)
_KINDS = ("segm", "bbox")


class ProposalEvaluator(DatasetEvaluator):
    """Average recall of masks and boxes, whatever their classes, by COCO's rules.

    The task ``proposals`` holds, in percent, ``segm_AR@10``, ``segm_AR@100``, ``segm_AR@1000``,
    ``segm_ARs@100``, ``segm_ARm@100`` and ``segm_ARl@100`` by COCO's ranges of object area, and
    ``segm_AUC``, the area under the curve of average recall over the logarithm of the number of
    proposals, 1 to 1000; then the same of boxes (``bbox_AR@10``, ...). Recall is that of
    ``COCOeval`` with ``useCats`` 0. The boxes are ``pred_boxes``, or tight around the masks where
    there are none.

    Proposals are matched as they come and then forgotten, so that thousands per image take no
    memory.

    Attributes:
        num_classes: of the data set.
    """

    # Read by the inference loop, which then asks the model for run-length encoded masks.
    accepts_rle = True

    def __init__(self, dataset_name: str, *, seen_images_only: bool = False) -> None:
        """Load the ground truth of ``dataset_name``.

        Args:
            dataset_name: registered data set with a COCO file (metadata ``json_file``) or
                detectron2's own dictionaries.
            seen_images_only: judge only the images that ``process`` met, for a run on part of a
                data set.

        Raises:
            FileNotFoundError: if the annotation file is missing.
        """
        self._dataset_name, self._seen_images_only = dataset_name, seen_images_only
        dataset = dataset_ground_truth(dataset_name)
        self._annotated = "annotations" in dataset
        self.num_classes = len(dataset["categories"])
        self._sizes = {
            image["id"]: (image.get("height"), image.get("width")) for image in dataset["images"]
        }
        self._objects: dict[Any, list[dict]] = defaultdict(list)
        # The order of COCOeval, by category: of equal overlaps it takes the last object.
        for annotation in sorted(dataset.get("annotations", ()), key=lambda a: a["category_id"]):
            self._objects[annotation["image_id"]].append(annotation)
        self._found: dict[Any, dict[str, tuple[np.ndarray, np.ndarray]]] = {}

    def reset(self) -> None:
        """Forget the proposals of an earlier run."""
        self._found = {}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Match the proposals of a batch.

        Args:
            inputs: dictionaries with ``image_id``.
            outputs: dictionaries with ``instances``: ``scores``, and ``pred_boxes`` or masks
                (``pred_masks`` or ``pred_masks_rle``) or both; read, not modified.

        Raises:
            ValueError: if an image is not of the data set, or there are neither boxes nor masks.
        """
        for image, output in zip(inputs, outputs, strict=True):
            image_id = image["image_id"]
            if image_id not in self._sizes:
                raise ValueError(
                    f"Image id {image_id!r} is not in the ground truth of {self._dataset_name}."
                )
            self._found[image_id] = {
                kind: self._match(kind, image_id, proposals)
                for kind, proposals in _best_first(output["instances"], image_id).items()
            }

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Gather from all processes and compute the figures.

        Returns:
            ``{"proposals": {...}}`` in percent on the main process, empty on the others and for
            data without annotations. NaN stands for "no such ground truth".
        """
        comm.synchronize()
        gathered = comm.gather(self._found, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        if not self._annotated:
            logger.warning("%s has no annotations: no recall is measured.", self._dataset_name)
            return OrderedDict()
        found = {image_id: kinds for part in gathered for image_id, kinds in part.items()}
        offered = set().union(*found.values()) if found else set(_KINDS)
        judged = found.keys() if self._seen_images_only else self._sizes.keys()
        missing = [image_id for image_id in judged if image_id not in found]
        if missing:
            logger.warning(
                "%d of %d images of %s were not evaluated and count as missed.",
                len(missing),
                len(judged),
                self._dataset_name,
            )
        figures: dict[str, float] = {}
        for kind in (kind for kind in _KINDS if kind in offered):
            images = (
                found.get(image_id, {}).get(kind) or self._match(kind, image_id, [])
                for image_id in judged
            )
            figures |= _figures(kind, RecallTable(images, max(COUNTS)))
        return OrderedDict({TASK: figures})

    def _match(
        self, kind: str, image_id: Any, proposals: Sequence[Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ranks at which an image's objects were found, and which of them count.

        Args:
            kind: ``segm`` or ``bbox``.
            image_id: of the data set.
            proposals: run lengths, or XYWH boxes; best first.
        """
        objects, shapes = [], []
        for annotation in self._objects.get(image_id, ()):
            shape = annotation.get("bbox")
            if kind == "segm":
                shape = segmentation_rle(annotation.get("segmentation"), *self._sizes[image_id])
            if shape:
                objects.append(annotation)
                shapes.append(shape)
        crowd = [bool(a["iscrowd"]) for a in objects]
        counted = counted_objects([a["area"] for a in objects], crowd)
        iou = np.zeros((len(proposals), len(objects)))
        if iou.size:
            if kind == "bbox":
                shapes = np.asarray(shapes, dtype=np.float64).reshape(-1, 4)
            iou = np.asarray(coco_mask.iou(proposals, shapes, crowd))
        return match_ranks(iou, counted), counted


class WithProposals(DatasetEvaluators):
    """Another evaluator and, beside its tasks, the recall of proposals."""

    def __init__(self, evaluator: DatasetEvaluator, proposals: ProposalEvaluator) -> None:
        """Keep the two.

        Args:
            evaluator: of detections, and their classes.
            proposals: gets the same detections.
        """
        super().__init__([evaluator, proposals])
        self.accepts_rle = getattr(evaluator, "accepts_rle", False)


def _best_first(instances: Instances, image_id: Any) -> dict[str, Sequence[Any]]:
    """Return the best proposals of an image, by falling score.

    Returns:
        ``segm``, where there are masks: run lengths; ``bbox``: (D, 4) float64, XYWH.

    Raises:
        ValueError: if there are neither boxes nor masks.
    """
    scores = instances.scores.detach().float().cpu().numpy()
    finite = np.isfinite(scores)
    if not finite.all():
        logger.warning(
            "Image %s: %d proposals without a finite score left out.", image_id, (~finite).sum()
        )
    order = np.argsort(-scores, kind="stable")
    order = order[finite[order]][: max(COUNTS)]
    shapes: dict[str, Sequence[Any]] = {}
    if instances.has("pred_masks_rle"):
        shapes["segm"] = [_packed(instances.pred_masks_rle[int(row)]) for row in order]
    elif instances.has("pred_masks"):
        shapes["segm"] = [_packed(r) for r in encode_masks(instances.pred_masks[order.tolist()])]
    if instances.has("pred_boxes"):
        boxes = instances.pred_boxes.tensor.detach().float().cpu().numpy()[order]
        sides = boxes[:, 2:] - boxes[:, :2]
        shapes["bbox"] = np.concatenate((boxes[:, :2], sides), axis=1).astype(np.float64)
    elif "segm" in shapes:
        shapes["bbox"] = np.asarray(coco_mask.toBbox(shapes["segm"])).reshape(-1, 4)
    else:
        raise ValueError(f"Image {image_id}: proposals have neither pred_boxes nor masks.")
    return shapes


def _packed(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Give run lengths the form in which pycocotools compares them."""
    counts = rle["counts"]
    return {
        "size": list(rle["size"]),
        "counts": counts.encode("ascii") if isinstance(counts, str) else counts,
    }


def _figures(kind: str, table: RecallTable) -> dict[str, float]:
    """Lay out average recall in percent."""
    figures = {f"{kind}_AR@{count}": table.average_recall("", count) for count in COUNTS}
    figures |= {f"{kind}_AR{area}@100": table.average_recall(area, 100) for area in AREAS}
    figures[f"{kind}_AUC"] = table.area_under_curve()
    return {name: 100 * value for name, value in figures.items()}
