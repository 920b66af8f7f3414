"""Position-sensitive RoI average pooling (arXiv:1611.07709): each bin reads its own channels.

Shapes: N images, D maps of the result, G x G groups, H x W cells, R regions, P output side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ps_roi_average_pool", "ps_roi_scores"]

_SMALLEST = 0.1  # cells: the least length of a region, as in the published code
_PART_MB = 4  # MiB of pooled maps that stay in the cache until they are reduced
_LIST_MB = 64  # MiB of working memory for lists of cells, int64
_LISTS = 8  # of them at once


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
    maps = _num_maps(features, group_size)
    with torch.autocast(features.device.type, enabled=False):
        table = _table(features, (maps, group_size**2), (1, 0))
        shape = features.shape[2:]
        bins, size = output_size**2, _regions_at_once(output_size, shape)
        parts = (
            _cells_of_bins(part, spatial_scale, group_size, output_size, shape)
            for part in rois.split(size)
        )
        if torch.is_grad_enabled() and table.requires_grad:
            # One sum, because each has a gradient of its own, as large as the table.
            pooled = _means(table, *map(torch.cat, zip(*parts, strict=True)))
        else:
            pooled = table.new_empty(len(rois) * bins, maps)
            for means, cells in zip(pooled.split(size * bins), parts, strict=True):
                means.copy_(_means(table, *cells))
    pooled = pooled.view(len(rois), output_size, output_size, maps).permute(0, 3, 1, 2)
    return pooled.to(features.dtype)


@torch.no_grad()
def ps_roi_scores(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    *,
    group_size: int = 7,
    output_size: int = 21,
) -> tuple[Tensor, Tensor]:
    """Reduce pooled outside and inside maps to what inference needs, without gradients.

    Equal to ``ps_roi_average_pool`` followed by the mean over all bins of the larger of outside and
    inside, and by the softmax over both for the best class that is not the background (section 2 of
    arXiv:1611.07709), but regions are reduced part by part, while they are in the cache.

    Args:
        features: (N, (K + 1) * 2 * G * G, H, W): of each class outside, then inside; class K is the
            background.
        rois: (R, 5): image index, then XYXY in image pixels.
        spatial_scale: cells per image pixel.
        group_size: G.
        output_size: P.

    Returns:
        (R, K + 1) float class logits and (R, P, P) float probabilities of being inside, of the
        class in 0..K-1 with the largest logit. Both float32, or float64 if ``features`` are.

    Raises:
        ValueError: if the channels are no multiple of ``2 * G * G``.
    """
    classes, odd = divmod(_num_maps(features, group_size), 2)
    if odd:
        raise ValueError(f"as many outside as inside maps are needed, not {2 * classes + 1} in all")
    with torch.autocast(features.device.type, enabled=False):
        table = _table(features, (classes, 2, group_size**2), (2, 1, 0))
        bins = output_size**2
        size = max(1, int(_PART_MB * 2**20 / (bins * table.shape[1] * table.element_size())))
        logits = table.new_empty(len(rois), classes)
        masks = table.new_empty(len(rois), bins)
        for part, scores, probs in zip(
            rois.split(size), logits.split(size), masks.split(size), strict=True
        ):
            indices, counts = _cells_of_bins(
                part, spatial_scale, group_size, output_size, features.shape[2:]
            )
            pair = _means(table, indices, counts).view(len(part), bins, 2, classes)
            outside, inside = pair.unbind(2)
            torch.mean(torch.maximum(outside, inside), dim=1, out=scores)
            best = scores[:, :-1].argmax(dim=1).view(-1, 1, 1).expand(-1, bins, 1)
            margin = inside.gather(2, best) - outside.gather(2, best)
            torch.sigmoid(margin[:, :, 0], out=probs)
    return logits, masks.view(-1, output_size, output_size)


def _num_maps(features: Tensor, group_size: int) -> int:
    maps, rest = divmod(features.shape[1], group_size**2)
    if rest:
        raise ValueError(
            f"position-sensitive pooling of {group_size} x {group_size} groups needs a multiple "
            f"of {group_size**2} channels, not {features.shape[1]}"
        )
    return maps


def _table(features: Tensor, parts: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """Return a (N * H * W * G * G, D) table of what the bins read, float32 or float64.

    Args:
        features: (N, C, H, W).
        parts: what the channels are made of, groups last.
        order: the parts in the order of the table, groups first.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    cells = features.to(dtype).permute(0, 2, 3, 1).reshape(-1, *parts)
    return cells.permute(0, *(1 + i for i in order)).reshape(-1, features.shape[1] // parts[-1])


def _regions_at_once(bins: int, shape: tuple[int, int]) -> int:
    """Return for how many regions cells may be listed together, however large they are.

    Args:
        bins: P.
        shape: (H, W).
    """
    height, width = shape
    cells = (height + 2 * bins) * (width + 2 * bins)  # neighbours share up to two lines
    return max(1, int(_LIST_MB * 2**20 / (cells * 8 * _LISTS)))


def _means(table: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """Average ``counts`` rows of the table each; (bins, D), zeros where there is none."""
    sums = F.embedding_bag(indices, table, counts.cumsum(0) - counts, mode="sum")
    return sums.div_(counts.clamp(min=1)[:, None])


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
    rois: Tensor, spatial_scale: float, group_size: int, bins: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """List the rows of the table that each bin averages, row by row of cells.

    Args:
        rois: (R, 5).
        spatial_scale: cells per image pixel.
        group_size: G.
        bins: P.
        shape: (H, W).

    Returns:
        int64 rows of a (N, H, W, G * G) table of all bins in the order (R, P, P), and (R * P * P,)
        int64 how many belong to each bin.
    """
    height, width = shape
    corners = rois[:, 1:].float()
    # corners that are no number only have to give cells that exist
    corners = (corners.sign() * (corners.abs() + 0.5).floor()).nan_to_num()
    x1, y1, x2, y2 = corners.unbind(1)
    rows = _axis_bins(y1, y2, spatial_scale, bins, height)
    columns = _axis_bins(x1, x2, spatial_scale, bins, width)
    tall = (rows[..., 1] - rows[..., 0]).clamp(min=0)
    wide = (columns[..., 1] - columns[..., 0]).clamp(min=0)[:, None].expand(-1, bins, -1)
    counts = (tall[:, :, None] * wide).flatten()
    bag = torch.repeat_interleave(counts)
    place = torch.arange(len(bag), device=rois.device) - (counts.cumsum(0) - counts)[bag]
    across = wide.flatten()[bag]
    down = place.div(across, rounding_mode="floor")
    cell = down * width + (place - down * across)
    group = torch.arange(bins, device=rois.device) * group_size // bins
    group = group[:, None] * group_size + group
    top = rois[:, :1].long() * height + rows[..., 0]
    first = (top[:, :, None] * width + columns[:, None, :, 0]) * group_size**2 + group
    return first.flatten()[bag] + cell * group_size**2, counts
