"""What the mask heads that predict single points have in common.

Shapes: N images, R regions of all images (R_i of image i), P points of each region, C channels of
a map, F channels of all maps that are read at points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn

from instseg_ext.layers.mask_ops import chunk_slices, masks_per_chunk
from instseg_ext.layers.point_sample import PointMap, grid_points, points_in_boxes

__all__ = ["CHUNK_MB", "Maps", "PointMaskHead", "places_of", "read_maps", "total_channels"]

CHUNK_MB = 64

Maps = Mapping[str, PointMap]
"""The feature maps of one image by name."""


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
    def values_per_region(self, maps: Maps) -> int:
        """Return how many numbers one region needs at a time in inference."""

    @abstractmethod
    def losses(self, images: Sequence[Maps], proposals: list[Instances]) -> dict[str, Tensor]:
        """Return the losses; zeros with gradients of zeros if no image has a region.

        Args:
            images: their feature maps.
            proposals: see ``forward``.
        """

    @abstractmethod
    def renderer(self, maps: Maps, boxes: Tensor, classes: Tensor) -> Callable[[slice], Tensor]:
        """Prepare the prediction of regions of one image.

        Args:
            maps: its feature maps.
            boxes: see ``predict``.
            classes: see ``predict``.

        Returns:
            What gives for some of the regions, R', the probabilities (R', 1, ``final_side``,
            ``final_side``).
        """

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
        if self.training:
            images = [self.maps(features, number) for number in range(len(instances))]
            return self.losses(images, instances)
        for number, instance in enumerate(instances):
            boxes, classes = instance.pred_boxes.tensor, instance.pred_classes
            # one after the other: in half precision the maps are copies
            maps = self.maps(features, number)
            instance.pred_masks = self.predict(maps, boxes, classes)
        return instances

    def maps(self, features: Mapping[str, Tensor], number: int) -> Maps:
        """Lay out the maps of one image that this head reads.

        Args:
            features: see ``forward``.
            number: of the image.
        """
        return {
            name: PointMap.of(features[name][number : number + 1], self.strides[name])
            for name in dict.fromkeys((*self.region_features, *self.point_features))
        }

    def predict(self, maps: Maps, boxes: Tensor, classes: Tensor) -> Tensor:
        """Return the masks of one image.

        Args:
            maps: its feature maps.
            boxes: (R_i, 4) XYXY, network-input pixels.
            classes: (R_i,) int64.

        Returns:
            (R_i, 1, ``final_side``, ``final_side``) float32 probabilities.
        """
        if torch.jit.is_tracing():
            # the number of chunks would become a constant
            return self.renderer(maps, boxes, classes)(slice(None))
        shape = (len(boxes), 1, self.final_side, self.final_side)
        masks = boxes.new_empty(shape, dtype=torch.float32)
        if not len(boxes):
            return masks
        render = self.renderer(maps, boxes, classes)
        size = masks_per_chunk(4 * self.values_per_region(maps), self.chunk_mb)
        for chunk in chunk_slices(len(boxes), size):
            masks[chunk] = render(chunk)
        return masks

    def pool(self, images: Sequence[Maps], boxes: Sequence[Tensor]) -> Tensor:
        """Read maps at a grid in each box; gives (R, F, S, S).

        Args:
            images: the feature maps of each image.
            boxes: (R_i, 4) of each image.
        """
        side = self.pooler_resolution
        grid = grid_points(side, device=boxes[0].device)
        places = [points_in_boxes(image_boxes, grid) for image_boxes in boxes]
        rows = read_maps(images, self.region_features, places)
        return rows.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def read_maps(images: Sequence[Maps], names: Sequence[str], places: Sequence[Tensor]) -> Tensor:
    """Read the maps of images at points.

    Args:
        images: the feature maps of each image.
        names: of those to read; their channels follow each other.
        places: (R_i, P, 2) pixels, of each image.

    Returns:
        (R, P, F) float32.
    """
    return torch.cat(
        [
            torch.cat([maps[name].at(where) for name in names], dim=2)
            for maps, where in zip(images, places, strict=True)
        ]
    )


def places_of(boxes: Sequence[Tensor], points: Tensor) -> list[Tensor]:
    """Return where points (R, P, 2) of the boxes (R_i, 4) of each image lie in it."""
    split = points.split([image_boxes.shape[0] for image_boxes in boxes])
    return [points_in_boxes(*pair) for pair in zip(boxes, split, strict=True)]


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
