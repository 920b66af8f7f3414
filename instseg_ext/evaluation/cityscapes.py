"""Cityscapes evaluation with the data set's own scripts.

detectron2's evaluators write the predictions. Here the scripts are called part by part: called as a
whole, they end the program where an image has no prediction, and leave a file in the working
directory.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detectron2.utils import comm

__all__ = ["InstSegCityscapesEvaluator", "InstSegCityscapesSemSegEvaluator"]

_SCRIPTS = "cityscapesscripts.evaluation.eval{}LevelSemanticLabeling"
_IMAGE = "leftImg8bit.png"


class _Paired:
    """Pairs predictions with ground truth; goes in front of an evaluator.

    Attributes:
        seen_only: judge the images that the evaluator is given instead of all.
    """

    def __init__(self, dataset_name: str, *, seen_images_only: bool = False) -> None:
        super().__init__(dataset_name)
        self.seen_only = seen_images_only

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._seen: list[str] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take one batch; see ``DatasetEvaluator``."""
        super().process(inputs, outputs)
        self._seen += [Path(image["file_name"]).name for image in inputs]

    def pairs(self, truth: str, prediction: str) -> list[tuple[str, str]]:
        """Return the files to compare, of every image or of the seen ones.

        Args:
            truth: end of the ground truth's file names, after ``city_number_number_``.
            prediction: end of the predictions' file names, after the image's name.

        Returns:
            Ground truth and prediction, which may not exist, by image; empty on all processes but
            the main one.

        Raises:
            FileNotFoundError: if there is no ground truth.
        """
        seen = set(itertools.chain(*comm.all_gather(self._seen)))
        if not comm.is_main_process():
            return []
        files = {
            path.name.removesuffix(truth) + _IMAGE: path
            for path in sorted(Path(self._metadata.gt_dir).glob(f"*/*_{truth}"))
        }
        if not files:
            raise FileNotFoundError(f"{self._metadata.gt_dir} has no folder with files *_{truth}.")
        names = [name for name in files if name in seen or not self.seen_only]
        return [
            (str(files[name]), f"{self._temp_dir}/{Path(name).stem}{prediction}") for name in names
        ]


class InstSegCityscapesEvaluator(_Paired, CityscapesInstanceEvaluator):
    """AP of instances, averaged and by class. Images that were left out count as missed."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return ``AP``, ``AP50`` and ``AP-<class>`` of ``segm`` in percent, in the main process.

        Raises:
            FileNotFoundError: if there is no ground truth.
        """
        pairs = self.pairs("gtFine_instanceIds.png", "_pred.txt")
        if not comm.is_main_process():
            return None
        for _, prediction in pairs:
            Path(prediction).touch()
        scripts = importlib.import_module(_SCRIPTS.format("Instance"))
        args = scripts.args
        args.quiet, args.predictionPath = True, self._temp_dir
        args.gtInstancesFile = f"{self._temp_dir}/gtInstances.json"
        truth, predictions = (list(files) for files in zip(*pairs, strict=True))
        scripts.setInstanceLabels(args)
        objects = scripts.getGtInstances(truth, args)
        matches = scripts.matchGtWithPreds(predictions, truth, objects, args)
        average = scripts.computeAverages(scripts.evaluateMatches(matches, args), args)
        self._working_dir.cleanup()
        scores = {"AP": average["allAp"], "AP50": average["allAp50%"]}
        scores |= {f"AP-{name}": each["ap"] for name, each in average["classes"].items()}
        return {"segm": {name: 100 * float(value) for name, value in scores.items()}}


class InstSegCityscapesSemSegEvaluator(_Paired, CityscapesSemSegEvaluator):
    """IoU of classes, of the 19 that are evaluated."""

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Return ``IoU``, ``iIoU``, ``IoU_sup`` and ``iIoU_sup`` in percent, in the main process.

        The last two are over groups of classes; the i says that each object counts as much as any
        other, whatever its size.

        Raises:
            FileNotFoundError: if there is no ground truth, or no prediction for an image.
        """
        pairs = self.pairs("gtFine_labelIds.png", "_pred.png")
        if not comm.is_main_process():
            return None
        for truth, prediction in pairs:
            if not Path(prediction).is_file():
                raise FileNotFoundError(f"The model was not given the image of {truth}.")
        scripts = importlib.import_module(_SCRIPTS.format("Pixel"))
        args = scripts.args
        args.quiet, args.JSONOutput = True, False
        truth, predictions = (list(files) for files in zip(*pairs, strict=True))
        found = scripts.evaluateImgLists(predictions, truth, args)
        self._working_dir.cleanup()
        names = {
            "IoU": "averageScoreClasses",
            "iIoU": "averageScoreInstClasses",
            "IoU_sup": "averageScoreCategories",
            "iIoU_sup": "averageScoreInstCategories",
        }
        return {"sem_seg": {name: 100 * float(found[key]) for name, key in names.items()}}
