"""Coordinate channels that make convolutions position sensitive (CoordConv, arXiv:1807.03247)."""

import torch

__all__ = ["append_coords", "coord_channels"]


def coord_channels(
    size_hw: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Make the two coordinate planes of a feature map, x before y.

    Both run linearly from -1 to 1 with the end points on the first and last pixel.

    Args:
        size_hw: height and width of the feature map.
        device: device of the result.
        dtype: floating dtype of the result; None means torch's default.

    Returns:
        (1, 2, H, W): channel 0 is x (constant down each column), channel 1 is y (constant along
        each row).
    """
    height, width = size_hw
    x = torch.linspace(-1, 1, width, device=device, dtype=dtype)
    y = torch.linspace(-1, 1, height, device=device, dtype=dtype)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


def append_coords(features: torch.Tensor) -> torch.Tensor:
    """Concatenate the coordinate planes after the feature channels.

    Args:
        features: (N, C, H, W) float.

    Returns:
        (N, C + 2, H, W) of the same dtype; channel C is x, channel C + 1 is y. The coordinates span
        the whole tensor, padding included.
    """
    coords = coord_channels(
        features.shape[-2:], device=features.device, dtype=features.dtype
    ).expand(features.shape[0], -1, -1, -1)
    return torch.cat([features, coords], dim=1)
