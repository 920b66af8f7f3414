"""Position-sensitive RoI average pooling (arXiv:1611.07709): each bin reads its own channels.

Shapes: N images, D maps of the result, G x G groups, H x W cells, R regions, P output side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ps_roi_average_pool"]

_SMALLEST = 0.1  # cells: the least length of a region, as in the published code


def ps_roi_average_pool(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    *,
    group_size: int = 7,
    output_size: int = 21,
) -> Tensor:
    """Average the cells under each bin of each region, in the channel that belongs to the bin.

    Corners are rounded to whole image pixels, halves away from zero; bin p of an axis spans the
    cells ``floor(p * b + start)`` to ``ceil((p + 1) * b + start)`` with ``b`` the P-th part of the
    region: whole cells, so that neighbours overlap. Bin (p, q) of map d reads channel
    ``(d * G + p * G // P) * G + q * G // P``. A bin without a cell on the map is 0. Edges are
    computed in float32 in this order: another order moves some of them by a cell.

    Gradients flow to the features only.

    Args:
        features: (N, D * G * G, H, W); computed in float32, or float64 if they are.
        rois: (R, 5): image index, then XYXY in image pixels.
        spatial_scale: cells per image pixel.
        group_size: G.
        output_size: P.

    Returns:
        (R, D, P, P) in the dtype of ``features``, channels_last in memory.

    Raises:
        ValueError: if the channels are no multiple of ``G * G``.
    """
    num, channels, height, width = features.shape
    groups = group_size**2
    if channels % groups:
        raise ValueError(
            f"position-sensitive pooling of {group_size} x {group_size} groups needs a multiple "
            f"of {groups} channels, not {channels}"
        )
    maps = channels // groups
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        table = features.to(dtype).view(num, maps, groups, height, width).permute(0, 2, 3, 4, 1)
        indices, counts = _cells_of_bins(rois, spatial_scale, group_size, output_size, features)
        offsets = counts.cumsum(0) - counts
        sums = F.embedding_bag(indices, table.reshape(-1, maps), offsets, mode="sum")
        means = sums / counts.clamp(min=1)[:, None]
    pooled = means.view(len(rois), output_size, output_size, maps).permute(0, 3, 1, 2)
    return pooled.to(features.dtype)


def _axis_bins(low: Tensor, high: Tensor, scale: float, bins: int, length: int) -> Tensor:
    """Return (R, P, 2) int64 first and past-the-last cells of the bins along one axis.

    Args:
        low: (R,) lower ends of the regions, whole image pixels.
        high: (R,) upper ends.
        scale: cells per image pixel.
        bins: P.
        length: cells along the axis.
    """
    start = low * scale
    step = ((high * scale - start).clamp(min=_SMALLEST) / bins)[:, None]
    order = torch.arange(bins, dtype=step.dtype, device=step.device)
    first = (order * step + start[:, None]).floor()
    last = ((order + 1) * step + start[:, None]).ceil()
    return torch.stack([first, last], dim=2).clamp(0, length).long()


@torch.no_grad()
def _cells_of_bins(
    rois: Tensor, spatial_scale: float, group_size: int, bins: int, features: Tensor
) -> tuple[Tensor, Tensor]:
    """List the rows of the table (N, G * G, H, W) that each bin sums, row by row of cells.

    Returns:
        int64 rows of all bins in the order (R, P, P), and (R * P * P,) int64 how many are whose.
    """
    height, width = features.shape[2:]
    corners = rois[:, 1:].float()
    corners = (corners.sign() * (corners.abs() + 0.5).floor()).nan_to_num()
    x1, y1, x2, y2 = corners.unbind(1)
    rows = _axis_bins(y1, y2, spatial_scale, bins, height)
    columns = _axis_bins(x1, x2, spatial_scale, bins, width)
    tall = (rows[..., 1] - rows[..., 0]).clamp(min=0)
    wide = (columns[..., 1] - columns[..., 0]).clamp(min=0)
    counts = (tall[:, :, None] * wide[:, None, :]).flatten()
    group = torch.arange(bins, device=rois.device) * group_size // bins
    group = group[:, None] * group_size + group
    plane = rois[:, :1, None].long() * group_size**2 + group
    # row of the table of the first cell of each bin
    first = (plane * height + rows[:, :, None, 0]) * width + columns[:, None, :, 0]
    bag = torch.repeat_interleave(counts)
    place = torch.arange(len(bag), device=rois.device) - (counts.cumsum(0) - counts)[bag]
    across = wide[:, None, :].expand(-1, bins, -1).flatten()[bag]
    down = place.div(across, rounding_mode="floor")
    return first.flatten()[bag] + down * width + (place - down * across), counts
