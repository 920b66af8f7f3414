"""LVIS evaluation of the images that a model was given."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.evaluation import LVISEvaluator
from detectron2.utils import comm

__all__ = ["SeenLVISEvaluator"]


class SeenLVISEvaluator(LVISEvaluator):
    """Takes the images that were not seen out of the ground truth."""

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._seen: list[int] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:
        """Take one batch; see ``DatasetEvaluator``."""
        super().process(inputs, outputs)
        self._seen += [image["image_id"] for image in inputs]

    def evaluate(self) -> dict[str, Any] | None:
        """See ``LVISEvaluator``."""
        seen = set(itertools.chain(*comm.all_gather(self._seen)))
        content = self._lvis_api.dataset
        content["images"] = [image for image in content["images"] if image["id"] in seen]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in seen]
        self._lvis_api._create_index()
        return super().evaluate()
