"""Implicit PointRend: each region has a point head of its own, whose parameters are predicted.

Shapes: R regions, P points of each, F channels of the features, E of the position's encoding, K
classes, D hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from instseg_ext.config import check_choice
from instseg_ext.layers.mask_ops import chunk_slices
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
from instseg_ext.methods.pointrend.mask_head import check_class_count, region_arguments
from instseg_ext.methods.pointrend.point_head import stacked_product
from instseg_ext.methods.pointrend.points import TrainPoints
from instseg_ext.methods.pointrend.subdivision import Subdivision
from instseg_ext.methods.pointrend.targets import point_labels, point_loss

__all__ = ["ImplicitPointHead", "ImplicitPointRendHead"]

_FREQUENCIES = 128
_REGIONS_AT_ONCE = 128  # whose predicted parameters are in memory: 145 MB with COCO's classes


class ImplicitPointHead(nn.Module):
    """A perceptron whose parameters are an input.

    It reads an encoding of the point's position in the box, sine and cosine at random frequencies
    that are stored with the weights, and the features at the point.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        fc_dim: int = 256,
        num_fc: int = 3,
        encode_positions: bool = True,
    ) -> None:
        """Work out the sizes and draw the frequencies.

        Args:
            in_channels: F; 0 if features are not read.
            num_classes: K; 1 for one mask for all classes.
            fc_dim: D.
            num_fc: layers before the prediction, at least one.
            encode_positions: whether to read positions.

        Raises:
            ValueError: naming the config key, if there is no input or no layer.
        """
        super().__init__()
        if num_fc < 1:
            raise ValueError(f"MODEL.POINT_HEAD.NUM_FC must be at least 1, not {num_fc}.")
        if not (in_channels or encode_positions):
            raise ValueError(
                "MODEL.IMPLICIT_POINTREND.IMAGE_FEATURE_ENABLED and POS_ENC_ENABLED cannot both be "
                "False: there would be nothing to read."
            )
        self.encode_positions = encode_positions
        if encode_positions:
            matrix = torch.randn(2, _FREQUENCIES)
            self.register_buffer("positional_encoding_gaussian_matrix", matrix)
        self.in_channels = in_channels + (2 * _FREQUENCIES if encode_positions else 0)
        self.num_classes = num_classes
        widths = [self.in_channels, *[fc_dim] * num_fc, num_classes]
        # (out, in) of each layer; the vector of parameters holds all weights, then all biases
        self.layers = tuple(zip(widths[1:], widths[:-1], strict=True))

    @property
    def num_params(self) -> int:
        """How many parameters the perceptron has."""
        return sum(rows * (columns + 1) for rows, columns in self.layers)

    def forward(
        self, fine: Tensor | None, points: Tensor, parameters: Tensor, classes: Tensor
    ) -> Tensor:
        """Predict one class at each point.

        Args:
            fine: (R, F, P) features; None if they are not read.
            points: (R, P, 2) relative to the boxes.
            parameters: (R, num_params).
            classes: (R,) int64, the class whose mask is asked for; of no effect if K is 1.

        Returns:
            (R, P) float32 logits.
        """
        weights, biases = self._split(parameters)
        if self.num_classes == 1:
            classes = torch.zeros_like(classes)
        regions = torch.arange(classes.shape[0], device=classes.device)
        weights[-1] = weights[-1][regions, classes][:, None]
        biases[-1] = biases[-1][regions, classes][:, None]
        x, side = fine, None
        if self.encode_positions:
            x, side = self._encode(points), fine
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            x = F.relu(stacked_product(weight, bias, x, side))
            side = None
        return stacked_product(weights[-1], biases[-1], x, side)[:, 0].float()

    def _split(self, parameters: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return views: the weights (R, out, in) and the biases (R, out, 1) of each layer."""
        sizes = [rows * columns for rows, columns in self.layers] + [x for x, _ in self.layers]
        parts = parameters.split(sizes, dim=1)
        num = len(self.layers)
        weights = [part.unflatten(1, x) for part, x in zip(parts[:num], self.layers, strict=True)]
        return weights, [part[:, :, None] for part in parts[num:]]

    def _encode(self, points: Tensor) -> Tensor:
        """Return (R, E, P) float32: sines, then cosines."""
        with torch.autocast(points.device.type, enabled=False):
            angles = (2 * points - 1) @ self.positional_encoding_gaussian_matrix.float()
            angles = 2 * math.pi * angles.transpose(1, 2)
            return torch.cat([angles.sin(), angles.cos()], dim=1)


@ROI_MASK_HEAD_REGISTRY.register()
class ImplicitPointRendHead(PointMaskHead):
    """Implicit PointRend for instances (arXiv:2104.06404).

    Computes what ``ImplicitPointRendMaskHead`` of detectron2's project computes, under the same
    config keys and parameter names. Training points are always uniform.
    """

    @configurable
    def __init__(
        self,
        *,
        point_head: ImplicitPointHead,
        parameter_head: CoarseHead,
        strides: Mapping[str, int],
        region_features: Sequence[str],
        pooler_resolution: int = 14,
        point_features: Sequence[str] = (),
        train_points: TrainPoints,
        subdivision: Subdivision,
        regularizer: float,
        chunk_mb: float = CHUNK_MB,
    ) -> None:
        """Keep the parts.

        Args:
            point_head: computes with the predicted parameters.
            parameter_head: gives (R, num_params).
            strides: see ``PointMaskHead``.
            region_features: names of the maps that the parameter head reads.
            pooler_resolution: side of the grid at which it reads each region.
            point_features: names of the maps that the point head reads; none if it reads positions
                alone.
            train_points: how training points are chosen; uniformly.
            subdivision: how masks are rendered.
            regularizer: weight of ``loss_l2``.
            chunk_mb: see ``PointMaskHead``.
        """
        super().__init__(
            strides=strides,
            region_features=region_features,
            point_features=point_features,
            pooler_resolution=pooler_resolution,
            chunk_mb=chunk_mb,
        )
        self.point_head = point_head
        self.parameter_head = parameter_head
        self.train_points = train_points
        self.subdivision = subdivision
        self.regularizer = regularizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the config key, if a value is not allowed.
        """
        node, implicit = cfg.MODEL.POINT_HEAD, cfg.MODEL.IMPLICIT_POINTREND
        regions = region_arguments(cfg, input_shape)
        check_choice("MODEL.POINT_HEAD.NAME", node.NAME, ("ImplicitPointHead",))
        num_classes = check_class_count(cfg)
        names = node.IN_FEATURES if implicit.IMAGE_FEATURE_ENABLED else ()
        key = "MODEL.POINT_HEAD.IN_FEATURES"
        point_head = ImplicitPointHead(
            total_channels(key, names, input_shape) if names else 0,
            num_classes=1 if node.CLS_AGNOSTIC_MASK else num_classes,
            fc_dim=node.FC_DIM,
            num_fc=node.NUM_FC,
            encode_positions=implicit.POS_ENC_ENABLED,
        )
        return {
            "point_head": point_head,
            "parameter_head": CoarseHead.from_config(cfg, input_shape, (point_head.num_params,)),
            "point_features": names,
            "train_points": TrainPoints(node.TRAIN_NUM_POINTS, "uniform"),
            "subdivision": Subdivision.full(node.SUBDIVISION_STEPS, node.SUBDIVISION_NUM_POINTS),
            "regularizer": implicit.PARAMS_L2_REGULARIZER,
            **regions,
        }

    @property
    def final_side(self) -> int:
        """Side of the predicted masks."""
        return self.subdivision.final_side

    def values_per_region(self, maps: Maps) -> int:
        """See ``PointMaskHead``."""
        channels = sum(maps[name].channels for name in self.region_features)
        hidden = 2 * self.point_head.layers[0][0]
        return max(
            channels * self.pooler_resolution**2,
            self.point_head.num_params
            + (self.point_head.in_channels + hidden) * self.subdivision.most_points,
        )

    def losses(self, images: Sequence[Maps], proposals: list[Instances]) -> dict[str, Tensor]:
        """Return ``loss_l2``, of the predicted parameters, and ``loss_mask_point``."""
        boxes = [proposal.proposal_boxes.tensor for proposal in proposals]
        classes = torch.cat([proposal.gt_classes for proposal in proposals])
        parameters = self.parameter_head(self.pool(images, boxes))
        # the mean of no parameters would not be a number
        squares = parameters.square().sum() / max(parameters.numel(), 1)
        points = self.train_points.draw(parameters)  # uniform: only R and the device are read
        fine = self._fine(images, places_of(boxes, points))
        logits = self.point_head(fine, points, parameters, classes)
        return {
            "loss_l2": self.regularizer * squares,
            "loss_mask_point": point_loss(logits, point_labels(proposals, points)),
        }

    def predict(self, maps: Maps, boxes: Tensor, classes: Tensor) -> Tensor:
        """See ``PointMaskHead``."""
        if torch.jit.is_tracing() or len(boxes) <= _REGIONS_AT_ONCE:
            return super().predict(maps, boxes, classes)
        masks = [
            super(ImplicitPointRendHead, self).predict(maps, boxes[chunk], classes[chunk])
            for chunk in chunk_slices(len(boxes), _REGIONS_AT_ONCE)
        ]
        return torch.cat(masks)

    def renderer(self, maps: Maps, boxes: Tensor, classes: Tensor) -> Callable[[slice], Tensor]:
        """See ``PointMaskHead``."""
        # of all regions at once: each use of the last layer reads its many weights
        parameters = self.parameter_head(self.pool([maps], [boxes]))

        def render(some: slice) -> Tensor:
            def logits_at(points: Tensor) -> Tensor:
                fine = self._fine([maps], [points_in_boxes(boxes[some], points)])
                return self.point_head(fine, points, parameters[some], classes[some])

            return self.subdivision.render(logits_at, boxes[some]).sigmoid()

        return render

    def _fine(self, images: Sequence[Maps], places: Sequence[Tensor]) -> Tensor | None:
        """Return the features (R, F, P) at points of images; None if they are not read."""
        if not self.point_features:
            return None
        return read_maps(images, self.point_features, places).mT
