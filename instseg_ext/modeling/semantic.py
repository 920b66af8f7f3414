"""Semantic segmentation: detectron2's segmentor with shared precision; label maps as regions."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import move_device_like
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from instseg_ext.layers.mask_ops import RLEList, tight_boxes
from instseg_ext.layers.stretch import stretch
from instseg_ext.modeling.dense import one_stretch_size, output_size
from instseg_ext.modeling.runtime import RuntimeMixin, RuntimeOptions
from instseg_ext.structures.rle import encode_masks

__all__ = ["InstSegSemanticSegmentor", "label_regions"]


@META_ARCH_REGISTRY.register()
class InstSegSemanticSegmentor(RuntimeMixin, SemanticSegmentor):
    """``SemanticSegmentor`` with memory format, precision and stretch of the config.

    Parameter names are those of ``SemanticSegmentor``, so that model-zoo weights load. In float32
    the logits and losses are those of ``SemanticSegmentor`` too.
    """

    @configurable
    def __init__(
        self,
        *,
        runtime: RuntimeOptions | None = None,
        stretch_size: tuple[int, int] = (0, 0),
        **kwargs: Any,
    ) -> None:
        """Keep the parts.

        Args:
            runtime: precision and memory format; default options if None.
            stretch_size: (height, width) to which each image is stretched before batching; (0, 0) =
                off.
            **kwargs: the arguments of ``SemanticSegmentor``.
        """
        super().__init__(**kwargs)
        self.stretch_size = tuple(stretch_size)
        self.init_runtime(runtime or RuntimeOptions())

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            **super().from_config(cfg),
            "runtime": RuntimeOptions.from_config(cfg),
            "stretch_size": one_stretch_size(cfg),
        }

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Stretch if so configured, normalise, pad and batch, in the model's memory format."""
        images = [move_device_like(x["image"], self.pixel_mean) for x in batched_inputs]
        if any(self.stretch_size):
            images = [stretch(image, self.stretch_size) for image in images]
        batch = self._batch([(image - self.pixel_mean) / self.pixel_std for image in images])
        return ImageList(self.to_memory_format(batch.tensor), batch.image_sizes)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return the losses in training, else ``[{"sem_seg": logits}, ...]``.

        Args:
            batched_inputs: dicts with ``image`` (C, H, W), and ``sem_seg`` (H, W) int64 labels in
                training, ``height`` and ``width`` (the output size) in inference.

        Returns:
            float32 scalars, or per image (K, height, width) float32 logits.

        Raises:
            ValueError: if an image has no ``sem_seg`` in training.
        """
        images = self.preprocess_image(batched_inputs)
        targets = self._targets(batched_inputs) if self.training else None
        with self.precision():
            logits, losses = self.sem_seg_head(self.backbone(images.tensor), targets)
        if self.training:
            return {name: value.float() for name, value in losses.items()}
        return [
            {"sem_seg": sem_seg_postprocess(result, size, *output_size(item, size))}
            for result, size, item in zip(
                logits.float(), images.image_sizes, batched_inputs, strict=True
            )
        ]

    def _targets(self, batched_inputs: list[dict]) -> Tensor:
        """Return the labels (N, H, W) of a batch; padding is ignored by the loss."""
        for item in batched_inputs:
            if "sem_seg" not in item:
                name = item.get("file_name", item.get("image_id", "an image"))
                raise ValueError(f"Training needs 'sem_seg' for every image, but {name} has none.")
        labels = [item["sem_seg"].to(self.device) for item in batched_inputs]
        return self._batch(labels, self.sem_seg_head.ignore_value).tensor

    def _batch(self, tensors: list[Tensor], padding: float = 0.0) -> ImageList:
        return ImageList.from_tensors(
            tensors,
            self.backbone.size_divisibility,
            padding,
            self.backbone.padding_constraints,
        )


@torch.no_grad()
def label_regions(logits: Tensor) -> Instances:
    """Return the label map of an image as one region for each class that occurs in it.

    Args:
        logits: (K, H, W) float.

    Returns:
        ``pred_classes`` in ascending order, ``pred_masks_rle``, ``pred_boxes`` (tight) and
        ``scores``, the mean probability of the class in its region; on the CPU.
    """
    probs, labels = logits.softmax(dim=0).max(dim=0)
    classes = labels.unique()
    rles, boxes, scores = RLEList(), [], []
    for class_index in classes:
        mask = (labels == class_index)[None]  # one at a time: K of them may not fit into memory
        rles.extend(encode_masks(mask))
        boxes.append(tight_boxes(mask))
        scores.append(probs[mask[0]].mean())
    regions = Instances(tuple(labels.shape))
    regions.pred_boxes = Boxes(torch.cat(boxes).cpu())
    regions.scores = torch.stack(scores).cpu()
    regions.pred_classes = classes.cpu()
    regions.pred_masks_rle = rles
    return regions
