"""What the mask heads that predict single points have in common.

Shapes: N images, R regions of all images (R_i of image i), P points of each region, C channels of
a map, F channels of all maps that are read at points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn

from instseg_ext.layers.mask_ops import chunk_slices, masks_per_chunk
from instseg_ext.layers.point_sample import grid_points, points_in_boxes, sample_levels

__all__ = ["CHUNK_MB", "PointMaskHead", "total_channels"]

CHUNK_MB = 64


class PointMaskHead(nn.Module, ABC):
    """Reads feature maps at points of regions, in place of a mask head with RoI pooling.

    Attributes:
        strides: image pixels per cell of the feature maps.
        region_features: names of the maps that are read for a region as a whole.
        point_features: names of the maps that are read at single points.
        pooler_resolution: side S of the grid at which a region as a whole is read.
        chunk_mb: MiB that the values at the points of a chunk of regions may take in inference.
    """

    def __init__(
        self,
        *,
        strides: Mapping[str, int],
        region_features: Sequence[str],
        point_features: Sequence[str],
        pooler_resolution: int,
        chunk_mb: float,
    ) -> None:
        """Keep the values; see the attributes."""
        super().__init__()
        self.strides = dict(strides)
        self.region_features = tuple(region_features)
        self.point_features = tuple(point_features)
        self.pooler_resolution = pooler_resolution
        self.chunk_mb = chunk_mb

    @property
    @abstractmethod
    def final_side(self) -> int:
        """Side of the predicted masks."""

    @abstractmethod
    def values_per_region(self, features: Mapping[str, Tensor]) -> int:
        """Return how many numbers one region needs at a time in inference."""

    @abstractmethod
    def losses(
        self, features: Mapping[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the losses; zeros with gradients of zeros if no image has a region.

        Args:
            features: see ``forward``, float32.
            proposals: see ``forward``.
        """

    @abstractmethod
    def predict_chunk(
        self, features: Mapping[str, Tensor], boxes: Tensor, classes: Tensor
    ) -> Tensor:
        """Predict all regions at once; see ``predict``."""

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
            The losses, or ``instances`` with ``pred_masks``: for their classes the probabilities
            (R_i, 1, ``final_side``, ``final_side``).
        """
        features = {
            name: features[name].float()
            for name in dict.fromkeys((*self.region_features, *self.point_features))
        }
        if self.training:
            return self.losses(features, instances)
        for number, instance in enumerate(instances):
            instance.pred_masks = self.predict(
                _one_image(features, number), instance.pred_boxes.tensor, instance.pred_classes
            )
        return instances

    def predict(self, features: Mapping[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Return the masks of one image.

        Args:
            features: maps (1, C, H, W) by name, float32.
            boxes: (R_i, 4) XYXY, network-input pixels.
            classes: (R_i,) int64.

        Returns:
            (R_i, 1, ``final_side``, ``final_side``) float32 probabilities.
        """
        if torch.jit.is_tracing():
            # the number of chunks would become a constant
            return self.predict_chunk(features, boxes, classes)
        shape = (len(boxes), 1, self.final_side, self.final_side)
        masks = boxes.new_empty(shape, dtype=torch.float32)
        size = masks_per_chunk(4 * self.values_per_region(features), self.chunk_mb)
        for chunk in chunk_slices(len(boxes), size):
            masks[chunk] = self.predict_chunk(features, boxes[chunk], classes[chunk])
        return masks

    def pool(self, features: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
        """Read maps (1, C, H, W) of one image at a grid in each box; gives (R_i, F, S, S)."""
        grid = grid_points(self.pooler_resolution, device=boxes.device)
        return self._as_square(self.read(features, self.region_features, boxes, grid))

    def pool_batch(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Read maps (N, C, H, W) at a grid in each box of all images; gives (R, F, S, S)."""
        grid = grid_points(self.pooler_resolution, device=boxes[0].device)
        grid = grid.expand(sum(len(image_boxes) for image_boxes in boxes), -1, -1)
        return self._as_square(self.read_batch(features, self.region_features, boxes, grid))

    def _as_square(self, pooled: Tensor) -> Tensor:
        side = self.pooler_resolution
        return pooled.reshape(pooled.shape[0], pooled.shape[1], side, side)

    def read(
        self, features: Mapping[str, Tensor], names: Sequence[str], boxes: Tensor, points: Tensor
    ) -> Tensor:
        """Read maps (1, C, H, W) of one image at points of its boxes; gives (R_i, F, P)."""
        return sample_levels(
            [features[name] for name in names],
            [self.strides[name] for name in names],
            points_in_boxes(boxes, points),
        )

    def read_batch(
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
                self.read(_one_image(features, number), names, *pair)
                for number, pair in enumerate(zip(boxes, split, strict=True))
            ]
        )


def _one_image(features: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return the maps of one image, (1, C, H, W)."""
    return {name: level[number : number + 1] for name, level in features.items()}


def total_channels(
    key: str,
    names: Sequence[str],
    shapes: Mapping[str, ShapeSpec],
    source: str = "MODEL.ROI_HEADS.IN_FEATURES",
) -> int:
    """Return the channels of several maps together.

    Args:
        key: config key that names them.
        names: of the maps.
        shapes: of all maps there are.
        source: where these come from, for the message.

    Raises:
        ValueError: if there is no such map.
    """
    missing = [name for name in names if name not in shapes]
    if missing or not names:
        raise ValueError(f"{key} {list(names)} must name some of {source}: {', '.join(shapes)}.")
    return sum(shapes[name].channels for name in names)
