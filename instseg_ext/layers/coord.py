"""Coordinate channels that make convolutions position sensitive (CoordConv, arXiv:1807.03247)."""

import torch
import torch.nn.functional as F

__all__ = ["append_coords", "coord_channels"]

_PLANES = {"xy": slice(0, 2), "x": slice(0, 1), "y": slice(1, 2)}


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


def append_coords(
    features: torch.Tensor, source_hw: tuple[int, int] | None = None, *, axes: str = "xy"
) -> torch.Tensor:
    """Concatenate the coordinate planes after the feature channels.

    Args:
        features: (N, C, H, W) float.
        source_hw: size at which the coordinates are made before they are resized to H x W; None
            means H x W itself. Appending coordinates and then resizing everything bilinearly gives
            the same tensor as resizing the features and passing their former size here, without
            the copy of the large map.
        axes: which planes to append: ``"xy"``, ``"x"`` or ``"y"``.

    Returns:
        (N, C + len(axes), H, W) in the dtype and memory format of ``features``; with both, channel
        C is x and channel C + 1 is y. The coordinates span the whole tensor, padding included.
    """
    size_hw = features.shape[-2:]
    coords = coord_channels(source_hw or size_hw, device=features.device, dtype=torch.float32)
    coords = coords[:, _PLANES[axes]]
    if coords.shape[-2:] != size_hw:
        coords = F.interpolate(coords, size=size_hw, mode="bilinear", align_corners=False)
    coords = coords.to(features.dtype).expand(features.shape[0], -1, -1, -1)
    if features.is_contiguous(memory_format=torch.channels_last):
        # cat falls back to the default format when its inputs disagree.
        coords = coords.contiguous(memory_format=torch.channels_last)
    return torch.cat([features, coords], dim=1)
