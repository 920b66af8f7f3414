"""RoI max pooling with bins that share no cell, as in Torch's ``inn`` ("V2").

Shapes: N maps, C channels, H x W cells, R regions, P_h x P_w bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import roi_pool

__all__ = ["ROIPoolV2", "bin_edges"]


class ROIPoolV2(nn.Module):
    """Max pooling over whole cells, each of which belongs to one bin at most.

    A region covers the cells ``[round(x1 * scale), round(x2 * scale))``, at least one, and a bin p
    of P those from ``round(p * cells / P)`` to below ``round((p + 1) * cells / P)``. So a region of
    fewer cells than bins has empty bins, which are 0, as are bins outside the map. (RoIPool of Fast
    R-CNN has bins that overlap and counts the cell of the end.) Source: ``inn.ROIPooling`` of
    Torch, whose boxes begin at 1.
    """

    def __init__(self, output_size: tuple[int, int], spatial_scale: float) -> None:
        """Keep the options.

        Args:
            output_size: (P_h, P_w).
            spatial_scale: cells per image pixel.
        """
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool regions.

        Args:
            input: (N, C, H, W) maps, float32 or float64.
            rois: (R, 5) number of the map and box XYXY in image pixels; no gradient reaches them.

        Returns:
            (R, C, P_h, P_w). The gradient of a bin goes to the first of its largest cells.
        """
        height, width = input.shape[2:]
        corners = (rois[:, 1:].detach() * self.spatial_scale).unbind(dim=1)
        x1, y1, x2, y2 = (_round(corner) for corner in corners)
        top, bottom = bin_edges(y1, y2, self.output_size[0], height)
        left, right = bin_edges(x1, x2, self.output_size[1], width)
        bins = (len(rois), *self.output_size)
        # A bin is a region of whole cells with a single bin, which torchvision pools as it is; its
        # regions include their end.
        cells = torch.stack(
            [
                rois[:, :1, None].expand(bins),
                left[:, None, :].expand(bins),
                top[:, :, None].expand(bins),
                right[:, None, :].expand(bins) - 1,
                bottom[:, :, None].expand(bins) - 1,
            ],
            dim=3,
        )
        pooled = roi_pool(input, cells.flatten(0, 2).to(input), (1, 1), 1.0)
        pooled = pooled.view(*bins, input.shape[1]).permute(0, 3, 1, 2)
        full = (bottom > top)[:, :, None] & (right > left)[:, None, :]
        return torch.where(full[:, None], pooled, pooled.new_zeros(()))


def bin_edges(start: Tensor, end: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """Return the cells of each bin along one axis.

    Args:
        start: (R,) first cells of the regions, whole numbers.
        end: (R,) the cells behind their last ones; a region has at least one.
        bins: P.
        limit: number of cells of the map, to which bins are cut.

    Returns:
        First cells and cells behind the last ones, (R, P) float; equal where a bin is empty.
    """
    size = ((end - start).clamp(min=1) / bins)[:, None]
    steps = torch.arange(bins + 1, dtype=size.dtype, device=size.device)
    # numbers that are none belong to no cell
    edges = (_round(steps * size) + start[:, None]).nan_to_num(0).clamp(min=0, max=limit)
    return edges[:, :-1], edges[:, 1:]


def _round(values: Tensor) -> Tensor:
    """Round to whole numbers, halves away from zero, as C does."""
    return values.sign() * (values.abs() + 0.5).floor()
