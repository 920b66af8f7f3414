"""RoI warping (arXiv:1512.04412): bilinear crop and resize, differentiable in the box.

Shapes: N images, C channels, H x W feature map, R regions, P output side, s feature pixels per
image pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ROIWarp", "roi_warp"]


def _round_half_away(value: Tensor) -> Tensor:
    """Round as C does, halves away from zero, keeping the gradient of the identity."""
    value_detached = value.detach()
    rounded = value_detached.sign() * (value_detached.abs() + 0.5).floor()
    # The difference is exactly zero, so that no noise moves a sample across a whole pixel.
    return rounded + (value - value_detached)


def _axis_taps(start: Tensor, extent: Tensor, bins: int, length: int) -> tuple[Tensor, Tensor]:
    """Place one sample at the first edge of each bin of one axis.

    Args:
        start: (R,) first edge of the region, feature pixels.
        extent: (R,) its length, not negative.
        bins: P.
        length: feature pixels along the axis.

    Returns:
        (R, P, 2) int64 indices of the two neighbours and (R, P, 2) their weights: zero for samples
        further than half a pixel outside the map.
    """
    fraction = torch.arange(bins, dtype=start.dtype, device=start.device) / bins
    position = start[:, None] + extent[:, None] * fraction
    inside = (position >= -0.5) & (position <= length - 0.5)
    clamped = position.detach().clamp(0, max(length - 1, 0))
    low = clamped.floor().long()
    # Straight through the clamp, whose gradient vanishes exactly at its limits, where boxes at the
    # image border lie.
    share = (clamped - low) + (position - position.detach())
    index = torch.stack([low, (low + 1).clamp(max=length - 1)], dim=-1)
    return index, torch.stack([1 - share, share], dim=-1) * inside[..., None]


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

    Args:
        features: (N, C, H, W); computed in float32, or float64 if they are.
        rois: (R, 5): image index, then XYXY in image pixels.
        output_size: (P_h, P_w).
        spatial_scale: s.
        quantize: round the scaled corners to whole feature pixels, as the published code does; the
            gradient passes through the rounding unchanged. The paper's formula does not round.

    Returns:
        (R, C, P_h, P_w) in the dtype of ``features``, channels_last in memory.
    """
    num, channels, height, width = features.shape
    if len(rois) == 0 or features.numel() == 0:
        return features.new_zeros((len(rois), channels, *output_size)) + features.sum() * 0
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        boxes = rois[:, 1:].to(dtype) * spatial_scale
        if quantize:
            boxes = _round_half_away(boxes)
        extent = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
        col, weight_x = _axis_taps(boxes[:, 0], extent[:, 0], output_size[1], width)
        row, weight_y = _axis_taps(boxes[:, 1], extent[:, 1], output_size[0], height)
        image = rois[:, 0].long().view(-1, 1, 1, 1, 1)
        # (R, P_h, P_w, 2, 2)
        pixel = (image * height + row[:, :, None, :, None]) * width + col[:, None, :, None, :]
        weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
        table = features.to(dtype).permute(0, 2, 3, 1).reshape(num * height * width, channels)
        samples = F.embedding_bag(
            pixel.reshape(-1, 4), table, mode="sum", per_sample_weights=weight.reshape(-1, 4)
        )
    out = samples.view(len(rois), *output_size, channels).permute(0, 3, 1, 2)
    return out.to(features.dtype)


class ROIWarp(nn.Module):
    """RoI warping at ``samples`` times the output size, then max pooling back to it."""

    def __init__(
        self,
        output_size: tuple[int, int],
        spatial_scale: float,
        samples: int = 2,
        quantize: bool = True,
    ) -> None:
        """Keep the geometry.

        Args:
            output_size: (P_h, P_w) after pooling.
            spatial_scale: feature pixels per image pixel.
            samples: samples along each side of an output bin, of which the largest counts; the
                published networks take 2.
            quantize: see ``roi_warp``.
        """
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale
        self.samples, self.quantize = samples, quantize

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Map (N, C, H, W) and (R, 5) to (R, C, P_h, P_w)."""
        size = (self.output_size[0] * self.samples, self.output_size[1] * self.samples)
        out = roi_warp(features, rois, size, self.spatial_scale, quantize=self.quantize)
        return out if self.samples == 1 else F.max_pool2d(out, self.samples)

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"samples={self.samples}, quantize={self.quantize}"
        )
