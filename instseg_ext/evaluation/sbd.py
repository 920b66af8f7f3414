"""Evaluation of SBD and VOC by AP^r, the figures of the SDS, MNC and FCIS papers."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instseg_ext.evaluation.coco import InstSegCOCOEvaluator, ranked_for
from instseg_ext.evaluation.coco_ap import category_names
from instseg_ext.evaluation.region_errors import GAINS, error_gains
from instseg_ext.evaluation.voc_ap import RULES, THRESHOLDS, region_average_precision

__all__ = ["InstSegSBDEvaluator"]

logger = logging.getLogger(__name__)

TASK = "map_r"
# What is reported: the columns of THRESHOLDS that are averaged, and the name for a class.
_FIGURES = {
    "50": ([THRESHOLDS.index(0.5)], "AP"),
    "70": ([THRESHOLDS.index(0.7)], "AP70"),
    "vol": (list(range(len(THRESHOLDS))), "APvol"),
}


class InstSegSBDEvaluator(InstSegCOCOEvaluator):
    """Adds the task ``map_r`` to what ``InstSegCOCOEvaluator`` computes.

    It holds ``mAP50``, ``mAP70`` and ``mAPvol`` (mean over IoU 0.1, 0.2 ... 0.9) in percent, the
    same by each rule (``voc_mAP50``, ``sds_mAP50``, ...), and of each class ``AP-<class>`` at IoU
    0.5, ``AP70-<class>`` and ``APvol-<class>``. Classes without an object in the judged images are
    NaN and no part of the means. With ``errors`` there are also ``gain_<kind>`` and
    ``gain_<kind>-<class>``, see ``error_gains``.

    It works on every data set with masks; what is gathered from the processes and written to files
    is that of the class it extends.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path | None = None,
        *,
        rule: str = "voc",
        errors: bool = False,
        **options: Any,
    ) -> None:
        """Load the ground truth of ``dataset_name``.

        Args:
            dataset_name: see ``InstSegCOCOEvaluator``.
            output_dir: see ``InstSegCOCOEvaluator``.
            rule: ``voc`` or ``sds``: by which the figures without a rule's name are.
            errors: tell what kinds of wrong detections cost how much.
            **options: of ``InstSegCOCOEvaluator``.

        Raises:
            ValueError: if there is no such rule.
        """
        if rule not in RULES:
            raise ValueError(f"AP^r has the rules {' and '.join(RULES)}, not {rule!r}.")
        super().__init__(dataset_name, output_dir, **options)
        self._rule = rule
        self._errors = errors

    def _measure(
        self, results: Sequence[Mapping[str, Any]], tasks: Sequence[str], seen: list[int] | None
    ) -> OrderedDict[str, dict[str, float]]:
        scores = super()._measure(results, tasks, seen)
        if "segm" not in tasks:
            logger.warning("%s: there are no masks to compute AP^r from.", self._dataset_name)
            return scores
        ranked = ranked_for(TASK, results)
        names = category_names(self._dataset["categories"])
        found = region_average_precision(self._dataset, ranked, image_ids=seen)
        scores[TASK] = _figures(found, self._rule, names)
        if self._errors:
            scores[TASK] |= _gains(error_gains(self._dataset, ranked, image_ids=seen), names)
        return scores


def _figures(
    found: Mapping[str, Mapping[int, np.ndarray]], rule: str, names: Mapping[int, str]
) -> dict[str, float]:
    """Lay out means and classes, in percent.

    Args:
        found: what ``region_average_precision`` gives.
        rule: of the figures without a rule's name.
        names: of the categories, by id.
    """
    tables = {  # rule -> figure -> one value for each class
        name: {
            figure: 100 * np.array([values[key][columns].mean() for key in names])
            for figure, (columns, _) in _FIGURES.items()
        }
        for name, values in found.items()
    }
    missing = int(np.isnan(tables[rule]["50"]).sum())
    if missing:
        logger.info("AP^r: %d of %d classes have no object to find.", missing, len(names))
    figures = {f"mAP{figure}": _mean(values) for figure, values in tables[rule].items()}
    for name, table in tables.items():
        figures |= {f"{name}_mAP{figure}": _mean(values) for figure, values in table.items()}
    for figure, (_, label) in _FIGURES.items():
        classes = zip(names.values(), tables[rule][figure], strict=True)
        figures |= {f"{label}-{name}": float(value) for name, value in classes}
    return figures


def _gains(found: Mapping[int, np.ndarray], names: Mapping[int, str]) -> dict[str, float]:
    """Lay out what ``error_gains`` gives: means and classes, in percent."""
    table = 100 * np.stack([found[key] for key in names])
    gains = {f"gain_{kind}": _mean(column) for kind, column in zip(GAINS, table.T, strict=True)}
    for kind, column in zip(GAINS, table.T, strict=True):
        classes = zip(names.values(), column, strict=True)
        gains |= {f"gain_{kind}-{name}": float(value) for name, value in classes}
    return gains


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
