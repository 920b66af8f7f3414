"""PolarMask as a meta-architecture: glue between head, targets, losses and inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.layers.losses import sigmoid_focal_loss_sum
from instseg_ext.layers.reduce import mean_over_processes
from instseg_ext.methods.polarmask.assign import AssignOptions, Positives, assign, locations
from instseg_ext.methods.polarmask.centerness import (
    fcos_centerness,
    polar_centerness,
    soft_polar_centerness,
)
from instseg_ext.methods.polarmask.config import check_settings
from instseg_ext.methods.polarmask.head import PolarMaskHead, PolarMaskOutputs, distances
from instseg_ext.methods.polarmask.inference import Detections, Frame, InferenceOptions, detect
from instseg_ext.methods.polarmask.losses import (
    box_loss,
    centerness_loss,
    polar_iou_loss,
    smooth_l1_loss,
)
from instseg_ext.methods.polarmask.polygons import decode_polygons, ray_directions
from instseg_ext.methods.polarmask.rays import ray_targets
from instseg_ext.modeling.dense import (
    DenseInstanceSegmenter,
    dense_arguments,
    output_size,
    register_meta_architecture,
)
from instseg_ext.modeling.masks import polygons_to_instances
from instseg_ext.modeling.runtime import RuntimeOptions
from instseg_ext.structures.contours import Contours, trace_contours

__all__ = ["LossOptions", "PolarMask", "RayOptions", "Targets"]

_MASK_LOSSES = {"polar_iou": polar_iou_loss, "smooth_l1": smooth_l1_loss}
_CENTERNESS = ("polar", "soft", "fcos", "none")
# Floor of the sum of weights: all of them may be zero.
_EPS = 1e-6


@dataclass(frozen=True)
class RayOptions:
    """What rays are; see the config keys of the same names.

    Attributes:
        num_rays: R.
        origin: ``down`` or ``left``.
        target: ``bins`` or ``exact``.
    """

    num_rays: int = 36
    origin: str = "down"
    target: str = "bins"


@dataclass(frozen=True)
class LossOptions:
    """Settings of the losses; see the config keys of the same names."""

    centerness: str = "polar"
    mask_loss: str = "polar_iou"
    weight_cls: float = 1.0
    weight_box: float = 1.0
    weight_mask: float = 1.0
    weight_centerness: float = 1.0

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: naming the key.
        """
        check_choice("MODEL.POLARMASK.CENTERNESS", self.centerness, _CENTERNESS)
        check_choice("MODEL.POLARMASK.MASK_LOSS", self.mask_loss, _MASK_LOSSES)


class Targets(NamedTuple):
    """What a batch is trained towards; Q positive locations.

    Attributes:
        labels: (N, P) int64 class, K = background.
        positives: the positive locations, by their index in the N * P of the batch.
        rays: (Q, R) float32 lengths in pixels of the network input; None without the mask branch.
        centerness: (Q,) float32 in [0, 1]; ones without the quality branch.
    """

    labels: Tensor
    positives: Positives
    rays: Tensor | None
    centerness: Tensor


@register_meta_architecture
class PolarMask(DenseInstanceSegmenter):
    """PolarMask (arXiv:1909.13226): a class, a box and the lengths of rays for every location.

    A mask is the polygon through the tips of the rays. Without rays it is FCOS (arXiv:1904.01355).

    Note:
        Group normalisation sees the padding of a batch: an image's result depends on it.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: PolarMaskHead,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        assign_options: AssignOptions,
        stretch_size: tuple[int, int] = (0, 0),
        stretch_in_training: bool = True,
        ray_options: RayOptions | None = None,
        loss_options: LossOptions | None = None,
        inference_options: InferenceOptions | None = None,
        coordinates: str = "indices",
        runtime: RuntimeOptions | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            backbone: see the base class, as ``pixel_mean``, ``pixel_std``, the stretch and
                ``runtime``.
            head: built for the backbone.
            num_classes: K.
            pixel_mean: see the base class.
            pixel_std: see the base class.
            assign_options: which locations are positive.
            stretch_size: see the base class.
            stretch_in_training: see the base class.
            ray_options: number, order and targets of the rays.
            loss_options: kinds and weights of the losses.
            inference_options: thresholds.
            coordinates: how results are brought to the size of the image, see ``Frame``.
            runtime: see the base class.
        """
        super().__init__(
            backbone=backbone,
            head=head,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            stretch_size=stretch_size,
            stretch_in_training=stretch_in_training,
            runtime=runtime,
        )
        self.num_classes = num_classes
        self.assign_options = assign_options
        self.ray_options = ray_options or RayOptions()
        self.loss_options = loss_options or LossOptions()
        self.inference_options = inference_options or InferenceOptions()
        self.coordinates = check_choice(
            "MODEL.POLARMASK.COORDINATES", coordinates, ("indices", "areas")
        )
        self.register_buffer(
            "directions",
            ray_directions(self.ray_options.num_rays, self.ray_options.origin),
            persistent=False,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.POLARMASK``; see `configurable`.

        Raises:
            ValueError: if the settings contradict each other.
        """
        node = cfg.MODEL.POLARMASK
        check_settings(node)
        arguments = dense_arguments(cfg, random_heights=True)
        shapes = arguments["backbone"].output_shape()
        head = PolarMaskHead(
            shapes,
            in_features=node.IN_FEATURES,
            num_classes=node.NUM_CLASSES,
            num_convs=node.NUM_CONVS,
            width=node.WIDTH,
            norm=node.NORM,
            num_rays=node.NUM_RAYS,
            deform=node.DEFORM,
            prior_prob=node.PRIOR_PROB,
            init_length=node.INIT_LENGTH,
            with_box=node.WITH_BOX,
            with_mask=node.WITH_MASK,
            with_centerness=node.CENTERNESS != "none",
        )
        return {
            **arguments,
            "head": head,
            "num_classes": node.NUM_CLASSES,
            "assign_options": AssignOptions(
                strides=tuple(shapes[name].stride for name in node.IN_FEATURES),
                size_ranges=tuple(map(float, node.SIZE_RANGES)),
                center=node.CENTER,
                radius=node.CENTER_RADIUS,
            ),
            "ray_options": RayOptions(
                num_rays=node.NUM_RAYS, origin=node.RAY_ORIGIN, target=node.RAY_TARGET
            ),
            "loss_options": LossOptions(
                centerness=node.CENTERNESS,
                mask_loss=node.MASK_LOSS,
                weight_cls=node.LOSS_WEIGHT_CLS,
                weight_box=node.LOSS_WEIGHT_BOX,
                weight_mask=node.LOSS_WEIGHT_MASK,
                weight_centerness=node.LOSS_WEIGHT_CENTERNESS,
            ),
            "inference_options": InferenceOptions(
                score_thresh=node.SCORE_THRESH,
                centerness_bias=node.CENTERNESS_BIAS,
                nms_pre=node.NMS_PRE,
                nms_thresh=node.NMS_THRESH,
                nms_on=node.NMS_ON,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            ),
            "coordinates": node.COORDINATES,
        }

    @torch.no_grad()
    def targets(
        self, raw: PolarMaskOutputs, images: ImageList, gt_instances: list[Instances]
    ) -> Targets:
        """Find the positive locations of a batch and what they are trained towards.

        Args:
            raw: tells the sizes of the levels.
            images: the batch; not read.
            gt_instances: per image ``gt_boxes`` (inclusive), ``gt_classes``, and ``gt_contours``
                with ``gt_centers``, or else ``gt_masks``, from which these are traced.
        """
        gts = [self._with_contours(gt) for gt in gt_instances]
        positives = assign(
            raw.level_sizes,
            [gt.gt_boxes.tensor for gt in gts],
            [gt.gt_centers for gt in gts] if self.assign_options.center == "mass" else None,
            self.assign_options,
        )
        labels = raw.class_logits.new_full(
            raw.class_logits.shape[:2], self.num_classes, dtype=torch.int64
        )
        classes = torch.cat([gt.gt_classes for gt in gts])
        labels.view(-1)[positives.index] = classes[positives.instance]
        rays = None
        if raw.ray_logs is not None:
            rays = ray_targets(
                positives.points,
                Contours.cat([gt.gt_contours for gt in gts]),
                positives.instance,
                num_rays=self.ray_options.num_rays,
                mode=self.ray_options.target,
                origin=self.ray_options.origin,
            )
        return Targets(labels, positives, rays, self._centerness(positives, rays))

    def _with_contours(self, gt: Instances) -> Instances:
        """Trace the contours of an image whose loader has not done it."""
        wanted = self.head.ray_pred is not None or self.assign_options.center == "mass"
        if gt.has("gt_contours") or not wanted:
            return gt
        contours, centers, found = trace_contours(gt.gt_masks.tensor)
        traced = Instances(gt.image_size)
        traced.gt_boxes, traced.gt_classes = gt.gt_boxes, gt.gt_classes
        traced.gt_contours, traced.gt_centers = contours, centers
        return traced[found]

    def _centerness(self, positives: Positives, rays: Tensor | None) -> Tensor:
        kind = self.loss_options.centerness
        if kind == "none":
            return torch.ones_like(positives.boxes[:, 0])
        if kind == "fcos":
            return fcos_centerness(positives.boxes)
        return polar_centerness(rays) if kind == "polar" else soft_polar_centerness(rays)

    def losses(
        self, raw: PolarMaskOutputs, images: ImageList, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the weighted losses; see the base class.

        ``loss_cls`` is divided by the positive locations plus the images, box and mask loss are
        averages weighted by the centerness, ``loss_centerness`` is one over the positive locations.
        """
        options = self.loss_options
        targets = self.targets(raw, images, gt_instances)
        index, weight = targets.positives.index, targets.centerness
        per_class, total, count = self._normalizers(weight, len(gt_instances))
        losses = {
            "loss_cls": options.weight_cls
            * sigmoid_focal_loss_sum(raw.class_logits.flatten(0, 1), targets.labels.flatten())
            / per_class
        }
        if raw.box_logs is not None:
            pred = distances(raw.box_logs.flatten(0, 1)[index])
            loss = box_loss(pred, targets.positives.boxes, weight) / total
            losses["loss_box"] = options.weight_box * loss
        if raw.ray_logs is not None:
            pred = distances(raw.ray_logs.flatten(0, 1)[index])
            loss = _MASK_LOSSES[options.mask_loss](pred, targets.rays, weight) / total
            losses["loss_mask"] = options.weight_mask * loss
        if raw.ctr_logits is not None:
            loss = centerness_loss(raw.ctr_logits.flatten()[index], weight) / count
            losses["loss_centerness"] = options.weight_centerness * loss
        return losses

    def _normalizers(self, weight: Tensor, num_images: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the divisors of class, of box and mask, and of centerness loss."""
        count = weight.new_tensor(float(len(weight)))
        sums = torch.stack([count + num_images, weight.sum(), count])
        fewest = 1.0
        if self.loss_normalizer == "global":
            # One positive location in all processes together is this much in the mean.
            sums, fewest = mean_over_processes(sums), 1.0 / comm.get_world_size()
        return sums[0], sums[1].clamp(min=_EPS), sums[2].clamp(min=fewest)

    @torch.no_grad()
    def inference(
        self, raw: PolarMaskOutputs, images: ImageList, batched_inputs: list[dict]
    ) -> list[Instances]:
        """Return the detections of each image at its original size; see the base class.

        With masks they carry ``pred_polygons``, (D, R, 2) float32 pixel indices (x, y) of the
        original image.
        """
        frames = [
            Frame(size, output_size(given, size), self.coordinates)
            for given, size in zip(batched_inputs, images.image_sizes, strict=True)
        ]
        return [
            self._instances(found, frame)
            for found, frame in zip(self.detections(raw, frames), frames, strict=True)
        ]

    @torch.no_grad()
    def detections(self, raw: PolarMaskOutputs, frames: Sequence[Frame]) -> list[Detections]:
        """Select the detections of each image.

        Args:
            raw: what ``head`` returned.
            frames: sizes of each image.
        """
        points = locations(raw.level_sizes, self.assign_options.strides, self.device)
        counts = tuple(height * width for height, width in raw.level_sizes)

        def of_image(x: Tensor | None, n: int) -> Tensor | None:
            return None if x is None else x[n]

        return [
            detect(
                *(of_image(x, n) for x in raw[:4]),
                points=points,
                level_counts=counts,
                directions=self.directions,
                frame=frame,
                options=self.inference_options,
            )
            for n, frame in enumerate(frames)
        ]

    def _instances(self, found: Detections, frame: Frame) -> Instances:
        """Bring detections to the size of the results, with masks if there are rays."""
        boxes = frame.boxes(found.boxes)
        if found.distances is None:
            instances = Instances(frame.output_hw)
            instances.pred_boxes = Boxes(boxes)
            instances.scores, instances.pred_classes = found.scores, found.classes
            return instances
        polygons = decode_polygons(found.points, found.distances, self.directions, frame.input_hw)
        return polygons_to_instances(
            frame.polygons(polygons),
            boxes,
            found.scores,
            found.classes,
            image_size=frame.output_hw,
            output=self.mask_output,
            nearest=frame.coordinates == "areas",
        )
