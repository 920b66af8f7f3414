"""Pooling of every region from every level, one level at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from detectron2.structures import Boxes
from torch import Tensor, nn

from instseg_ext.modeling.poolers import RegionPooler, build_pooler

__all__ = ["AllLevelPooler", "PooledRegions"]


@dataclass(frozen=True)
class PooledRegions:
    """The regions of a batch on every level; a level is pooled when it is asked for.

    So a head that needs one level after the other holds one at a time: 1000 regions of 256 channels
    and 7x7 cells are 50 MB on each.

    Attributes:
        maps: (N, C, H_l, W_l) per level, fine to coarse.
        boxes: per image the regions, image pixels.
        poolers: per level one that takes all boxes from it.
    """

    maps: Sequence[Tensor]
    boxes: Sequence[Boxes]
    poolers: Sequence[RegionPooler]

    def __len__(self) -> int:
        """Return R, the number of regions of all images."""
        return sum(len(boxes) for boxes in self.boxes)

    def level(self, index: int) -> Tensor:
        """Return one level's features (R, C, P, P), the regions of all images in order."""
        return self.poolers[index]([self.maps[index]], list(self.boxes))

    def whole_first_image(self) -> PooledRegions:
        """Return one region instead of all, the whole first image, to stand in for none.

        A batch norm has no statistics of nothing, and a synchronised one waits for every process.
        """
        height, width = self.maps[0].shape[-2:]
        stride = 1 / self.poolers[0].level_poolers[0].spatial_scale
        first, *others = self.boxes
        whole = first.tensor.new_tensor([[0, 0, width * stride, height * stride]])
        none = [Boxes(boxes.tensor[:0]) for boxes in others]
        return replace(self, boxes=[Boxes(whole), *none])


class AllLevelPooler(nn.Module):
    """Pools every region from all levels (Sec. 3.2 of arXiv:1803.01534), whatever its size.

    Each level needs one call of the operator for all images.
    """

    def __init__(
        self,
        kind: str,
        output_size: int,
        scales: Sequence[float],
        sampling_ratio: int,
        *,
        key: str = "POOLER_SAMPLING_RATIO",
    ) -> None:
        """Create a pooler per level.

        Args:
            kind: see ``build_pooler``.
            output_size: side of the pooled features.
            scales: feature pixels per image pixel of each level, fine to coarse.
            sampling_ratio: samples along each side of a bin, at least 1.
            key: config key of ``sampling_ratio``, for the message.

        Raises:
            ValueError: if ``sampling_ratio`` or ``kind`` is not allowed.
        """
        super().__init__()
        if sampling_ratio < 1:
            raise ValueError(
                f"{key} must be at least 1, not {sampling_ratio}: PANet pools every region from "
                "the finest level, too, where a number that grows with the region (0) would take "
                "more than a thousand samples for each cell of a large one; the published models "
                "have 2."
            )
        self.level_poolers = nn.ModuleList(
            build_pooler(kind, output_size, [scale], sampling_ratio) for scale in scales
        )

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> PooledRegions:
        """Return the regions, ready to be pooled.

        Args:
            x: one (N, C, H_l, W_l) map per scale.
            box_lists: one ``Boxes`` per image, image pixels.
        """
        return PooledRegions(x, box_lists, list(self.level_poolers))
