"""Rays to polygons."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from instseg_ext.config import check_choice

__all__ = ["decode_polygons", "ray_directions"]


def ray_directions(
    num_rays: int, origin: str = "down", device: torch.device | str = "cpu"
) -> Tensor:
    """Return the unit vectors of the rays.

    Args:
        num_rays: R rays, 360 / R degrees apart.
        origin: ``down``: ray 0 is (0, 1) and the rays turn towards (1, 0); ``left``: ray 0 is
            (-1, 0) and they turn towards (0, 1). The y axis points down in both.
        device: of the result.

    Returns:
        (R, 2) float32, (x, y).

    Raises:
        ValueError: if ``origin`` is unknown.
    """
    check_choice("MODEL.POLARMASK.RAY_ORIGIN", origin, ("down", "left"))
    # In float32 as the authors do: the last bit decides about vertices on the edge of a pixel. On
    # the CPU, so that all devices have the same bits.
    angles = torch.arange(num_rays, dtype=torch.float32, device="cpu") * (360.0 / num_rays)
    angles = angles / 180 * math.pi
    sin, cos = angles.sin(), angles.cos()
    directions = torch.stack([sin, cos] if origin == "down" else [-cos, sin], dim=1)
    return directions.to(device)


def decode_polygons(
    points: Tensor,
    distances: Tensor,
    directions: Tensor,
    clip_hw: tuple[int, int] | None = None,
) -> Tensor:
    """Return the tips of rays (Sec. 3.2 of arXiv:1909.13226).

    Args:
        points: (n, 2) float, (x, y) where the rays begin.
        distances: (n, R) float32 lengths.
        directions: (R, 2) of ``ray_directions``.
        clip_hw: height and width of the image; tips are brought into its pixels, [0, width - 1] and
            [0, height - 1]. None leaves them where they are.

    Returns:
        (n, R, 2) float32, (x, y) in pixel indices.
    """
    tips = distances[:, :, None] * directions + points[:, None]
    if clip_hw is not None:
        height, width = clip_hw
        tips[..., 0].clamp_(0, width - 1)
        tips[..., 1].clamp_(0, height - 1)
    return tips
