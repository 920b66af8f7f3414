"""PointRend's mask head: a coarse mask, then single points where it is uncertain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import Instances
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.layers.point_sample import points_in_boxes
from instseg_ext.methods.pointrend.base import (
    CHUNK_MB,
    Maps,
    PointMaskHead,
    places_of,
    read_maps,
    total_channels,
)
from instseg_ext.methods.pointrend.coarse_head import CoarseHead
from instseg_ext.methods.pointrend.old_names import rename_old_names
from instseg_ext.methods.pointrend.point_head import StandardPointHead
from instseg_ext.methods.pointrend.points import TrainPoints, class_channel
from instseg_ext.methods.pointrend.subdivision import Subdivision
from instseg_ext.methods.pointrend.targets import point_labels, point_loss

__all__ = ["PointRendHead", "check_class_count", "region_arguments"]


@ROI_MASK_HEAD_REGISTRY.register()
class PointRendHead(PointMaskHead):
    """PointRend for instances (arXiv:1912.08193).

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
        region_features: Sequence[str],
        pooler_resolution: int = 14,
        point_features: Sequence[str] = (),
        train_points: TrainPoints | None = None,
        subdivision: Subdivision | None = None,
        chunk_mb: float = CHUNK_MB,
    ) -> None:
        """Keep the parts.

        Args:
            point_head: None leaves the coarse masks as they are.
            coarse_head: gives (R, K, side, side) logits.
            strides: see ``PointMaskHead``.
            region_features: names of the maps that the coarse head reads.
            pooler_resolution: side of the grid at which the coarse head reads each region.
            point_features: names of the maps that the point head reads.
            train_points: how training points are chosen; needed with a point head.
            subdivision: how masks are rendered; needed with a point head.
            chunk_mb: see ``PointMaskHead``.
        """
        super().__init__(
            strides=strides,
            region_features=region_features,
            point_features=point_features,
            pooler_resolution=pooler_resolution,
            chunk_mb=chunk_mb,
        )
        self.point_head_on = point_head is not None
        # before the coarse head: parameters are listed in detectron2's order
        if point_head is not None:
            self.point_head = point_head
        self.coarse_head = coarse_head
        self.train_points = train_points
        self.subdivision = subdivision
        self.register_load_state_dict_pre_hook(rename_old_names)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the config key, if a value is not allowed.
        """
        node = cfg.MODEL.ROI_MASK_HEAD
        regions = region_arguments(cfg, input_shape)
        # the point head before the coarse head: random numbers are drawn in detectron2's order
        arguments = {"point_head": None}
        if node.POINT_HEAD_ON:
            arguments = _point_arguments(cfg, input_shape)
        side = node.OUTPUT_SIDE_RESOLUTION
        shape = (cfg.MODEL.ROI_HEADS.NUM_CLASSES, side, side)
        coarse_head = CoarseHead.from_config(cfg, input_shape, shape)
        return {**arguments, "coarse_head": coarse_head, **regions}

    def rename_old_names(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename in a state dict of the whole model; see the module ``old_names``.

        Args:
            state_dict: changed in place.
            prefix: in front of the names of this head.
        """
        rename_old_names(self, state_dict, prefix.removesuffix("mask_head."))

    @property
    def final_side(self) -> int:
        """Side of the predicted masks."""
        if self.point_head_on:
            return self.subdivision.final_side
        return self.coarse_head.output_shape[-1]

    def values_per_region(self, maps: Maps) -> int:
        """See ``PointMaskHead``."""
        pooled = sum(maps[name].channels for name in self.region_features)
        pooled *= self.pooler_resolution**2
        if not self.point_head_on:
            return pooled
        num_classes, side, _ = self.coarse_head.output_shape
        channels = sum(maps[name].channels for name in self.point_features)
        channels += min(num_classes, side**2) + 2 * self.point_head.fc1.out_channels
        return max(pooled, channels * self.subdivision.most_points)

    def losses(self, images: Sequence[Maps], proposals: list[Instances]) -> dict[str, Tensor]:
        """Return ``loss_mask`` and, with a point head, ``loss_mask_point``; see the base class."""
        boxes = [proposal.proposal_boxes.tensor for proposal in proposals]
        coarse = self.coarse_head(self.pool(images, boxes))
        losses = {"loss_mask": mask_rcnn_loss(coarse, proposals)}
        if not self.point_head_on:
            return losses
        classes = torch.cat([proposal.gt_classes for proposal in proposals])
        points = self.train_points.draw(class_channel(coarse.detach(), classes))
        fine = read_maps(images, self.point_features, places_of(boxes, points))
        first = F.linear(fine, self.point_head.first_weight)
        terms = self.point_head.coarse_terms(coarse, classes)
        logits = self.point_head(first, points, terms, classes)
        losses["loss_mask_point"] = point_loss(logits, point_labels(proposals, points))
        return losses

    def renderer(self, maps: Maps, boxes: Tensor, classes: Tensor) -> Callable[[slice], Tensor]:
        """See ``PointMaskHead``."""
        read = self._first_layer(maps, boxes.shape[0]) if self.point_head_on else None

        def render(some: slice) -> Tensor:
            coarse = self.coarse_head(self.pool([maps], [boxes[some]]))
            if read is None:
                return class_channel(coarse, classes[some]).sigmoid()
            terms = self.point_head.coarse_terms(coarse, classes[some])

            def logits_at(points: Tensor) -> Tensor:
                first = read(points_in_boxes(boxes[some], points))
                return self.point_head(first, points, terms, classes[some])

            return self.subdivision.render(logits_at, boxes[some]).sigmoid()

        return render

    def _first_layer(self, maps: Maps, num_regions: int) -> Callable[[Tensor], Tensor]:
        """Return what gives at points (R', P, 2) of the image the features, times their weights.

        The weights are applied to the maps if these have fewer cells than there will be points.
        """
        weight, names = self.point_head.first_weight, self.point_features
        num_points = num_regions * self.subdivision.total_points
        cells = sum(maps[name].rows.shape[0] for name in names)
        # a traced model must do for any number of regions
        if torch.jit.is_tracing() or num_points < cells:
            return lambda places: F.linear(read_maps([maps], names, [places]), weight)
        parts = weight.split([maps[name].channels for name in names], dim=1)
        products = [maps[name].times(part) for name, part in zip(names, parts, strict=True)]

        def read(places: Tensor) -> Tensor:
            first, *others = [product.at(places) for product in products]
            return sum(others, start=first)

        return read


def region_arguments(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
    """Return the constructor arguments that say how a region as a whole is read.

    Raises:
        ValueError: if the ROI heads pool, and therefore hand no maps on.
    """
    node = cfg.MODEL.ROI_MASK_HEAD
    if node.POOLER_TYPE:
        raise ValueError(
            f"{node.NAME} reads the feature maps itself: set MODEL.ROI_MASK_HEAD.POOLER_TYPE to "
            f'"", not {node.POOLER_TYPE!r}.'
        )
    return {
        "strides": {name: shape.stride for name, shape in input_shape.items()},
        "region_features": node.IN_FEATURES,
        "pooler_resolution": node.POOLER_RESOLUTION,
    }


def check_class_count(cfg: CfgNode) -> int:
    """Return the number of foreground classes.

    Raises:
        ValueError: if box head and point head have different numbers.
    """
    of_points, of_boxes = cfg.MODEL.POINT_HEAD.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if of_points != of_boxes:
        raise ValueError(
            f"MODEL.POINT_HEAD.NUM_CLASSES {of_points} must equal MODEL.ROI_HEADS.NUM_CLASSES "
            f"{of_boxes}."
        )
    return of_boxes


def _point_arguments(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
    """Return the constructor arguments that concern the point head."""
    node = cfg.MODEL.POINT_HEAD
    check_choice("MODEL.POINT_HEAD.NAME", node.NAME, ("StandardPointHead",))
    num_classes = check_class_count(cfg)
    point_head = StandardPointHead(
        total_channels("MODEL.POINT_HEAD.IN_FEATURES", node.IN_FEATURES, input_shape),
        num_classes=num_classes,
        fc_dim=node.FC_DIM,
        num_fc=node.NUM_FC,
        class_agnostic=node.CLS_AGNOSTIC_MASK,
        coarse_each_layer=node.COARSE_PRED_EACH_LAYER,
    )
    return {
        "point_head": point_head,
        "point_features": node.IN_FEATURES,
        "train_points": TrainPoints.from_config(cfg),
        "subdivision": Subdivision.plan(
            cfg.MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION,
            node.SUBDIVISION_STEPS,
            node.SUBDIVISION_NUM_POINTS,
        ),
    }
