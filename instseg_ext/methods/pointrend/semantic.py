"""PointRend's semantic head: a coarse label map, then single points where it is uncertain.

Shapes: N images, K classes, H x W cells, P points of each image, F channels of all maps that are
read at points. Points are (x, y) relative to the whole padded image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from instseg_ext.config import check_choice
from instseg_ext.layers.point_sample import sample_points
from instseg_ext.layers.reduce import mean_over_processes
from instseg_ext.methods.pointrend.base import total_channels
from instseg_ext.methods.pointrend.point_head import StandardPointHead
from instseg_ext.methods.pointrend.points import TrainPoints, uncertain_cells
from instseg_ext.methods.pointrend.subdivision import check_subdivision
from instseg_ext.modeling.runtime import RuntimeOptions

__all__ = ["PointRendSemanticHead", "point_labels", "top_margin"]


@SEM_SEG_HEADS_REGISTRY.register()
class PointRendSemanticHead(nn.Module):
    """PointRend for semantic segmentation (Sec. 4.2 of arXiv:1912.08193).

    Computes what ``PointRendSemSegHead`` of detectron2's project computes, under the same config
    keys and parameter names.

    Note:
        In inference that head puts several maps that the point head reads one behind the other in
        the axis of images, and fails; here they are channels, as in its training.
    """

    @configurable
    def __init__(
        self,
        *,
        coarse_sem_seg_head: nn.Module,
        point_head: StandardPointHead,
        point_features: Sequence[str],
        train_points: TrainPoints,
        steps: int,
        num_points: int,
        coarse_stride: int,
        ignore_value: int,
        loss_normalizer: str = "local",
    ) -> None:
        """Keep the parts.

        Args:
            coarse_sem_seg_head: has ``layers`` (maps to (N, K, H, W) logits) and ``losses``.
            point_head: predicts all classes at points.
            point_features: names of the maps that the point head reads.
            train_points: how training points are chosen.
            steps: how often the sides of the logits double in inference.
            num_points: cells that are predicted anew after each doubling.
            coarse_stride: image pixels per cell of the coarse logits.
            ignore_value: label of pixels that no loss counts.
            loss_normalizer: "local" or "global": whether losses are divided by the labelled pixels
                and points of this process or by their average over processes.

        Raises:
            ValueError: naming the config key, if the logits would outgrow the image.
        """
        super().__init__()
        check_subdivision(steps, num_points)
        _check_steps(steps, coarse_stride)
        self.coarse_sem_seg_head = coarse_sem_seg_head
        self.point_head = point_head
        self.point_features = tuple(point_features)
        self.train_points = train_points
        self.steps = steps
        self.num_points = num_points
        self.coarse_stride = coarse_stride
        self.ignore_value = ignore_value
        self.loss_normalizer = loss_normalizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the config key, if a value is not allowed.
        """
        node = cfg.MODEL.POINT_HEAD
        check_choice("MODEL.POINT_HEAD.NAME", node.NAME, ("StandardPointHead",))
        num_classes = _class_count(cfg)
        # the coarse head first: random numbers are drawn in detectron2's order
        coarse = SEM_SEG_HEADS_REGISTRY.get(node.COARSE_SEM_SEG_HEAD_NAME)(cfg, input_shape)
        point_head = StandardPointHead(
            total_channels(
                "MODEL.POINT_HEAD.IN_FEATURES",
                node.IN_FEATURES,
                input_shape,
                "the backbone's maps",
            ),
            num_classes=num_classes,
            fc_dim=node.FC_DIM,
            num_fc=node.NUM_FC,
            coarse_each_layer=node.COARSE_PRED_EACH_LAYER,
        )
        return {
            "coarse_sem_seg_head": coarse,
            "point_head": point_head,
            "point_features": node.IN_FEATURES,
            "train_points": TrainPoints.from_config(cfg),
            "steps": node.SUBDIVISION_STEPS,
            "num_points": node.SUBDIVISION_NUM_POINTS,
            "coarse_stride": cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            "loss_normalizer": RuntimeOptions.from_config(cfg).loss_normalizer,
        }

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the losses, or the logits.

        Args:
            features: maps (N, C, H, W) by name.
            targets: (N, H, W) int64 labels at the size of the padded images; needed in training.

        Returns:
            In training None and the losses; else (N, K, H, W) float32 logits at the size of the
            padded images, and no loss.
        """
        coarse = self.coarse_sem_seg_head.layers(features).float()
        maps = [features[name].float() for name in self.point_features]
        if self.training:
            return None, self.losses(coarse, maps, targets)
        return self.refine(coarse, maps), {}

    def losses(self, coarse: Tensor, maps: Sequence[Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the losses of the coarse head, and ``loss_sem_seg_point``.

        All are means over what is labelled; zero, with a gradient of zeros, if nothing is.

        Args:
            coarse: (N, K, H, W) float32 logits.
            maps: (N, C, H, W) float32, those that the point head reads.
            targets: (N, H, W) int64 labels at the size of the padded images.
        """
        losses = self.coarse_sem_seg_head.losses(coarse, targets)
        points = self.train_points.draw(coarse, top_margin)
        logits = self.point_logits(coarse, maps, points)
        labels = point_labels(targets, points)
        point_loss = F.cross_entropy(logits, labels, ignore_index=self.ignore_value)
        return {
            **{name: self._normalised(value, targets) for name, value in losses.items()},
            "loss_sem_seg_point": self._normalised(point_loss, labels),
        }

    def _normalised(self, mean: Tensor, labels: Tensor) -> Tensor:
        """Return a mean over labelled entries as ``loss_normalizer`` says; 0 if there are none."""
        count = (labels != self.ignore_value).sum().float()
        if self.loss_normalizer == "global":
            mean = mean * (count / mean_over_processes(count).clamp(min=1e-6))
        # a mean over nothing is not a number
        return torch.where(count > 0, mean, torch.zeros_like(mean))

    def refine(self, coarse: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Double the size of the logits step by step and predict uncertain cells anew.

        Args:
            coarse: see ``losses``; not changed.
            maps: see ``losses``.

        Returns:
            (N, K, H, W) float32 logits at the size of the padded images.
        """
        logits = coarse.contiguous()
        for _ in range(self.steps):
            logits = _enlarge(logits, 2)
            size = logits.shape[-2:]
            cells, points = uncertain_cells(top_margin(logits.flatten(2)), size, self.num_points)
            predicted = self.point_logits(coarse, maps, points)
            # the interpolated logits are nobody else's: overwrite them
            logits.flatten(2).scatter_(2, cells[:, None].expand_as(predicted), predicted)
        rest = self.coarse_stride // 2**self.steps
        return logits if rest == 1 else _enlarge(logits, rest)

    def point_logits(self, coarse: Tensor, maps: Sequence[Tensor], points: Tensor) -> Tensor:
        """Predict all classes at points (N, P, 2); gives (N, K, P) float32."""
        fine = [sample_points(level, points) for level in maps]
        fine = fine[0] if len(fine) == 1 else torch.cat(fine, dim=1)
        return self.point_head.all_classes(fine, sample_points(coarse, points))


def top_margin(logits: Tensor) -> Tensor:
    """Return by how much the highest of K logits exceeds the second: (N, K, P) to (N, P)."""
    first = torch.maximum(logits[:, 0], logits[:, 1])
    second = torch.minimum(logits[:, 0], logits[:, 1])
    # class by class: on large maps many times faster than a search for the two highest
    for other in logits.unbind(1)[2:]:
        second = torch.maximum(second, torch.minimum(first, other))
        first = torch.maximum(first, other)
    return first - second


def point_labels(targets: Tensor, points: Tensor) -> Tensor:
    """Read label maps (N, H, W) at points (N, P, 2), from the nearest pixel; gives (N, P) int64."""
    # Labels are exact in float32. The padding concerns a point on the border itself.
    values = F.grid_sample(
        targets[:, None].float(),
        2 * points[:, :, None] - 1,
        mode="nearest",
        padding_mode="border",
        align_corners=False,
    )
    return values[:, 0, :, 0].long()


def _enlarge(logits: Tensor, factor: int) -> Tensor:
    return F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)


def _class_count(cfg: CfgNode) -> int:
    """Return the number of classes.

    Raises:
        ValueError: if there is no choice between classes, or the two heads have different numbers.
    """
    node = cfg.MODEL.POINT_HEAD
    if node.CLS_AGNOSTIC_MASK:
        raise ValueError(
            "PointRendSemanticHead predicts every class: set MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK to "
            "False."
        )
    of_coarse = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if of_coarse != node.NUM_CLASSES:
        raise ValueError(
            f"MODEL.POINT_HEAD.NUM_CLASSES {node.NUM_CLASSES} must equal "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES {of_coarse}."
        )
    if of_coarse < 2:
        raise ValueError(
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES must be at least 2: each pixel belongs to one of the "
            f"classes, and a background is one of them; it is {of_coarse}."
        )
    return of_coarse


def _check_steps(steps: int, stride: int) -> None:
    """Refuse steps beyond the size of the image."""
    if stride % 2**steps:
        raise ValueError(
            f"MODEL.POINT_HEAD.SUBDIVISION_STEPS {steps} must lead from a cell of "
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE {stride} pixels to a whole number of pixels: set it "
            f"to {stride.bit_length() - 1} or less."
        )
