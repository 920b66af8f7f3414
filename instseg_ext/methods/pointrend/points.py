"""Choose the points at which masks are predicted.

Shapes: R regions, N points of each, H x W cells. Points are (x, y) relative to the region's box.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.layers.point_sample import grid_points, sample_points

__all__ = ["TrainPoints", "class_channel", "uncertain_cells"]

_STRATEGIES = ("importance", "uniform", "grid")


def class_channel(maps: Tensor, classes: Tensor) -> Tensor:
    """Return the map of one class for each region.

    Args:
        maps: (R, K, ...).
        classes: (R,) int64; of no effect if K is 1.

    Returns:
        (R, 1, ...).
    """
    if maps.shape[1] == 1:
        return maps
    return maps[torch.arange(maps.shape[0], device=maps.device), classes][:, None]


def _only_channel(maps: Tensor) -> Tensor:
    return maps[:, 0]


@dataclass(frozen=True)
class TrainPoints:
    """How points are chosen in training (Sec. 3.1 of arXiv:1912.08193).

    Attributes:
        num_points: N.
        strategy: "importance": of ``int(k N)`` random points the ``int(beta N)`` most uncertain
            ones, and random ones up to N. "uniform": N random ones. "grid": a regular grid.
        oversample_ratio: k, at least 1.
        importance_ratio: beta, in [0, 1].
    """

    num_points: int
    strategy: str = "importance"
    oversample_ratio: float = 3
    importance_ratio: float = 0.75

    @classmethod
    def from_config(cls, cfg: CfgNode) -> TrainPoints:
        """Read ``MODEL.POINT_HEAD``; see ``__post_init__``."""
        node = cfg.MODEL.POINT_HEAD
        return cls(
            node.TRAIN_NUM_POINTS,
            # not one of detectron2's keys, whose function may have made the node
            node.get("TRAIN_SAMPLING", "importance"),
            node.OVERSAMPLE_RATIO,
            node.IMPORTANCE_SAMPLE_RATIO,
        )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: naming the config key.
        """
        prefix = "MODEL.POINT_HEAD."
        check_choice(prefix + "TRAIN_SAMPLING", self.strategy, _STRATEGIES)
        if self.num_points < 1:
            raise ValueError(f"{prefix}TRAIN_NUM_POINTS must be positive, not {self.num_points}.")
        if self.oversample_ratio < 1:
            raise ValueError(
                f"{prefix}OVERSAMPLE_RATIO must be at least 1, not {self.oversample_ratio}."
            )
        if not 0 <= self.importance_ratio <= 1:
            raise ValueError(
                f"{prefix}IMPORTANCE_SAMPLE_RATIO must be in [0, 1], not {self.importance_ratio}."
            )
        if self.strategy == "grid" and math.isqrt(self.num_points) ** 2 != self.num_points:
            raise ValueError(
                f"{prefix}TRAIN_SAMPLING grid needs a square {prefix}TRAIN_NUM_POINTS, not "
                f"{self.num_points}."
            )

    @torch.no_grad()
    def draw(self, logits: Tensor, margin: Callable[[Tensor], Tensor] = _only_channel) -> Tensor:
        """Choose points.

        The random numbers are those of detectron2's project, in its order.

        Args:
            logits: (R, C, H, W) coarse logits, of the class of each region unless ``margin`` says
                otherwise. It must be the logits that are interpolated: halfway between -1 and 1
                nothing is certain, though both cells are. Of other strategies they only tell
                number and device.
            margin: from logits (R, C, P) to (R, P). A point is the more uncertain the nearer to
                zero it is there.

        Returns:
            (R, N, 2) float32.
        """
        num, device = logits.shape[0], logits.device
        if self.strategy == "grid":
            points = grid_points(math.isqrt(self.num_points), device=device)
            return points.expand(num, -1, -1)
        if self.strategy == "uniform":
            return torch.rand(num, self.num_points, 2, device=device)
        num_candidates = int(self.num_points * self.oversample_ratio)
        candidates = torch.rand(num, num_candidates, 2, device=device)
        certainty = margin(sample_points(logits, candidates)).abs()
        num_important = int(self.importance_ratio * self.num_points)
        chosen = certainty.topk(num_important, dim=1, largest=False).indices
        important = candidates.gather(1, chosen[:, :, None].expand(-1, -1, 2))
        if num_important == self.num_points:
            return important
        others = torch.rand(num, self.num_points - num_important, 2, device=device)
        return torch.cat([important, others], dim=1)


def uncertain_cells(
    logits: Tensor, size_hw: tuple[int, int], num_cells: int
) -> tuple[Tensor, Tensor]:
    """Choose the cells whose logits are nearest to zero.

    Args:
        logits: (R, H * W).
        size_hw: (H, W), as numbers: a traced shape could not be compared with ``num_cells``.
        num_cells: how many to choose in each map; all if there are no more.

    Returns:
        (R, n) int64 indices into the cells, in no order, and (R, n, 2) float32, their centres.
    """
    height, width = size_hw
    chosen = min(num_cells, height * width)
    cells = logits.abs().topk(chosen, dim=1, largest=False, sorted=False).indices
    x = (cells % width).float() * (1 / width) + 0.5 / width
    y = cells.div(width, rounding_mode="floor").float() * (1 / height) + 0.5 / height
    return cells, torch.stack([x, y], dim=2)
