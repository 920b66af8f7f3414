"""Deep metric learning as a meta-architecture: glue between head, targets, losses and inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from instseg_ext.layers.reduce import mean_over_processes
from instseg_ext.methods.metric_learning.config import check_settings
from instseg_ext.methods.metric_learning.head import DeepMetricHead, DeepMetricOutputs
from instseg_ext.methods.metric_learning.inference import (
    Detections,
    InferenceOptions,
    detect,
    to_instances,
)
from instseg_ext.methods.metric_learning.labels import cell_labels, draw_cells
from instseg_ext.methods.metric_learning.losses import (
    class_loss_sum,
    embedding_loss,
    lambda_at,
    pair_weights,
)
from instseg_ext.methods.metric_learning.masks import MaskOptions
from instseg_ext.methods.metric_learning.pyramid import ScalePyramid
from instseg_ext.methods.metric_learning.seeds import SeedRule
from instseg_ext.methods.metric_learning.similarity import radii
from instseg_ext.methods.metric_learning.targets import class_targets
from instseg_ext.modeling.dense import (
    DenseInstanceSegmenter,
    dense_arguments,
    output_size,
    register_meta_architecture,
)
from instseg_ext.modeling.runtime import RuntimeOptions

__all__ = ["DeepMetricInstSeg", "LossOptions"]


@dataclass(frozen=True)
class LossOptions:
    """Settings of the losses; see the config keys of the same names.

    Attributes:
        ramp: first iteration of the rise of the weight of the class loss, last one, and the weight
            there.
    """

    pixels_per_instance: int = 10
    pixels_of_background: int = 10
    background: str = "instance"
    pair_weight: str = "uniform"
    legacy_div_s: bool = False
    cls_iou: float = 0.5
    ramp: tuple[float, float, float] = (0.0, 0.0, 0.2)


@register_meta_architecture
class DeepMetricInstSeg(DenseInstanceSegmenter):
    """Semantic instance segmentation via deep metric learning (arXiv:1703.10277).

    Every cell has an embedding; cells of one object are close, others far. A mask is all cells that
    are similar to a seed, and seeds are the cells whose masks have a class, far from each other.

    Note:
        Padding changes the features near it, and with them the result of an image.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: ScalePyramid,
        head: DeepMetricHead,
        num_classes: int,
        taus: Sequence[float],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        loss_options: LossOptions | None = None,
        inference_options: InferenceOptions | None = None,
        stretch_size: tuple[int, int] = (0, 0),
        runtime: RuntimeOptions | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            backbone: see the base class, as ``pixel_mean``, ``pixel_std``, ``stretch_size`` and
                ``runtime``.
            head: built for the backbone.
            num_classes: C.
            taus: the T similarities.
            pixel_mean: see the base class.
            pixel_std: see the base class.
            loss_options: settings of the losses.
            inference_options: settings of inference.
            stretch_size: see the base class.
            runtime: see the base class.
        """
        super().__init__(
            backbone=backbone,
            head=head,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            stretch_size=stretch_size,
            runtime=runtime,
        )
        self.num_classes = num_classes
        self.loss_options = loss_options or LossOptions()
        self.inference_options = inference_options or InferenceOptions()
        self.register_buffer("radii", radii(taus), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.DEEP_METRIC``; see `configurable`.

        Raises:
            ValueError: if a setting is impossible.
        """
        node = cfg.MODEL.DEEP_METRIC
        check_settings(node)
        arguments = dense_arguments(cfg)
        backbone = ScalePyramid(arguments["backbone"], node.IN_FEATURES, node.INPUT_SCALES)
        backbone.lr_factor = node.BACKBONE_LR_MULT
        shape = backbone.output_shape()["1.0"]
        head = DeepMetricHead(
            shape.channels,
            stride=shape.stride,
            num_scales=len(node.INPUT_SCALES),
            reduce_dim=node.REDUCE_DIM,
            num_classes=node.NUM_CLASSES,
            num_taus=len(node.TAUS),
            embed_dim=node.EMBED_DIM,
            num_convs=node.HEAD_CONVS,
            width=node.HEAD_DIM,
            norm=node.HEAD_NORM,
            coord_unit=node.COORD_UNIT,
        )
        return {
            **arguments,
            "backbone": backbone,
            "head": head,
            "num_classes": node.NUM_CLASSES,
            "taus": node.TAUS,
            "loss_options": _loss_options(cfg),
            "inference_options": _inference_options(cfg),
        }

    def losses(
        self, raw: DeepMetricOutputs, images: ImageList, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Return ``loss_embed`` and ``loss_cls``, weighted; see the base class."""
        options = self.loss_options
        terms = [
            self._image_losses(raw.embeddings[n], raw.class_logits[n], gt)
            for n, gt in enumerate(gt_instances)
        ]
        embed, with_objects, cls, counted = (torch.stack(t).sum() for t in zip(*terms, strict=True))
        if self.loss_normalizer == "global":
            with_objects, counted = mean_over_processes(torch.stack([with_objects, counted]))
        weight = lambda_at(get_event_storage().iter, *options.ramp)
        get_event_storage().put_scalar("metric_learning/lambda", weight, smoothing_hint=False)
        return {
            "loss_embed": embed / torch.where(with_objects > 0, with_objects, 1),
            "loss_cls": cls / torch.where(counted > 0, counted, 1) * weight,
        }

    def _image_losses(
        self, embeddings: Tensor, logits: Tensor, gt: Instances
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the losses of an image with their counts.

        Args:
            embeddings: (D, h, w).
            logits: (T, C + 1, h, w).
            gt: the objects.

        Returns:
            The loss of the embeddings, 1 if there is an object and else 0, the sum of the class
            losses, and the number of these; float32.
        """
        options = self.loss_options
        labels = cell_labels(gt, self.head.stride, embeddings.shape[-2:])
        sample = draw_cells(
            labels, len(gt), options.pixels_per_instance, options.pixels_of_background
        )
        points = embeddings.float().permute(1, 2, 0).flatten(0, 1)
        weights = pair_weights(sample, kind=options.pair_weight, background=options.background)
        embed = embedding_loss(
            points[sample.cells], sample, weights, divide_by_cells=options.legacy_div_s
        )
        targets = class_targets(
            points.detach(),
            labels.flatten(),
            sample,
            gt.gt_classes,
            radii=self.radii,
            min_iou=options.cls_iou,
            num_classes=self.num_classes,
        )
        cells = logits.permute(2, 3, 0, 1).flatten(0, 1)[sample.cells]
        cls = class_loss_sum(cells, targets, sample.valid)
        counted = sample.valid.sum().float() * targets.shape[1]
        return embed, (weights.sum() > 0).float(), cls, counted

    @torch.no_grad()
    def inference(
        self, raw: DeepMetricOutputs, images: ImageList, batched_inputs: list[dict]
    ) -> list[Instances]:
        """Return the detections of each image at its original size; see the base class."""
        results = []
        stride = self.head.stride
        for found, input_hw, given in zip(
            self.detections(raw, images), images.image_sizes, batched_inputs, strict=True
        ):
            results.append(
                to_instances(
                    found,
                    stride=stride,
                    size_hw=_cells(input_hw, stride),
                    input_hw=tuple(input_hw),
                    output_hw=output_size(given, input_hw),
                    nearest=self.inference_options.masks.upsample == "nearest",
                    budget_mb=self.mask_budget_mb,
                    output=self.mask_output,
                )
            )
        return results

    @torch.no_grad()
    def detections(self, raw: DeepMetricOutputs, images: ImageList) -> list[Detections]:
        """Return the detections of each image in cells; those beside the image are left out."""
        results = []
        for n, size in enumerate(images.image_sizes):
            height, width = _cells(size, self.head.stride)
            results.append(
                detect(
                    raw.embeddings[n, :, :height, :width].float(),
                    raw.class_logits[n, :, :, :height, :width].float(),
                    radii=self.radii,
                    options=self.inference_options,
                    budget_mb=self.mask_budget_mb,
                )
            )
        return results


def _cells(size_hw: Sequence[int], stride: int) -> tuple[int, int]:
    """Return how many cells cover an image."""
    return -(-int(size_hw[0]) // stride), -(-int(size_hw[1]) // stride)


def _loss_options(cfg: CfgNode) -> LossOptions:
    node, last = cfg.MODEL.DEEP_METRIC, cfg.SOLVER.MAX_ITER
    return LossOptions(
        pixels_per_instance=node.PIXELS_PER_INSTANCE,
        pixels_of_background=node.PIXELS_OF_BACKGROUND or node.PIXELS_PER_INSTANCE,
        background=node.BACKGROUND,
        pair_weight=node.PAIR_WEIGHT,
        legacy_div_s=node.LEGACY_DIV_S,
        cls_iou=node.CLS_IOU,
        ramp=(node.LAMBDA_START * last, node.LAMBDA_END * last, node.LAMBDA),
    )


def _inference_options(cfg: CfgNode) -> InferenceOptions:
    node = cfg.MODEL.DEEP_METRIC
    return InferenceOptions(
        seeds=SeedRule(node.SEED_RULE, node.ALPHA, node.SIM_WEIGHT, node.NUM_SEEDS),
        masks=MaskOptions(
            min_cells=node.MIN_CELLS,
            parts=node.PARTS,
            mask_nms=node.MASK_NMS,
            merge=node.MASK_MERGE,
            merge_iou=node.MERGE_IOU,
            merge_thresh=node.MERGE_THRESH,
            upsample=node.UPSAMPLE,
        ),
        seed_min=node.SEED_MIN,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
