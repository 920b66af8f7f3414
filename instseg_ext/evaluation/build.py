"""Choose the evaluator that fits a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, SemSegEvaluator

from instseg_ext.data.foreign import require_packages
from instseg_ext.data.registration import is_semantic
from instseg_ext.data.semantic import open_labels
from instseg_ext.evaluation.cityscapes import (
    InstSegCityscapesEvaluator,
    InstSegCityscapesSemSegEvaluator,
)
from instseg_ext.evaluation.coco import InstSegCOCOEvaluator
from instseg_ext.evaluation.lvis import SeenLVISEvaluator
from instseg_ext.evaluation.proposals import ProposalEvaluator, WithProposals
from instseg_ext.evaluation.sbd import InstSegSBDEvaluator

__all__ = ["build_evaluator"]

logger = logging.getLogger(__name__)


def build_evaluator(
    cfg: CfgNode,
    dataset_name: str,
    method_hints: Mapping[str, object],
    output_dir: str | Path | None,
    *,
    seen_images_only: bool = False,
) -> DatasetEvaluator:
    """Build the evaluator named by the data set's ``evaluator_type``.

    Models that propose are judged by the recall of their proposals (``ProposalEvaluator``), and by
    the data set's own figures only where it has a single class: they predict none.

    Args:
        cfg: read for ``TEST.KEYPOINT_OKS_SIGMAS`` and ``INSTSEG``'s ``BOUNDARY_AP``, ``MAP_R``,
            ``MAP_R_ERRORS`` and ``PROPOSAL_RECALL``.
        dataset_name: registered data set.
        method_hints: ``Method.evaluator_hints``; ``segm_score_field`` names the field that ranks
            masks, ``map_r_rule`` the rule of the headline of AP^r (see ``InstSegSBDEvaluator``),
            ``proposals`` tells that the model proposes.
        output_dir: folder for result files, or ``None``.
        seen_images_only: judge the images that the evaluator is given instead of all of the data
            set's.

    Returns:
        An evaluator, not yet reset.

    Raises:
        ValueError: if the data set has no evaluator type or an unknown one, or has label maps and
            the model proposes.
        ImportError: if the evaluator needs a package that is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    proposes = bool(method_hints.get("proposals"))
    if is_semantic(dataset_name):
        if proposes:
            raise ValueError(
                f"{dataset_name} holds label maps, in which there is no object to propose."
            )
        if cfg.INSTSEG.PROPOSAL_RECALL:
            logger.warning(_NO_EFFECT, "PROPOSAL_RECALL", dataset_name, kind)
    elif proposes or cfg.INSTSEG.PROPOSAL_RECALL:
        proposals = ProposalEvaluator(dataset_name, seen_images_only=seen_images_only)
        if proposes and proposals.num_classes != 1:
            return proposals
        options = (cfg, dataset_name, method_hints, output_dir, seen_images_only)
        return WithProposals(_build(kind, *options), proposals)
    return _build(kind, cfg, dataset_name, method_hints, output_dir, seen_images_only)


def _build(
    kind: str | None,
    cfg: CfgNode,
    dataset_name: str,
    method_hints: Mapping[str, object],
    output_dir: str | Path | None,
    seen_images_only: bool,
) -> DatasetEvaluator:
    """Build the evaluator of a kind of data set, see ``build_evaluator``."""
    if kind in _COCO_STYLE:
        if kind == "coco_panoptic_seg":
            # The other parts need outputs that instance models do not have.
            logger.warning("%s is panoptic; only its instances are evaluated.", dataset_name)
        options = {
            "segm_score_field": method_hints.get("segm_score_field"),
            "seen_images_only": seen_images_only,
            "keypoint_sigmas": tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
            "boundary": cfg.INSTSEG.BOUNDARY_AP,
        }
        errors = cfg.INSTSEG.MAP_R_ERRORS
        if kind == "sbd" or cfg.INSTSEG.MAP_R or errors:
            options |= {"rule": method_hints.get("map_r_rule", "voc"), "errors": errors}
            return InstSegSBDEvaluator(dataset_name, output_dir, **options)
        return InstSegCOCOEvaluator(dataset_name, output_dir, **options)
    if kind in _FOREIGN:
        for key in ("BOUNDARY_AP", "MAP_R", "MAP_R_ERRORS"):
            if cfg.INSTSEG[key]:
                logger.warning(_NO_EFFECT, key, dataset_name, kind)
        require_packages(dataset_name)
        folder = None if output_dir is None else str(output_dir)
        return _FOREIGN[kind](dataset_name, folder, seen_images_only)
    known = ", ".join(sorted([*_COCO_STYLE, *_FOREIGN]))
    raise ValueError(
        f"Data set {dataset_name!r} has evaluator type {kind!r}, known are {known}; "
        f"set MetadataCatalog.get({dataset_name!r}).evaluator_type."
    )


def _lvis(name: str, output_dir: str | None, seen_only: bool) -> DatasetEvaluator:
    return (SeenLVISEvaluator if seen_only else LVISEvaluator)(name, output_dir=output_dir)


def _sem_seg(name: str, output_dir: str | None, _seen_only: bool) -> DatasetEvaluator:
    # detectron2's own reader does not work with numpy 2.
    return SemSegEvaluator(
        name, distributed=True, output_dir=output_dir, sem_seg_loading_fn=open_labels
    )


def _cityscapes(name: str, _output_dir: str | None, seen_only: bool) -> DatasetEvaluator:
    return InstSegCityscapesEvaluator(name, seen_images_only=seen_only)


def _cityscapes_semantic(name: str, _output_dir: str | None, seen_only: bool) -> DatasetEvaluator:
    return InstSegCityscapesSemSegEvaluator(name, seen_images_only=seen_only)


_NO_EFFECT = "INSTSEG.%s has no effect on %s, type %s."
_COCO_STYLE = ("coco", "coco_panoptic_seg", "sbd")
_FOREIGN: dict[str, Callable[[str, str | None, bool], DatasetEvaluator]] = {
    "lvis": _lvis,
    "sem_seg": _sem_seg,
    "cityscapes": _cityscapes,
    "cityscapes_instance": _cityscapes,
    "cityscapes_sem_seg": _cityscapes_semantic,
}
