"""Pictures of the training in TensorBoard: annotation beside prediction, every ``VIS_PERIOD``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.engine import HookBase
from detectron2.utils import comm

from instseg_ext.engine.distributed import unwrap
from instseg_ext.evaluation import inference_mode
from instseg_ext.visualization.data import draw_labels, draw_sample, sample_pixels
from instseg_ext.visualization.draw import DrawStyle, draw_instances

__all__ = ["PicturesHook"]

# More would hide each other.
_MOST_DETECTIONS = 30
_SIDE = 256


class PicturesHook(HookBase):
    """Draws the first image of the batch with its ground truth and with the current prediction.

    Only the main process draws. The weights are the trained ones, not their average.

    Args:
        period: iterations; 0 or less = never.
        image_format: channel order of the images, ``INPUT.FORMAT``.
        names: class names by contiguous index.
    """

    def __init__(self, period: int, image_format: str, names: Sequence[str]) -> None:
        self._period = period
        self._format = image_format
        self._names = list(names)

    def after_step(self) -> None:
        """Draw if it is time."""
        due = self._period > 0 and (self.trainer.iter + 1) % self._period == 0
        if due and comm.is_main_process():
            self._draw(self.trainer.last_batch[0])

    def _draw(self, sample: dict) -> None:
        height, width = sample["image"].shape[1:]
        model = unwrap(self.trainer.model)
        with inference_mode(model, "bool"):
            outputs = model([{"image": sample["image"], "height": height, "width": width}])
        pixels = sample_pixels(sample, self._format)
        if "sem_seg" in sample:
            labels = outputs[0]["sem_seg"].argmax(dim=0).cpu().numpy()
            predicted = draw_labels(pixels, labels, self._names, min_side=_SIDE)
        else:
            found = outputs[0]["instances"].to("cpu")[:_MOST_DETECTIONS]
            predicted = draw_instances(
                pixels,
                masks=found.pred_masks.numpy() if found.has("pred_masks") else None,
                boxes=found.pred_boxes.tensor.numpy(),
                classes=found.pred_classes.tolist(),
                scores=found.scores.tolist(),
                names=self._names,
                style=DrawStyle(boxes=True, min_side=_SIDE),
            )
        truth = draw_sample(sample, self._format, self._names)
        beside = np.concatenate([truth, predicted], axis=1)[:, :, ::-1]
        self.trainer.storage.put_image(
            "truth_and_prediction", np.ascontiguousarray(beside.transpose(2, 0, 1))
        )
