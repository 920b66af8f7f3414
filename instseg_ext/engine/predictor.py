"""Predict single pictures, with the numbers of evaluation and of ``DefaultPredictor``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances

from instseg_ext import data
from instseg_ext.checkpoint import InstSegCheckpointer, read_metadata
from instseg_ext.engine.standalone import class_count
from instseg_ext.evaluation import inference_mode
from instseg_ext.layers.mask_ops import RLEList
from instseg_ext.method import Method
from instseg_ext.modeling.semantic import label_regions

__all__ = ["Predictor", "class_names", "lower_thresholds"]

logger = logging.getLogger(__name__)


def class_names(cfg: CfgNode) -> list[str]:
    """Find the names of the model's classes, in contiguous order.

    They come from the config, else from the checkpoint, else from the first test or training set
    whose annotation file is there.

    Returns:
        The names; empty where nobody knows them.
    """
    if cfg.INSTSEG.CLASS_NAMES:
        return list(cfg.INSTSEG.CLASS_NAMES)
    if cfg.MODEL.WEIGHTS:
        names = read_metadata(cfg.MODEL.WEIGHTS).get("class_names")
        if names:
            return list(names)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        try:
            names = data.dataset_classes(name)
        except (KeyError, FileNotFoundError):
            continue
        if names:
            return list(names)
    return []


def lower_thresholds(cfg: CfgNode, method: Method, threshold: float) -> list[str]:
    """Lower the method's score bounds to ``threshold`` where they are above it.

    They are never raised: that would change which candidates suppress others. A caller who wants
    fewer detections filters the results.

    Args:
        cfg: changed in place.
        method: names the keys.
        threshold: lowest score wanted.

    Returns:
        The keys that changed.
    """
    changed = []
    for key in method.score_threshold_keys:
        *parents, leaf = key.split(".")
        node = cfg
        for name in parents:
            node = node[name]
        if node[leaf] > threshold:
            node[leaf] = float(threshold)
            changed.append(key)
    return changed


class Predictor:
    """A model that takes a picture and gives its detections.

    Attributes:
        cfg: the config it was built from, with lowered score bounds; a copy.
        model: in evaluation mode.
        names: class names, see ``class_names``.
        semantic: the model predicts a label map.
    """

    def __init__(
        self,
        cfg: CfgNode,
        method: Method,
        *,
        threshold: float | None = None,
        mask_output: str = "rle",
        unsafe: bool = False,
    ) -> None:
        """Build the model and load ``MODEL.WEIGHTS``.

        Args:
            cfg: not modified.
            method: the method that ``cfg`` configures.
            threshold: detections with a lower score are left out, and the method's own bounds are
                lowered to it; ``None`` leaves the config's bounds alone.
            mask_output: ``rle`` or ``bool``, for models that have this switch.
            unsafe: see ``InstSegCheckpointer``.

        Raises:
            FileNotFoundError: if the weights do not exist.
            ValueError: if they do not fit the model.
        """
        self.cfg = cfg.clone()
        self.cfg.defrost()
        lowered = [] if threshold is None else lower_thresholds(self.cfg, method, threshold)
        if lowered:
            logger.info("Lowered %s to %s.", ", ".join(lowered), threshold)
        self.threshold = threshold
        self.mask_output = mask_output
        self.names = class_names(cfg)
        self.model = build_model(self.cfg)
        self.model.eval()
        self.semantic = hasattr(self.model, "sem_seg_head") and not hasattr(self.model, "roi_heads")
        if cfg.MODEL.WEIGHTS:
            checkpointer = InstSegCheckpointer(
                self.model, num_classes=class_count(cfg, method), unsafe=unsafe
            )
            checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        else:
            logger.warning("MODEL.WEIGHTS is empty: predicting with random weights.")
        side = cfg.INPUT.MIN_SIZE_TEST
        self._resize = T.ResizeShortestEdge([side, side], cfg.INPUT.MAX_SIZE_TEST)
        self._rgb = cfg.INPUT.FORMAT == "RGB"

    def to_input(self, image_bgr: np.ndarray) -> dict[str, object]:
        """Prepare the dictionary that models take.

        Args:
            image_bgr: (H, W, 3) uint8; not modified.

        Returns:
            ``image`` ((3, h, w) float32, 0 to 255, channel order of the config), ``height``,
            ``width``.
        """
        image = image_bgr[:, :, ::-1] if self._rgb else image_bgr
        height, width = image.shape[:2]
        resized = self._resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.astype("float32").transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}

    def __call__(self, image_bgr: np.ndarray) -> Instances:
        """Predict one picture, see ``predict``."""
        return self.predict([image_bgr])[0]

    def predict(self, images_bgr: Sequence[np.ndarray]) -> list[Instances]:
        """Predict pictures in one forward pass.

        Args:
            images_bgr: (H, W, 3) uint8 each.

        Returns:
            Per picture, its detections with ``scores >= threshold`` on the CPU, at the picture's
            size. A label map is given as the regions of its classes, see ``label_regions``.
        """
        with inference_mode(self.model, self.mask_output):
            outputs = self.model([self.to_input(image) for image in images_bgr])
        return [self._kept(output) for output in outputs]

    def _kept(self, output: Mapping[str, Any]) -> Instances:
        found = label_regions(output["sem_seg"]) if self.semantic else output["instances"]
        instances = found.to("cpu")
        if instances.has("pred_masks_rle"):  # a plain list cannot be indexed by a tensor
            instances.pred_masks_rle = RLEList(instances.pred_masks_rle)
        return (
            instances if self.threshold is None else instances[instances.scores >= self.threshold]
        )
