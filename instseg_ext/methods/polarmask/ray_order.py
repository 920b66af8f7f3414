"""In which order a model gives its rays, told by its own boxes: the check behind ``RAY_ORIGIN``.

Weights do not say which way ray 0 points, and the names in a file are a hint only. Read in the
wrong order, every polygon is turned by a quarter, so that it leaves the box that the same location
predicts. No labels are needed.

Shape shorthand: n detections, R rays. Sides of boxes are in the order left, top, right, bottom.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from instseg_ext.method import CheckResult
from instseg_ext.methods.polarmask.head import distances
from instseg_ext.methods.polarmask.inference import Frame
from instseg_ext.methods.polarmask.polygons import decode_polygons, ray_directions

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RayOrder", "check_ray_order", "check_rays"]

# Largest error of an order that is believed, as a share of the box.
_LIMIT = 0.15
# Detections without which nothing is decided.
_FEWEST = 5
# Detections below are left out.
_CONFIDENT = 0.3


class RayOrder(NamedTuple):
    """How well polygons fit their boxes in either order of the rays.

    Attributes:
        down: error if ray 0 points down: differences of the four sides, as a share of their sum,
            median of the detections.
        left: likewise if it points to the left.
        detections: how many decided it.
    """

    down: float
    left: float
    detections: int

    @property
    def origin(self) -> str:
        """The order that fits, as a value of ``MODEL.POLARMASK.RAY_ORIGIN``."""
        return "down" if self.down < self.left else "left"


def check_ray_order(sides: Tensor, rays: Tensor) -> RayOrder:
    """Find out the order of a model's rays.

    Only boxes that differ enough from themselves turned by a quarter are looked at, so that no
    detection can fit in both orders.

    Args:
        sides: (n, 4) distances of confident detections to the sides of their boxes.
        rays: (n, R) lengths at the same locations, in the order that the model has.

    Returns:
        The errors of both orders, of which one is below 15 %.

    Raises:
        ValueError: if too few detections can tell, or neither order fits.
    """
    telling = _error(sides.roll(1, dims=1), sides) > 2 * _LIMIT
    count = int(telling.sum())
    if count < _FEWEST:
        raise ValueError(
            f"{count} of {len(sides)} detections with a score of {_CONFIDENT} or more can tell the "
            f"order of the rays, and {_FEWEST} are needed: give more pictures, with objects that "
            "the model knows and that are longer than wide."
        )
    sides, rays = sides[telling], rays[telling]
    order = RayOrder(_median_error(rays, "down", sides), _median_error(rays, "left", sides), count)
    if min(order.down, order.left) < _LIMIT:
        return order
    if _median_error(rays.roll(rays.shape[1] // 4, dims=1), "down", sides) < _LIMIT:
        reason = (
            "They fit when turned back by a quarter: the names in the file were the old ones but "
            "its rays had the new order. Rename fcos_ to polar_ in it and convert it again."
        )
    else:
        reason = "The model is hardly trained, or its rays and boxes do not belong together."
    raise ValueError(f"{_summary(order)} Neither is below {_LIMIT:.0%}. {reason}")


def _extents(rays: Tensor, origin: str) -> Tensor:
    """Return the (n, 4) distances from the start of the rays to the sides of their polygon."""
    directions = ray_directions(rays.shape[1], origin, rays.device)
    tips = decode_polygons(rays.new_zeros(len(rays), 2), rays, directions)
    return torch.cat([-tips.amin(dim=1), tips.amax(dim=1)], dim=1)


def _error(sides: Tensor, wanted: Tensor) -> Tensor:
    """Return the (n,) differences of all sides as a share of what is wanted."""
    return (sides - wanted).abs().sum(dim=1) / wanted.sum(dim=1)


def _median_error(rays: Tensor, origin: str, sides: Tensor) -> float:
    return _error(_extents(rays, origin), sides).median().item()


def _summary(order: RayOrder) -> str:
    return (
        f"Read as RAY_ORIGIN down, polygons differ from the boxes by {order.down:.0%}, read as "
        f"left by {order.left:.0%} (median of {order.detections} detections)."
    )


@torch.no_grad()
def check_rays(predictor: Any, pictures: Iterable[np.ndarray]) -> CheckResult:
    """Compare ``MODEL.POLARMASK.RAY_ORIGIN`` with the order of the model's rays.

    Args:
        predictor: an ``engine.predictor.Predictor`` with a model that has boxes and rays.
        pictures: (H, W, 3) uint8 BGR.

    Raises:
        ValueError: see ``check_ray_order``.
    """
    model = predictor.model
    sides, rays = [], []
    for picture in pictures:
        images = model.preprocess_image([predictor.to_input(picture)])
        with model.precision():
            raw = model.head(model.backbone(images.tensor))
        size = images.image_sizes[0]
        found = model.detections(raw, [Frame(size, size)])[0]
        where = found.locations[found.scores >= _CONFIDENT]
        sides.append(distances(raw.box_logs[0, where]))
        rays.append(distances(raw.ray_logs[0, where]))
    order = check_ray_order(torch.cat(sides), torch.cat(rays))
    configured = predictor.cfg.MODEL.POLARMASK.RAY_ORIGIN
    advice = f"MODEL.POLARMASK.RAY_ORIGIN must be {order.origin}, not {configured}. "
    passed = order.origin == configured
    return CheckResult(passed, ("" if passed else advice) + _summary(order))
