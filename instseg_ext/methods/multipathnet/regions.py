"""Foveal crops of a proposal, and what is pooled from them.

Shapes: N images, R regions, S scales, C channels, P side of the pooled maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

__all__ = ["FovealPooler", "SkipNorm", "View", "foveal_boxes"]

# Keeps a crop without any energy, as one outside the image, at 0.
_EPSILON = 1e-10


@dataclass(frozen=True)
class View:
    """What a tower sees of a proposal.

    Attributes:
        scale: size of the crop in units of the proposal's.
        maps: from how many maps, from the coarsest on, it is pooled.
    """

    scale: float
    maps: int


def foveal_boxes(boxes: Tensor, scale: float) -> Tensor:
    """Scale boxes around their centres ("foveal regions" of arXiv:1604.02135).

    They are not clipped: a clipped box would have another centre and another shape. The part
    outside of the image is pooled as zeros.

    Args:
        boxes: (R, 4) XYXY.
        scale: of width and height.

    Returns:
        (R, 4) XYXY.
    """
    if scale == 1:
        return boxes
    grow = (boxes[:, 2:] - boxes[:, :2]) * ((scale - 1) / 2)
    return torch.cat([boxes[:, :2] - grow, boxes[:, 2:] + grow], dim=1)


class SkipNorm(nn.Module):
    """Makes features pooled from different maps comparable.

    With "l2", each crop of each map gets the same norm, computed in float32: a sum of tens of
    thousands of squares overflows in half precision.
    """

    def __init__(self, kind: str, scale: float, factors: Sequence[float]) -> None:
        """Keep the options.

        Args:
            kind: "l2", "constant" or "none".
            scale: the norm, for "l2".
            factors: one for each map, for "constant".
        """
        super().__init__()
        self.kind, self.scale, self.factors = kind, scale, tuple(factors)

    def forward(self, pooled: Tensor, number: int) -> Tensor:
        """Normalise the features (R, C, P, P) of one map.

        Args:
            pooled: features.
            number: of the map.
        """
        if self.kind == "none":
            return pooled
        if self.kind == "constant":
            return pooled * self.factors[number]
        with torch.autocast(pooled.device.type, enabled=False):
            values = pooled.float()
            energy = values.square().sum(dim=(1, 2, 3), keepdim=True)
            return values * (self.scale / (energy + _EPSILON).sqrt())


class FovealPooler(nn.Module):
    """Pools every crop that a tower asks for from every map that it asks for, once.

    Detectron2's pooler takes each box from one level, chosen by its size; here each box is taken
    from all of its view's maps.
    """

    def __init__(self, poolers: Sequence[nn.Module], norm: SkipNorm, views: Sequence[View]) -> None:
        """Keep the parts.

        Args:
            poolers: one for each map, coarse to fine; each takes a list of one map and a ``Boxes``
                for each image.
            norm: of what is pooled.
            views: of the towers.
        """
        super().__init__()
        self.poolers, self.norm, self.views = nn.ModuleList(poolers), norm, tuple(views)
        # Two towers may look at the same crop of the same map.
        self._wanted = list(
            dict.fromkeys((view.scale, number) for view in views for number in range(view.maps))
        )

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Boxes]) -> list[list[Tensor]]:
        """Pool.

        Args:
            maps: (N, C, H, W) of each source, coarse to fine.
            boxes: of each image, in pixels of the network input.

        Returns:
            For each view the normalised features (R, C, P, P) of its maps, of all images' boxes in
            their order.
        """
        crops = {
            scale: [Boxes(foveal_boxes(x.tensor, scale)) for x in boxes]
            for scale in {scale for scale, _ in self._wanted}
        }
        pooled: Mapping[tuple[float, int], Tensor] = {
            (scale, number): self.norm(self.poolers[number]([maps[number]], crops[scale]), number)
            for scale, number in self._wanted
        }
        return [[pooled[view.scale, number] for number in range(view.maps)] for view in self.views]
