"""How central a location is in its object.

Shapes: Q positive locations, R rays.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fcos_centerness", "polar_centerness", "soft_polar_centerness"]


def _balance(first: Tensor, second: Tensor) -> Tensor:
    """Return the smaller value through the larger one, 0 where both are 0."""
    larger = torch.maximum(first, second)
    return torch.minimum(first, second) / larger.clamp(min=torch.finfo(larger.dtype).tiny)


def polar_centerness(rays: Tensor) -> Tensor:
    """Compare the shortest ray with the longest (Eq. 2 of arXiv:1909.13226).

    Args:
        rays: (Q, R) float target lengths, not negative.

    Returns:
        (Q,) in [0, 1]: ``sqrt(min / max)``. Close to 0 when a ray meets no contour.
    """
    return _balance(rays.amin(dim=1), rays.amax(dim=1)).sqrt()


def soft_polar_centerness(rays: Tensor) -> Tensor:
    """Compare opposite quarters of the rays, as PolarMask++ does.

    The mean length of a quarter (R / 4 neighbouring rays) replaces the single ray, so that a ray
    that misses the contour does not decide alone.

    Args:
        rays: (Q, R) float target lengths, not negative.

    Returns:
        (Q,) in [0, 1]: the square root of the product of min / max over both pairs of opposite
        quarters.

    Raises:
        ValueError: if R is not divisible by 4.
    """
    num_rays = rays.shape[1]
    if num_rays % 4:
        raise ValueError(
            'MODEL.POLARMASK.CENTERNESS "soft" needs MODEL.POLARMASK.NUM_RAYS divisible by 4, '
            f"not {num_rays}."
        )
    quarters = rays.reshape(len(rays), 4, num_rays // 4).mean(dim=2)
    return _balance(quarters[:, :2], quarters[:, 2:]).prod(dim=1).sqrt()


def fcos_centerness(distances: Tensor) -> Tensor:
    """Compare opposite sides of the box (Eq. 3 of arXiv:1904.01355).

    Args:
        distances: (Q, 4) float distances to the left, top, right and bottom side, not negative.

    Returns:
        (Q,) in [0, 1]: the square root of the product of min / max over both axes.
    """
    return _balance(distances[:, :2], distances[:, 2:]).prod(dim=1).sqrt()
