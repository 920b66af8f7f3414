"""Read maps and masks at single points, and place such points.

Shapes: N maps, C channels, H x W cells, R regions, P points of each region, S side of a grid.
Points are (x, y). Relative points lie in [0, 1]: (0, 0) is the outer corner of the first cell of
what they refer to, so that the centre of cell j of W cells is (j + 0.5) / W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["grid_points", "points_in_boxes", "sample_levels", "sample_masks", "sample_points"]


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


def sample_levels(levels: Sequence[Tensor], strides: Sequence[int], points: Tensor) -> Tensor:
    """Read the feature maps of one image at points of its regions.

    Args:
        levels: (1, C_l, H_l, W_l) maps of one image.
        strides: image pixels per cell of each of them.
        points: (R, P, 2) float32, image pixels.

    Returns:
        (R, sum of C_l, P) float32, not necessarily contiguous.
    """
    sampled = [
        # a lookup of all regions at once: one map, R x P places
        sample_points(level, (points / _extent(level, stride))[None])[0].transpose(0, 1)
        for level, stride in zip(levels, strides, strict=True)
    ]
    return sampled[0] if len(sampled) == 1 else torch.cat(sampled, dim=1)


def _extent(level: Tensor, stride: int) -> Tensor:
    """Return (width, height) of a map, padding included, in image pixels; also under tracing."""
    # The sizes are traced as tensors, which torch.tensor would turn into constants.
    sizes = [torch.as_tensor(level.shape[axis], dtype=torch.float32) for axis in (3, 2)]
    return torch.stack(sizes).to(level.device) * stride


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
