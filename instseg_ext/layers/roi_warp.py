"""RoI warping (arXiv:1512.04412): bilinear crop and resize, differentiable in the box.

Shapes: N images, C channels, H x W feature map, R regions, P output side, s feature pixels per
image pixel, A positions along one axis of a bin.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["WARP_MODES", "ROIWarp", "roi_warp"]

WARP_MODES = ("single", "maxsample")

# MiB of samples taken at once. On the CPU they stay in the cache until their maximum is taken.
_PART_MB = 4
_PART_MB_ELSEWHERE = 64


def roi_warp(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    *,
    quantize: bool = True,
) -> Tensor:
    """Crop regions and resize them to a fixed size.

    Sample (j, k) lies at ``y1 + j / P * (y2 - y1)``, ``x1 + k / P * (x2 - x1)`` of the scaled box:
    the top-left corner of its bin. Gradients flow to the features and to the box coordinates.
    Samples further than half a pixel outside the map are zero.

    Args:
        features: (N, C, H, W); computed in float32, or float64 if they are.
        rois: (R, 5): image index, then XYXY in image pixels. Inverted boxes have no extent.
        output_size: (P_h, P_w).
        spatial_scale: s.
        quantize: round the scaled corners to whole feature pixels, halves away from zero, as the
            published code does; the gradient passes through the rounding unchanged. The paper's
            formula does not round.

    Returns:
        (R, C, P_h, P_w) in the dtype of ``features``, channels_last in memory.
    """
    warp = ROIWarp(output_size, spatial_scale, samples=1, quantize=quantize)
    return warp(features, rois)


class ROIWarp(nn.Module):
    """RoI warping with several samples per bin, of which the largest counts.

    The samples of all regions are never held together: regions are warped and reduced part by
    part, and with gradients the samples of a part are taken again in the backward pass. Among equal
    samples of a bin the first in reading order receives the gradient, as in the published code.

    Note:
        Values are those of the published code. Its gradients are not: that of the features looks
        for the samples of a cell as if the region were a pixel longer and misses some, that of the
        box is w / (w + 1) of ours at the second edge and zero in the last row and column.
    """

    def __init__(
        self,
        output_size: tuple[int, int],
        spatial_scale: float,
        samples: int = 2,
        quantize: bool = True,
        mode: str = "single",
    ) -> None:
        """Keep the geometry.

        Args:
            output_size: (P_h, P_w) after taking the maximum.
            spatial_scale: feature pixels per image pixel.
            samples: "single": samples along each side of a bin. The published networks warp to
                28 x 28 with one sample per bin and pool 2 x 2, which is 2 samples at an output
                size of 14; 1 warps directly. "maxsample" ignores it.
            quantize: see ``roi_warp``.
            mode: "single": sample i of n lies at the fraction i / n of its bin. "maxsample": at
                i / n for i from 0 to n inclusive, with n feature pixels per bin, rounded up, so
                that the number follows the region; samples outside the map do not count.

        Raises:
            ValueError: if ``mode`` or ``samples`` is none of these.
        """
        super().__init__()
        if mode not in WARP_MODES:
            raise ValueError(f"RoI warping's mode is one of {', '.join(WARP_MODES)}, not {mode!r}")
        if samples < 1:
            raise ValueError(f"RoI warping takes at least one sample per bin, not {samples}")
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.samples, self.quantize, self.mode = samples, quantize, mode

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Map (N, C, H, W) and (R, 5) to (R, C, P_h, P_w), as ``roi_warp``."""
        channels, height, width = features.shape[1:]
        if len(rois) == 0 or features.numel() == 0:
            shape = (len(rois), channels, *self.output_size)
            return features.new_zeros(shape) + features.sum() * 0
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
            table = features.to(dtype).permute(0, 2, 3, 1).flatten(0, 2)
            boxes = rois[:, 1:].to(dtype) * self.spatial_scale
            if self.quantize:
                boxes = _round_half_away(boxes)
            (x1, y1), (x2, y2) = boxes[:, :2].unbind(1), boxes[:, 2:].unbind(1)
            cells, row_weights = self._taps(y1, y2, self.output_size[0], height)
            rows = (cells + rois[:, 0].long().view(-1, 1, 1, 1) * height) * width
            columns, column_weights = self._taps(x1, x2, self.output_size[1], width)
            pooled = _pool(table, (rows, row_weights, columns, column_weights))
        return pooled.permute(0, 3, 1, 2).to(features.dtype)

    def _taps(self, low: Tensor, high: Tensor, bins: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the cells that the samples of one axis read, and their weights.

        Args:
            low: (R,) first edge of the regions, feature pixels.
            high: (R,) second edge.
            bins: P.
            length: feature pixels along the axis.

        Returns:
            (R, A, P, 2) int64 and (R, A, P, 2); weights are 0 outside the map.
        """
        extent = high - low
        # straight through: regions shorter than half a pixel are common and must be able to grow
        extent = extent - extent.detach().clamp(max=0)
        steps: int | Tensor = self.samples
        order = torch.arange(self.samples, device=low.device).view(1, -1, 1)
        if self.mode == "maxsample":
            # boxes on the map have at most as many pixels per bin as the map
            steps = (extent.detach() / bins).ceil().clamp(1, length).nan_to_num(1).view(-1, 1, 1)
            order = torch.arange(int(steps.max()) + 1, device=low.device).view(1, -1, 1)
            # regions with fewer samples repeat their last
            order = order.minimum(steps)
        fraction = torch.arange(bins, dtype=low.dtype, device=low.device) * steps + order
        position = low[:, None, None] + extent[:, None, None] * (fraction / (bins * steps))
        inside = (position >= -0.5) & (position <= length - 0.5)
        if self.mode == "maxsample":
            position, inside = _repeat_inside(position, inside)
        clamped = position.detach().clamp(0, length - 1)
        near = clamped.floor()
        # Straight through the clamp, whose gradient vanishes exactly at its limits, where boxes at
        # the image border lie.
        share = (clamped - near) + (position - position.detach())
        # a position that is no number has weights that are none; its cells only have to exist
        cell = near.nan_to_num().long()
        cells = torch.stack([cell, (cell + 1).clamp(max=length - 1)], dim=-1)
        return cells, torch.stack([1 - share, share], dim=-1) * inside[..., None]

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"samples={self.samples}, quantize={self.quantize}, mode={self.mode!r}"
        )


def _round_half_away(value: Tensor) -> Tensor:
    """Round as C does, halves away from zero, keeping the gradient of the identity."""
    value_detached = value.detach()
    rounded = value_detached.sign() * (value_detached.abs() + 0.5).floor()
    # The difference is exactly zero, so that no noise moves a sample across a whole pixel.
    return rounded + (value - value_detached)


def _repeat_inside(position: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Replace samples outside the map by the nearest of the same bin inside it.

    A repeated sample does not change a maximum, one that reads zeros would.

    Args:
        position: (R, A, P), ascending along A.
        inside: (R, A, P).
    """
    last = inside.shape[1] - 1
    flags = inside.byte()
    first_inside = flags.argmax(dim=1, keepdim=True)
    last_inside = last - flags.flip(1).argmax(dim=1, keepdim=True)
    order = torch.arange(last + 1, device=position.device).view(1, -1, 1)
    # where none is inside both ends are those of the whole bin, and all samples remain
    order = order.maximum(first_inside).minimum(last_inside)
    return position.gather(1, order), inside.gather(1, order)


def _pool(table: Tensor, taps: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Return the (R, P_h, P_w, C) largest samples of all bins.

    Args:
        table: (N * H * W, C) features.
        taps: (R, A_y, P_h, 2) int64 first rows of the table, their weights, (R, A_x, P_w, 2) int64
            columns, their weights.
    """
    if taps[0].shape[1] == taps[2].shape[1] == 1:
        return _samples(table, *taps)[0]
    return _LargestSample.apply(table, *taps)


def _samples(
    table: Tensor, rows: Tensor, row_weights: Tensor, columns: Tensor, column_weights: Tensor
) -> Tensor:
    """Return the (A_y * A_x, R, P_h, P_w, C) samples of the bins, see ``_pool``."""

    def down(axis: Tensor) -> Tensor:
        return axis.transpose(0, 1)[:, None, :, :, None, :, None]

    def across(axis: Tensor) -> Tensor:
        return axis.transpose(0, 1)[None, :, :, None, :, None, :]

    # (A_y, A_x, R, P_h, P_w, 2, 2)
    cells = down(rows) + across(columns)
    weights = down(row_weights) * across(column_weights)
    samples = F.embedding_bag(
        cells.reshape(-1, 4), table, mode="sum", per_sample_weights=weights.reshape(-1, 4)
    )
    return samples.view(-1, *cells.shape[2:5], table.shape[1])


class _LargestSample(torch.autograd.Function):
    """The largest sample of each bin, part by part; samples are taken again for the gradient."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, *taps: Tensor) -> Tensor:
        """See ``_pool``."""
        ctx.save_for_backward(table, *taps)
        rows, _, columns, _ = taps
        pooled = table.new_empty(len(rows), rows.shape[2], columns.shape[2], table.shape[1])
        for which in _parts(table, taps):
            samples = _samples(table, *(t[which] for t in taps))
            torch.amax(samples, dim=0, out=pooled[which])
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Hand the gradient of each bin to the first of its largest samples."""
        table, *taps = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        grads = {i: torch.zeros_like(ctx.saved_tensors[i]) for i in wanted}
        # each part adds to a gradient of the whole table, and is therefore at least as large
        for which in _parts(table, taps, at_least=table.nbytes):
            inputs = [t.detach() for t in (table, *(t[which] for t in taps))]
            with torch.enable_grad():
                for i in wanted:
                    inputs[i].requires_grad_()
                samples = _samples(*inputs)
            _hand_to_first_largest(samples.detach(), upstream[which])
            found = torch.autograd.grad(samples, [inputs[i] for i in wanted], samples.detach())
            for i, part in zip(wanted, found, strict=True):
                # every part reads the whole table, but only its own taps
                whole = grads[i] if i == 0 else grads[i][which]
                whole += part
        return tuple(grads.get(i) for i in range(len(ctx.needs_input_grad)))


def _parts(table: Tensor, taps: Sequence[Tensor], at_least: int = 0) -> Iterator[slice]:
    """Yield the regions of each part.

    Args:
        table: see ``_pool``.
        taps: see there.
        at_least: bytes that the samples of a part may take in any case.
    """
    rows, _, columns, _ = taps
    values = rows.shape[1:3].numel() * columns.shape[1:3].numel() * table.shape[1]
    megabytes = _PART_MB if table.device.type == "cpu" else _PART_MB_ELSEWHERE
    budget = max(megabytes * 2**20, at_least)
    size = max(1, int(budget / (values * table.element_size())))
    for start in range(0, len(rows), size):
        yield slice(start, start + size)


def _hand_to_first_largest(samples: Tensor, upstream: Tensor) -> None:
    """Overwrite (n, ...) samples by their gradients, given that of their maximum."""
    largest = samples.amax(dim=0)
    rest = upstream.clone(memory_format=torch.contiguous_format)
    for sample in samples:
        sample.eq_(largest).mul_(rest)
        rest -= sample
