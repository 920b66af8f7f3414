"""Choose the evaluator that fits a data set."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from instseg_ext.data.semantic import open_labels
from instseg_ext.evaluation.coco import InstSegCOCOEvaluator

__all__ = ["build_evaluator"]

logger = logging.getLogger(__name__)

# detectron2 main imports the Cityscapes scripts under the name they have in its owner's repository.
_CITYSCAPES_ALIAS = "deeplearning.projects.cityscapesApi.cityscapesscripts"


def build_evaluator(
    cfg: CfgNode,
    dataset_name: str,
    method_hints: Mapping[str, object],
    output_dir: str | Path | None,
    *,
    seen_images_only: bool = False,
) -> DatasetEvaluator:
    """Build the evaluator named by the data set's ``evaluator_type``.

    Args:
        cfg: read for ``TEST.KEYPOINT_OKS_SIGMAS`` and ``INSTSEG.BOUNDARY_AP``.
        dataset_name: registered data set.
        method_hints: ``Method.evaluator_hints``; ``segm_score_field`` names the field that ranks
            masks.
        output_dir: folder for result files, or ``None``.
        seen_images_only: see ``InstSegCOCOEvaluator``; other evaluators judge what they are given
            anyway.

    Returns:
        An evaluator, not yet reset.

    Raises:
        ValueError: if the data set has no evaluator type or an unknown one.
        ImportError: if the evaluator needs a package that is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind in ("coco", "coco_panoptic_seg"):
        if kind == "coco_panoptic_seg":
            # The other parts need outputs that instance models do not have.
            logger.warning("%s is panoptic; only its instances are evaluated.", dataset_name)
        return InstSegCOCOEvaluator(
            dataset_name,
            output_dir,
            segm_score_field=method_hints.get("segm_score_field"),
            seen_images_only=seen_images_only,
            keypoint_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS),
            boundary=cfg.INSTSEG.BOUNDARY_AP,
        )
    if kind in _FOREIGN:
        if cfg.INSTSEG.BOUNDARY_AP:
            logger.warning("INSTSEG.BOUNDARY_AP has no effect on %s, type %s.", dataset_name, kind)
        return _FOREIGN[kind](dataset_name, None if output_dir is None else str(output_dir))
    known = ", ".join(sorted(["coco", "coco_panoptic_seg", *_FOREIGN]))
    raise ValueError(
        f"Data set {dataset_name!r} has evaluator type {kind!r}, known are {known}; "
        f"set MetadataCatalog.get({dataset_name!r}).evaluator_type."
    )


def _lvis(dataset_name: str, output_dir: str | None) -> DatasetEvaluator:
    _need("lvis", "lvis", dataset_name)
    evaluation = importlib.import_module("detectron2.evaluation")
    return evaluation.LVISEvaluator(dataset_name, output_dir=output_dir)


def _sem_seg(dataset_name: str, output_dir: str | None) -> DatasetEvaluator:
    evaluation = importlib.import_module("detectron2.evaluation")
    # detectron2's own reader does not work with numpy 2.
    return evaluation.SemSegEvaluator(
        dataset_name, distributed=True, output_dir=output_dir, sem_seg_loading_fn=open_labels
    )


def _cityscapes(class_name: str) -> Callable[[str, str | None], DatasetEvaluator]:
    def build(dataset_name: str, _output_dir: str | None) -> DatasetEvaluator:
        _need("cityscapesscripts", "cityscapesScripts", dataset_name)
        _alias_cityscapes()
        return getattr(importlib.import_module("detectron2.evaluation"), class_name)(dataset_name)

    return build


_FOREIGN: dict[str, Callable[[str, str | None], Any]] = {
    "lvis": _lvis,
    "sem_seg": _sem_seg,
    "cityscapes": _cityscapes("CityscapesInstanceEvaluator"),
    "cityscapes_instance": _cityscapes("CityscapesInstanceEvaluator"),
    "cityscapes_sem_seg": _cityscapes("CityscapesSemSegEvaluator"),
}


def _need(module: str, package: str, dataset_name: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"Evaluating {dataset_name!r} needs the package {package}: pip install "
            f"'instseg_ext[eval]' or {package}."
        ) from error


def _alias_cityscapes() -> None:
    """Make the installed Cityscapes scripts importable under the name that detectron2 main uses."""
    parents = _CITYSCAPES_ALIAS.split(".")
    if _CITYSCAPES_ALIAS in sys.modules:
        return
    scripts = importlib.import_module("cityscapesscripts")
    for depth in range(1, len(parents)):
        # The parents need to exist as packages; where the real ones do, they are kept.
        name = ".".join(parents[:depth])
        sys.modules.setdefault(name, type(sys)(name))
        if not hasattr(sys.modules[name], "__path__"):
            sys.modules[name].__path__ = []
    sys.modules[_CITYSCAPES_ALIAS] = scripts
    for part in ("evaluation", "helpers"):
        sys.modules[f"{_CITYSCAPES_ALIAS}.{part}"] = importlib.import_module(
            f"cityscapesscripts.{part}"
        )
    leaf = (
        "evaluation.evalInstanceLevelSemanticLabeling",
        "evaluation.evalPixelLevelSemanticLabeling",
        "helpers.labels",
    )
    for name in leaf:
        sys.modules[f"{_CITYSCAPES_ALIAS}.{name}"] = importlib.import_module(
            f"cityscapesscripts.{name}"
        )
    logger.info("Cityscapes scripts made known to detectron2 under its internal name.")
