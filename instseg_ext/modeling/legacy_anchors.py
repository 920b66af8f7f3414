"""The anchors of the first Faster R-CNN codes, for weights that were trained with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)
from torch import Tensor

__all__ = ["LegacyAnchorGenerator", "legacy_cell_anchors"]


def legacy_cell_anchors(
    stride: int, sizes: Sequence[float], aspect_ratios: Sequence[float]
) -> Tensor:
    """Return anchors around (0, 0) with sides rounded as py-faster-rcnn and Detectron do.

    There, a square of one cell is brought to the aspect ratio, its sides are rounded to whole
    pixels, width first and height from it, and then multiplied. At stride 16 a size of 128 and
    ratio 0.5 give 184x96 where 181.02x90.51 would be exact.

    Args:
        stride: image pixels per cell.
        sizes: sides of the squares before the ratio, image pixels.
        aspect_ratios: height / width.

    Returns:
        (sizes * ratios, 4) float32, XYXY in continuous coordinates, in detectron2's order: all
        ratios of the first size first. The old codes have all sizes of the first ratio first.
    """
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            # Python rounds halves to even, as numpy does there.
            width = round((stride**2 / ratio) ** 0.5)
            half = torch.tensor([width, round(width * ratio)]) * (size / stride / 2)
            anchors.append(torch.cat([-half, half]))
    return torch.stack(anchors)


@ANCHOR_GENERATOR_REGISTRY.register()
class LegacyAnchorGenerator(DefaultAnchorGenerator):
    """``DefaultAnchorGenerator`` with ``legacy_cell_anchors``, centred in the middle of each cell.

    Takes the keys of ``MODEL.ANCHOR_GENERATOR`` except ``OFFSET``, which is 0.5 here. Boxes are
    continuous: (x1, y1, x2 + 1, y2 + 1) of what the old codes call (x1, y1, x2, y2).
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {**super().from_config(cfg, input_shape), "offset": 0.5}

    def _calculate_anchors(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]]
    ) -> BufferList:
        # detectron2's public method for one level is not told its stride.
        levels = zip(self.strides, sizes, aspect_ratios, strict=True)
        return BufferList([legacy_cell_anchors(*level) for level in levels])
