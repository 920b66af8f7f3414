"""PointRend's mask head: a coarse mask, then single points where it is uncertain.

Shapes: N images, R regions of all images (R_i of image i), K classes, P points of each region, F
channels of the features read at points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Instances
from torch import Tensor, nn

from instseg_ext.config import check_choice
from instseg_ext.layers.mask_ops import chunk_slices, masks_per_chunk
from instseg_ext.layers.point_sample import (
    grid_points,
    points_in_boxes,
    sample_levels,
    sample_points,
)
from instseg_ext.methods.pointrend.coarse_head import CoarseHead
from instseg_ext.methods.pointrend.old_names import rename_old_names
from instseg_ext.methods.pointrend.point_head import StandardPointHead
from instseg_ext.methods.pointrend.points import TrainPoints, class_channel
from instseg_ext.methods.pointrend.subdivision import Subdivision
from instseg_ext.methods.pointrend.targets import point_labels, point_loss

__all__ = ["PointRendHead"]

_CHUNK_MB = 64


@ROI_MASK_HEAD_REGISTRY.register()
class PointRendHead(nn.Module):
    """PointRend for instances (arXiv:1912.08193), in place of a mask head with RoI pooling.

    Computes what ``PointRendMaskHead`` of detectron2's project computes, under the same config keys
    and parameter names. Of all classes only the predicted one is rendered, some regions at a time.
    """

    @configurable
    def __init__(
        self,
        *,
        point_head: StandardPointHead | None,
        coarse_head: CoarseHead,
        strides: Mapping[str, int],
        coarse_features: Sequence[str],
        point_features: Sequence[str] = (),
        pooler_resolution: int = 14,
        train_points: TrainPoints | None = None,
        subdivision: Subdivision | None = None,
        chunk_mb: float = _CHUNK_MB,
    ) -> None:
        """Keep the parts.

        Args:
            point_head: None leaves the coarse masks as they are.
            coarse_head: gives (R, K, side, side) logits.
            strides: image pixels per cell of the feature maps.
            coarse_features: names of the maps that the coarse head reads.
            point_features: names of the maps that the point head reads.
            pooler_resolution: side of the grid at which the coarse head reads each region.
            train_points: how training points are chosen; needed with a point head.
            subdivision: how masks are rendered; needed with a point head.
            chunk_mb: MiB that the values at the points of a chunk of regions may take in inference.
        """
        super().__init__()
        # before the coarse head: parameters are listed in detectron2's order
        if point_head is not None:
            self.point_head = point_head
        self.coarse_head = coarse_head
        self.strides = dict(strides)
        self.coarse_features = tuple(coarse_features)
        self.point_features = tuple(point_features)
        self.pooler_resolution = pooler_resolution
        self.point_head_on = point_head is not None
        self.train_points = train_points
        self.subdivision = subdivision
        self.chunk_mb = chunk_mb
        self.register_load_state_dict_pre_hook(rename_old_names)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the config key, if a value is not allowed.
        """
        node = cfg.MODEL.ROI_MASK_HEAD
        side, num_classes = node.OUTPUT_SIDE_RESOLUTION, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        arguments = {"point_head": None}
        if node.POINT_HEAD_ON:
            arguments = _point_arguments(cfg, input_shape)
        key = "MODEL.ROI_MASK_HEAD.IN_FEATURES"
        coarse_head = CoarseHead(
            ShapeSpec(
                channels=_channels(key, node.IN_FEATURES, input_shape),
                height=node.POOLER_RESOLUTION,
                width=node.POOLER_RESOLUTION,
            ),
            conv_dim=node.CONV_DIM,
            fc_dims=[node.FC_DIM] * node.NUM_FC,
            output_shape=(num_classes, side, side),
        )
        return {
            **arguments,
            "coarse_head": coarse_head,
            "strides": {name: shape.stride for name, shape in input_shape.items()},
            "coarse_features": node.IN_FEATURES,
            "pooler_resolution": node.POOLER_RESOLUTION,
        }

    def forward(
        self, features: Mapping[str, Tensor], instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """Return the losses, or the detections with masks.

        Args:
            features: maps (N, C, H, W) by name.
            instances: per image. Training: foreground regions with ``proposal_boxes``,
                ``gt_classes`` and ``gt_masks`` (bit masks). Inference: ``pred_boxes`` and
                ``pred_classes``.

        Returns:
            ``loss_mask`` and ``loss_mask_point``, or ``instances`` with ``pred_masks``, the
            probabilities (R_i, 1, S, S) of their classes; S does not depend on the detections.
        """
        features = {
            name: features[name].float()
            for name in dict.fromkeys((*self.coarse_features, *self.point_features))
        }
        if self.training:
            return self.losses(features, instances)
        for number, instance in enumerate(instances):
            instance.pred_masks = self.predict(
                _one_image(features, number), instance.pred_boxes.tensor, instance.pred_classes
            )
        return instances

    def losses(
        self, features: Mapping[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the losses; zeros with gradients of zeros if no image has a region.

        Args:
            features: see ``forward``, float32.
            proposals: see ``forward``.
        """
        boxes = [proposal.proposal_boxes.tensor for proposal in proposals]
        classes = torch.cat([proposal.gt_classes for proposal in proposals])
        num = classes.shape[0]
        grid = grid_points(self.pooler_resolution, device=classes.device).expand(num, -1, -1)
        coarse = self._coarse_logits(self._read_batch(features, self.coarse_features, boxes, grid))
        losses = {"loss_mask": mask_rcnn_loss(coarse, proposals)}
        if not self.point_head_on:
            return losses
        points = self.train_points.draw(class_channel(coarse.detach(), classes))
        fine = self._read_batch(features, self.point_features, boxes, points)
        logits = self.point_head(fine, sample_points(coarse, points), classes)
        losses["loss_mask_point"] = point_loss(logits, point_labels(proposals, points))
        return losses

    def predict(self, features: Mapping[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Return the masks of one image.

        Args:
            features: maps (1, C, H, W) by name, float32.
            boxes: (R_i, 4) XYXY, network-input pixels.
            classes: (R_i,) int64.

        Returns:
            (R_i, 1, S, S) float32 probabilities.
        """
        if torch.jit.is_tracing():
            # the number of chunks would become a constant
            return self._predict_chunk(features, boxes, classes)
        side = self.coarse_head.output_shape[-1]
        if self.point_head_on:
            side = self.subdivision.final_side
        masks = boxes.new_empty((len(boxes), 1, side, side), dtype=torch.float32)
        for chunk in chunk_slices(len(boxes), self._regions_per_chunk(features)):
            masks[chunk] = self._predict_chunk(features, boxes[chunk], classes[chunk])
        return masks

    def _regions_per_chunk(self, features: Mapping[str, Tensor]) -> int:
        """Return how many regions are predicted at once."""
        cells = sum(features[name].shape[1] for name in self.coarse_features)
        values = cells * self.pooler_resolution**2
        if self.point_head_on:
            channels = sum(features[name].shape[1] for name in self.point_features)
            channels += self.coarse_head.output_shape[0] + 2 * self.point_head.fc1.out_channels
            values = max(values, channels * self.subdivision.most_points)
        return masks_per_chunk(4 * values, self.chunk_mb)

    def _predict_chunk(
        self, features: Mapping[str, Tensor], boxes: Tensor, classes: Tensor
    ) -> Tensor:
        """See ``predict``."""
        grid = grid_points(self.pooler_resolution, device=boxes.device)
        coarse = self._coarse_logits(self._read(features, self.coarse_features, boxes, grid))
        if not self.point_head_on:
            return class_channel(coarse, classes).sigmoid()

        def logits_at(points: Tensor) -> Tensor:
            fine = self._read(features, self.point_features, boxes, points)
            return self.point_head(fine, sample_points(coarse, points), classes)

        return self.subdivision.render(logits_at, boxes).sigmoid()

    def _coarse_logits(self, pooled: Tensor) -> Tensor:
        """Return (R, K, side, side) for the values (R, C, S * S) at the points of a grid."""
        side = self.pooler_resolution
        return self.coarse_head(pooled.reshape(pooled.shape[0], pooled.shape[1], side, side))

    def _read(
        self, features: Mapping[str, Tensor], names: Sequence[str], boxes: Tensor, points: Tensor
    ) -> Tensor:
        """Read maps (1, C, H, W) of one image at points of its boxes; gives (R_i, F, P)."""
        return sample_levels(
            [features[name] for name in names],
            [self.strides[name] for name in names],
            points_in_boxes(boxes, points),
        )

    def _read_batch(
        self,
        features: Mapping[str, Tensor],
        names: Sequence[str],
        boxes: Sequence[Tensor],
        points: Tensor,
    ) -> Tensor:
        """Read maps (N, C, H, W) at points (R, P, 2) of the boxes of all images; (R, F, P)."""
        split = points.split([len(image_boxes) for image_boxes in boxes])
        return torch.cat(
            [
                self._read(_one_image(features, number), names, *pair)
                for number, pair in enumerate(zip(boxes, split, strict=True))
            ]
        )


def _one_image(features: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return the maps of one image, (1, C, H, W)."""
    return {name: level[number : number + 1] for name, level in features.items()}


def _channels(key: str, names: Sequence[str], shapes: Mapping[str, ShapeSpec]) -> int:
    """Return the channels of several maps together.

    Raises:
        ValueError: if the ROI heads do not hand a map on.
    """
    missing = [name for name in names if name not in shapes]
    if missing or not names:
        raise ValueError(
            f"{key} {list(names)} must name some of MODEL.ROI_HEADS.IN_FEATURES: "
            f"{', '.join(shapes)}."
        )
    return sum(shapes[name].channels for name in names)


def _point_arguments(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
    """Return the constructor arguments that concern the point head."""
    node, num_classes = cfg.MODEL.POINT_HEAD, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    check_choice("MODEL.POINT_HEAD.NAME", node.NAME, ("StandardPointHead",))
    if num_classes != node.NUM_CLASSES:
        raise ValueError(
            f"MODEL.POINT_HEAD.NUM_CLASSES {node.NUM_CLASSES} must equal "
            f"MODEL.ROI_HEADS.NUM_CLASSES {num_classes}."
        )
    point_head = StandardPointHead(
        _channels("MODEL.POINT_HEAD.IN_FEATURES", node.IN_FEATURES, input_shape),
        num_classes=num_classes,
        fc_dim=node.FC_DIM,
        num_fc=node.NUM_FC,
        class_agnostic=node.CLS_AGNOSTIC_MASK,
        coarse_each_layer=node.COARSE_PRED_EACH_LAYER,
    )
    return {
        "point_head": point_head,
        "point_features": node.IN_FEATURES,
        "train_points": TrainPoints(
            node.TRAIN_NUM_POINTS,
            node.TRAIN_SAMPLING,
            node.OVERSAMPLE_RATIO,
            node.IMPORTANCE_SAMPLE_RATIO,
        ),
        "subdivision": Subdivision.plan(
            cfg.MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION,
            node.SUBDIVISION_STEPS,
            node.SUBDIVISION_NUM_POINTS,
        ),
    }
