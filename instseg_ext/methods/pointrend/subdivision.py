"""Masks rendered by adaptive subdivision (Sec. 3.1 of arXiv:1912.08193).

Shapes: R regions, P points of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from instseg_ext.layers.point_sample import grid_points
from instseg_ext.methods.pointrend.points import uncertain_cells

__all__ = ["Subdivision", "check_subdivision"]


@dataclass(frozen=True)
class Subdivision:
    """From which size, how often and at how many points masks are refined.

    Attributes:
        side: of the first mask, all of whose cells are predicted.
        steps: how often the side doubles.
        num_points: cells that are predicted anew after each doubling.
    """

    side: int
    steps: int
    num_points: int

    @classmethod
    def plan(cls, side: int, steps: int, num_points: int) -> Subdivision:
        """Leave out the doublings after which every cell would be predicted anyway.

        Args:
            side: of the coarse mask.
            steps: doublings in all; the mask ends at ``side * 2 ** steps``.
            num_points: see ``Subdivision``.

        Raises:
            ValueError: naming the config key.
        """
        check_subdivision(steps, num_points)
        while steps > 0 and 4 * side**2 <= num_points:
            side, steps = 2 * side, steps - 1
        return cls(side, steps, num_points)

    @classmethod
    def full(cls, steps: int, num_points: int) -> Subdivision:
        """Start with a mask of ``num_points`` cells, as implicit PointRend does.

        Args:
            steps: doublings of that mask.
            num_points: see ``Subdivision``; a square number.

        Raises:
            ValueError: naming the config key.
        """
        check_subdivision(steps, num_points)
        side = math.isqrt(num_points)
        if side**2 != num_points:
            raise ValueError(
                "ImplicitPointRendHead needs a square MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS, "
                f"not {num_points}."
            )
        return cls(side, steps, num_points)

    @property
    def final_side(self) -> int:
        """Side of the finished mask."""
        return self.side * 2**self.steps

    @property
    def most_points(self) -> int:
        """How many points of a region are predicted at once."""
        return max(self.side**2, self.num_points if self.steps else 0)

    @property
    def total_points(self) -> int:
        """How many points of a region are predicted altogether."""
        return self.side**2 + self.steps * self.num_points

    def render(self, predict: Callable[[Tensor], Tensor], boxes: Tensor) -> Tensor:
        """Render masks.

        Args:
            predict: from (R, P, 2) points relative to the boxes to (R, P) float32 logits.
            boxes: (R, 4); tells number and device.

        Returns:
            (R, 1, final_side, final_side) logits.
        """
        num, side = boxes.shape[0], self.side
        points = grid_points(side, device=boxes.device).expand(num, -1, -1)
        logits = predict(points).reshape(num, 1, side, side)
        for _ in range(self.steps):
            side *= 2
            logits = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False)
            cells, points = uncertain_cells(logits.flatten(1), (side, side), self.num_points)
            # the interpolated map is nobody else's: overwrite it
            logits.flatten(1).scatter_(1, cells, predict(points))
        return logits


def check_subdivision(steps: int, num_points: int) -> None:
    """Refuse numbers of steps and points that are none.

    Raises:
        ValueError: naming the config key.
    """
    if steps < 0 or num_points < 1:
        raise ValueError(
            "MODEL.POINT_HEAD.SUBDIVISION_STEPS must not be negative and "
            f"SUBDIVISION_NUM_POINTS must be positive, not {steps} and {num_points}."
        )
