"""YOLACT as a meta-architecture: glue between head, targets, losses and inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.layers.reduce import mean_over_processes
from instseg_ext.methods.yolact.anchors import AnchorGrid
from instseg_ext.methods.yolact.assembly import cropped_masks
from instseg_ext.methods.yolact.batch_norm import batch_norms, keep_batch_norms
from instseg_ext.methods.yolact.box_coding import encode
from instseg_ext.methods.yolact.head import YOLACTHead, YOLACTOutputs
from instseg_ext.methods.yolact.inference import Detections, InferenceOptions, detect
from instseg_ext.methods.yolact.losses import (
    box_loss,
    class_loss,
    mask_iou_loss,
    mask_loss,
    pair_masks,
    semantic_loss,
)
from instseg_ext.methods.yolact.matching import AnchorTargets, MatchOptions, match_anchors
from instseg_ext.methods.yolact.nms import NMSOptions
from instseg_ext.modeling.dense import (
    DenseInstanceSegmenter,
    dense_arguments,
    output_size,
    register_meta_architecture,
)
from instseg_ext.modeling.masks import Resize, masks_to_instances
from instseg_ext.modeling.runtime import RuntimeOptions

__all__ = ["YOLACT", "LossOptions"]


@dataclass(frozen=True)
class LossOptions:
    """Settings of the losses; see the config keys of the same names."""

    weight_cls: float = 1.0
    weight_box: float = 1.5
    weight_mask: float = 6.125
    weight_semantic: float = 1.0
    weight_mask_iou: float = 25.0
    neg_pos_ratio: int = 3
    masks_to_train: int = 100
    mask_iou_min_area: float = 25.0


@register_meta_architecture
class YOLACT(DenseInstanceSegmenter):
    """YOLACT and YOLACT++ (arXiv:1904.02689, arXiv:1912.06218).

    Anchors predict a class, a box and coefficients; a mask is the combination of the image's
    prototypes by these coefficients, cut to the box.

    Note:
        Nothing is padded: all images of a batch are stretched to one size.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: YOLACTHead,
        anchor_grid: AnchorGrid,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        stretch_size: tuple[int, int],
        match_options: MatchOptions | None = None,
        loss_options: LossOptions | None = None,
        inference_options: InferenceOptions | None = None,
        freeze_bn: bool = False,
        runtime: RuntimeOptions | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            backbone: see the base class, as ``pixel_mean``, ``pixel_std`` and ``runtime``.
            head: built for the backbone and ``anchor_grid``.
            anchor_grid: anchors of all levels.
            num_classes: foreground classes.
            pixel_mean: see the base class.
            pixel_std: see the base class.
            stretch_size: (height, width) of the network input.
            match_options: thresholds of the assignment.
            loss_options: loss weights and limits.
            inference_options: thresholds.
            freeze_bn: keep statistics, scale and shift of the backbone's batch norms in training.
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
        self.anchor_grid = anchor_grid
        self.num_classes = num_classes
        self.match_options = match_options or MatchOptions()
        self.loss_options = loss_options or LossOptions()
        self.inference_options = inference_options or InferenceOptions()
        self.freeze_bn = freeze_bn
        if freeze_bn:
            for norm in batch_norms(backbone):
                norm.requires_grad_(False)
            self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.YOLACT``; see `configurable`.

        Raises:
            ValueError: if the network input has no fixed size, or ``IN_FEATURES`` names an unknown
                level or another number of them than ``ANCHOR_SCALES`` has.
        """
        node = cfg.MODEL.YOLACT
        if min(cfg.INSTSEG.STRETCH) <= 0:
            raise ValueError(
                "INSTSEG.STRETCH must be the [height, width] of YOLACT's input, both positive, not "
                f"{list(cfg.INSTSEG.STRETCH)}."
            )
        arguments = dense_arguments(cfg)
        anchor_grid = AnchorGrid(
            scales=tuple(tuple(map(float, level)) for level in node.ANCHOR_SCALES),
            ratios=tuple(map(float, node.ASPECT_RATIOS)),
            square=node.SQUARE_ANCHORS,
        )
        if len(node.IN_FEATURES) != len(anchor_grid.scales):
            raise ValueError(
                f"MODEL.YOLACT.IN_FEATURES has {len(node.IN_FEATURES)} entries but ANCHOR_SCALES "
                f"has {len(anchor_grid.scales)}."
            )
        shapes = arguments["backbone"].output_shape()
        for name in node.IN_FEATURES:
            check_choice("MODEL.YOLACT.IN_FEATURES", name, shapes)
        head = YOLACTHead(
            shapes,
            in_features=node.IN_FEATURES,
            num_classes=node.NUM_CLASSES,
            num_anchors=anchor_grid.num_per_cell,
            num_protos=node.NUM_PROTOS,
            width=node.WIDTH,
            mask_iou=node.MASK_IOU.ENABLED,
        )
        return {
            **arguments,
            "head": head,
            "anchor_grid": anchor_grid,
            "num_classes": node.NUM_CLASSES,
            "match_options": MatchOptions(
                pos_iou=node.POS_IOU, neg_iou=node.NEG_IOU, crowd_ioa=node.CROWD_IOA
            ),
            "loss_options": LossOptions(
                weight_cls=node.LOSS_WEIGHT_CLS,
                weight_box=node.LOSS_WEIGHT_BOX,
                weight_mask=node.LOSS_WEIGHT_MASK,
                weight_semantic=node.LOSS_WEIGHT_SEMANTIC,
                weight_mask_iou=node.LOSS_WEIGHT_MASK_IOU,
                neg_pos_ratio=node.NEG_POS_RATIO,
                masks_to_train=node.MASKS_TO_TRAIN,
                mask_iou_min_area=node.MASK_IOU.MIN_AREA,
            ),
            "inference_options": InferenceOptions(
                score_thresh=node.SCORE_THRESH,
                mask_thresh=node.MASK_THRESH,
                nms=NMSOptions(
                    kind=node.NMS.TYPE,
                    threshold=node.NMS.THRESH,
                    topk=node.NMS.TOPK,
                    second_threshold=node.NMS.SECOND_THRESHOLD,
                    max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
                ),
            ),
            "freeze_bn": keep_batch_norms(cfg, arguments["backbone"]),
        }

    def train(self, mode: bool = True) -> YOLACT:
        """Set the mode; frozen batch norms keep their statistics in training, too."""
        super().train(mode)
        if mode and self.freeze_bn:
            for norm in batch_norms(self.backbone):
                norm.eval()
        return self

    def anchors(self, raw: YOLACTOutputs) -> Tensor:
        """Return the (P, 4) anchors of an image: centre and size, normalised by the input."""
        return self.anchor_grid.anchors(raw.level_sizes, self.stretch_size, self.device)

    def targets(
        self, raw: YOLACTOutputs, images: ImageList, gt_instances: list[Instances]
    ) -> list[AnchorTargets]:
        """Assign the objects of each image to anchors.

        Args:
            raw: tells the sizes of the levels.
            images: the batch; not read.
            gt_instances: per image ``gt_boxes``, ``gt_classes``, and ``gt_is_crowd`` if there can
                be crowds.
        """
        anchors = self.anchors(raw)
        targets = []
        for gt in gt_instances:
            boxes, crowd = _normalised_boxes(gt), _is_crowd(gt)
            targets.append(
                match_anchors(
                    anchors,
                    boxes[~crowd],
                    gt.gt_classes[~crowd],
                    boxes[crowd],
                    num_classes=self.num_classes,
                    options=self.match_options,
                )
            )
        return targets

    def losses(
        self, raw: YOLACTOutputs, images: ImageList, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the weighted losses (Sec. 3.3 and 5 of arXiv:1904.02689); see the base class.

        ``loss_cls``, ``loss_box``, ``loss_mask`` and ``loss_mask_iou`` are divided by the positive
        anchors of the batch.
        """
        options = self.loss_options
        targets = self.targets(raw, images, gt_instances)
        labels = torch.stack([target.labels for target in targets])
        positive = (labels >= 0) & (labels < self.num_classes)
        normalizer = self._normalizer(positive)
        objects = [gt[~_is_crowd(gt)] for gt in gt_instances]
        anchors = self.anchors(raw)

        wanted, pairs = [], []
        for n, (target, gt) in enumerate(zip(targets, objects, strict=True)):
            boxes, matched = _normalised_boxes(gt), target.matched[positive[n]]
            wanted.append(encode(boxes[matched], anchors[positive[n]]))
            pairs.append(
                pair_masks(
                    raw.prototypes[n],
                    raw.coefficients[n, positive[n]],
                    matched,
                    boxes,
                    gt.gt_classes,
                    gt.gt_masks.tensor,
                    max_masks=options.masks_to_train,
                )
            )
        losses = {
            "loss_cls": options.weight_cls
            * class_loss(
                raw.class_logits,
                labels,
                neg_pos_ratio=options.neg_pos_ratio,
                normalizer=normalizer,
            ),
            "loss_box": options.weight_box
            * box_loss(raw.box_deltas[positive], torch.cat(wanted), normalizer=normalizer),
            "loss_mask": options.weight_mask * mask_loss(pairs, normalizer=normalizer),
            "loss_semantic": options.weight_semantic
            * semantic_loss(
                raw.semantic_logits,
                [gt.gt_masks.tensor for gt in objects],
                [gt.gt_classes for gt in objects],
            ),
        }
        if self.head.mask_iou is not None:
            with self.precision():
                loss = mask_iou_loss(
                    self.head.mask_iou,
                    pairs,
                    min_area=options.mask_iou_min_area,
                    normalizer=normalizer,
                )
            losses["loss_mask_iou"] = options.weight_mask_iou * loss
        return losses

    def _normalizer(self, positive: Tensor) -> Tensor:
        """Return the number of positive anchors, at least 1, of this process or averaged."""
        count, fewest = positive.sum().float(), 1.0
        if self.loss_normalizer == "global":
            # One positive anchor in all processes together is this much in the mean.
            count, fewest = mean_over_processes(count), 1.0 / comm.get_world_size()
        return count.clamp(min=fewest)

    @torch.no_grad()
    def inference(
        self, raw: YOLACTOutputs, images: ImageList, batched_inputs: list[dict]
    ) -> list[Instances]:
        """Return the detections of each image at its original size; see the base class.

        With mask scoring they carry ``mask_scores``, the class probability times the predicted IoU.
        It ranks masks, while ``scores`` ranks boxes and orders the detections.
        """
        return [
            self._instances(found, prototypes, output_size(given, size))
            for found, prototypes, size, given in zip(
                self.detections(raw),
                raw.prototypes,
                images.image_sizes,
                batched_inputs,
                strict=True,
            )
        ]

    @torch.no_grad()
    def detections(self, raw: YOLACTOutputs) -> list[Detections]:
        """Select the detections of each image, boxes normalised by the network input."""
        anchors = self.anchors(raw)
        return [
            detect(*parts, anchors, input_hw=self.stretch_size, options=self.inference_options)
            for parts in zip(raw.class_logits, raw.box_deltas, raw.coefficients, strict=True)
        ]

    def _instances(
        self, found: Detections, prototypes: Tensor, size_hw: tuple[int, int]
    ) -> Instances:
        """Make the masks of one image's detections and bring them to the size of the image."""
        height, width = size_hw
        # Cut before they are scaled: finite boxes stay finite, and ``Boxes.clip`` would check that
        # at the price of a wait for the device.
        boxes = Boxes(
            found.boxes.clamp(0, 1) * found.boxes.new_tensor([width, height, width, height])
        )
        inside = boxes.nonempty()
        # Masks are cut with the box as predicted, not as clipped.
        masks = cropped_masks(prototypes, found.coefficients[inside], found.boxes[inside])
        classes, scores = found.classes[inside], found.scores[inside]
        instances = masks_to_instances(
            masks,
            [Resize(size_hw)],
            scores,
            classes,
            image_size=size_hw,
            threshold=self.inference_options.mask_thresh,
            budget_mb=self.mask_budget_mb,
            output=self.mask_output,
            boxes=boxes.tensor[inside],
        )
        if self.head.mask_iou is not None:
            with self.precision():
                quality = self.head.mask_iou(masks[:, None]).float()
            instances.mask_scores = scores * quality.gather(1, classes[:, None]).squeeze(1)
        return instances


def _is_crowd(gt: Instances) -> Tensor:
    """Return (M,) bool; nothing is a crowd where the loader does not say."""
    if gt.has("gt_is_crowd"):
        return gt.gt_is_crowd
    return torch.zeros(len(gt), dtype=torch.bool, device=gt.gt_classes.device)


def _normalised_boxes(gt: Instances) -> Tensor:
    """Return the (M, 4) boxes divided by the size of the network input."""
    height, width = gt.image_size
    return gt.gt_boxes.tensor / gt.gt_boxes.tensor.new_tensor([width, height, width, height])
