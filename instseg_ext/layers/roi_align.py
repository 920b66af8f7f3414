"""RoIAlign as sums of weighted rows, for inference on the CPU.

Shapes: N maps, C channels, H x W cells, R regions, P_h x P_w bins, S samples along a side of a bin.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from torch import Tensor

__all__ = ["RowROIAlign"]


class RowROIAlign(ROIAlign):
    """detectron2's ``ROIAlign`` with a number of samples that does not depend on the region.

    A bin is then a sum of 4 S * S cells whose weights are products of a weight of their row and one
    of their column. In channels_last the channels of a cell lie side by side, and the sum is that
    of an embedding bag, several times as fast as the operator that goes channel by channel. Where
    that does not hold, on other devices and with gradients the operator computes.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool regions.

        Args:
            input: (N, C, H, W) maps.
            rois: (R, 5) number of the map and box XYXY in image pixels.

        Returns:
            (R, C, P_h, P_w), in channels_last if ``input`` is.
        """
        if not self._can_sum_rows(input):
            return super().forward(input, rois)
        height, width = input.shape[2:]
        offset = 0.5 if self.aligned else 0.0
        low, high = (rois[:, 1:] * self.spatial_scale - offset).split(2, dim=1)
        size = high - low
        if not self.aligned:
            size = size.clamp(min=1)
        (x, y), (w, h) = low.unbind(dim=1), size.unbind(dim=1)
        rows, row_weights = self._taps(y, h, self.output_size[0], height)
        columns, column_weights = self._taps(x, w, self.output_size[1], width)
        rows = rows + rois[:, :1, None, None].long() * height
        # (R, P_h, P_w, S, S, 2, 2): summed sample by sample, as the operator does
        cells = _pairs(rows * width, columns, torch.add)
        weights = _pairs(row_weights, column_weights, torch.mul)
        table = input.permute(0, 2, 3, 1).flatten(0, 2)
        num = 4 * self.sampling_ratio**2
        pooled = F.embedding_bag(
            cells.view(-1, num), table, per_sample_weights=weights.view(-1, num), mode="sum"
        )
        pooled = pooled.unflatten(0, (len(rois), *self.output_size))
        return pooled.permute(0, 3, 1, 2)

    def _can_sum_rows(self, maps: Tensor) -> bool:
        return (
            self.sampling_ratio > 0
            and maps.device.type == "cpu"
            and maps.dtype == torch.float32
            and maps.is_contiguous(memory_format=torch.channels_last)
            and not (maps.requires_grad and torch.is_grad_enabled())
            and not torch.jit.is_tracing()
        )

    def _taps(self, start: Tensor, size: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
        """Return what each bin reads along one axis.

        Args:
            start: (R,) lower end of the regions, in cells.
            size: (R,) their length, in cells.
            bins: number of bins.
            limit: number of cells.

        Returns:
            (R, bins, S, 2) int64 cells and float32 weights, whose sum is 1 inside the map.
        """
        samples = self.sampling_ratio
        steps = torch.arange(bins * samples, dtype=torch.float32, device=start.device)
        inner = (steps % samples + 0.5) / samples
        length = (size / bins)[:, None]
        place = start[:, None] + steps.div(samples, rounding_mode="floor") * length + inner * length
        # samples further than a cell away read nothing, others the nearest cell
        inside = (place >= -1) & (place <= limit)
        place = place.clamp(min=0, max=limit - 1)
        lower = place.floor()
        share = place - lower
        # a sample that is no number has weights that are none; its cells only have to exist
        near = lower.nan_to_num()
        cells = torch.stack([near, (near + 1).clamp(max=limit - 1)], dim=2).long()
        weights = torch.stack([1 - share, share], dim=2) * (inside / samples)[:, :, None]
        shape = (-1, bins, samples, 2)
        return cells.view(shape), weights.view(shape)


def _pairs(down: Tensor, across: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Join (R, P_h, S, 2) and (R, P_w, S, 2) to (R, P_h, P_w, S, S, 2, 2)."""
    return join(down[:, :, None, :, None, :, None], across[:, None, :, None, :, None, :])
