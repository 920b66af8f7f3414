"""Read maps and masks at single points, and place such points.

Shapes: N maps, C channels, H x W cells, R regions, P points of each region, S side of a grid.
Points are (x, y). Relative points lie in [0, 1]: (0, 0) is the outer corner of the first cell of
what they refer to, so that the centre of cell j of W cells is (j + 0.5) / W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PointMap",
    "cell_weights",
    "grid_points",
    "points_in_boxes",
    "sample_masks",
    "sample_points",
]


def grid_points(side: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the centres of the cells of a regular grid.

    Args:
        side: S.
        device: device of the result.

    Returns:
        (S * S, 2) float32 relative points, row by row, x runs fastest.
    """
    centers = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
    return torch.stack([centers.repeat(side), centers.repeat_interleave(side)], dim=1)


def points_in_boxes(boxes: Tensor, points: Tensor) -> Tensor:
    """Return where points of boxes lie in the image.

    Args:
        boxes: (R, 4) float32 XYXY, pixels, corners at pixel corners.
        points: (R, P, 2) points relative to their boxes, or (P, 2) for the same points in all.

    Returns:
        (R, P, 2) float32, pixels. Without gradient for the boxes.
    """
    low, high = boxes.detach().float()[:, None].split(2, dim=2)
    return points * (high - low) + low


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Interpolate maps bilinearly, with zeros around them.

    A point on the border of a map therefore has half the value of the cell beside it, a point at a
    corner a quarter.

    Args:
        maps: (N, C, H, W) float.
        points: (N, A, 2) or (N, A, B, 2) points relative to the whole map.

    Returns:
        (N, C, A) or (N, C, A, B) float32. Computed in float32, since coordinates need more digits
        than half precision has. Gradients flow to maps and points.
    """
    flat = points.dim() == 3
    grid = 2 * points.float() - 1
    with torch.autocast(maps.device.type, enabled=False):
        values = F.grid_sample(
            maps.float(), grid[:, :, None] if flat else grid, align_corners=False
        )
    return values[..., 0] if flat else values


@dataclass(frozen=True)
class PointMap:
    """A feature map of one image, laid out for reading at points.

    The channels of a cell lie side by side, so that a point costs four rows of memory. In float32
    and channels_last such a map is a view of the feature map.

    Attributes:
        rows: (H * W, C) float32, cell by cell, row by row.
        size: (2,) float32, W and H. A tensor, since a traced size would become a constant.
        stride: image pixels per cell.
    """

    rows: Tensor
    size: Tensor
    stride: int

    @classmethod
    def of(cls, level: Tensor, stride: int) -> PointMap:
        """Lay out a map (1, C, H, W); padding of the image is part of it."""
        # traced sizes are tensors, which torch.tensor would turn into constants
        width = torch.as_tensor(level.shape[3], dtype=torch.float32)
        height = torch.as_tensor(level.shape[2], dtype=torch.float32)
        size = torch.stack([width, height]).to(level.device, non_blocking=True)
        return cls(level[0].float().permute(1, 2, 0).flatten(0, 1), size, stride)

    @property
    def channels(self) -> int:
        """C."""
        return self.rows.shape[1]

    def times(self, weight: Tensor) -> PointMap:
        """Apply a linear map (C', C) to every cell; reading and linear maps commute."""
        return replace(self, rows=(self.rows @ weight.t()).float())

    def at(self, points: Tensor) -> Tensor:
        """Interpolate bilinearly, with zeros around the map.

        Args:
            points: (R, P, 2) float32, image pixels.

        Returns:
            (R, P, C) float32, with gradients for ``rows``.
        """
        place = _place(points / (self.size * self.stride), self.size)
        low = place.floor()
        share = torch.stack([low + 1 - place, place - low], dim=2)  # (R, P, low or high, x or y)
        index = torch.stack([low, low + 1], dim=2)
        share = share * ((index >= 0) & (index < self.size))
        # a point that is no number has weights that are none; its cells only have to exist
        index = index.nan_to_num().clamp(min=torch.zeros_like(self.size), max=self.size - 1).long()
        columns, rows = index.unbind(dim=3)
        width = self.size[0].long()
        cells = (rows[..., :, None] * width + columns[..., None, :]).view(-1, 4)
        weights = (share[..., :, None, 1] * share[..., None, :, 0]).view(-1, 4)
        # a sum of weighted rows without a copy of them
        values = F.embedding_bag(cells, self.rows, per_sample_weights=weights, mode="sum")
        return values.unflatten(0, points.shape[:2])


def _place(points: Tensor, size: Tensor | int) -> Tensor:
    """Return where relative points lie, in cells; the centre of cell j is j.

    Rounded as ``grid_sample`` rounds, the last product and sum at once: where features change
    steeply, other roundings are seen in the result.
    """
    return ((2 * points - 1 + 1).double() * (size / 2) - 0.5).float()


def cell_weights(points: Tensor, side: int) -> Tensor:
    """Return the weights with which ``sample_points`` reads the cells of a square map.

    Args:
        points: (R, P, 2) points relative to the whole map.
        side: S of the map.

    Returns:
        (R, P, S * S) float32, at most four of them not zero.
    """
    place = _place(points.float(), side)
    cells = torch.arange(side, device=points.device, dtype=torch.float32)
    columns, rows = (1 - (place[..., None] - cells).abs()).clamp(min=0).unbind(dim=2)
    return (rows[..., :, None] * columns[..., None, :]).flatten(2)


def sample_masks(masks: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """Interpolate bool masks bilinearly at points, with zeros around them.

    Only the four pixels around each point are read: no mask is copied or turned into floats.

    Args:
        masks: (M, H, W) bool.
        index: (R,) int64, the mask of each region.
        points: (R, P, 2) float32, pixels; the centre of pixel j is at j + 0.5.

    Returns:
        (R, P) float32 in [0, 1].
    """
    height, width = masks.shape[-2:]
    position = points - 0.5
    low = position.floor()
    share = position - low
    x, y = low.long().unbind(dim=2)
    share_x, share_y = share.unbind(dim=2)
    result = torch.zeros_like(share_x)
    for dy, weight_y in ((0, 1 - share_y), (1, share_y)):
        for dx, weight_x in ((0, 1 - share_x), (1, share_x)):
            column, row = x + dx, y + dy
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            value = masks[index[:, None], row.clamp(0, height - 1), column.clamp(0, width - 1)]
            result += weight_y * weight_x * (value & inside)
    return result
