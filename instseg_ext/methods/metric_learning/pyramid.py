"""A backbone that sees the image at several scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor

from instseg_ext.modeling.features import check_features

__all__ = ["ScalePyramid", "resize_to"]

# Shortest side of a scaled image: deep networks need some pixels.
_MIN_SIDE = 32


class ScalePyramid(Backbone):
    """A map made of those of a backbone, for the image at each of several scales.

    Several maps are brought to the size of the first one and added.

    Images are padded so that each scale gives a whole number of cells, and that a cell of one scale
    covers a whole number of cells of a larger one.
    """

    def __init__(
        self, bottom_up: Backbone, in_features: Sequence[str], scales: Sequence[float]
    ) -> None:
        """Keep the backbone.

        Args:
            bottom_up: run once for each scale.
            in_features: which of its maps, of equally many channels.
            scales: positive; 1.0 is among them.

        Raises:
            ValueError: naming the config key.
        """
        super().__init__()
        prefix = "MODEL.DEEP_METRIC."
        shapes = bottom_up.output_shape()
        check_features(f"{prefix}IN_FEATURES", in_features, shapes)
        if 1.0 not in scales or min(scales) <= 0 or len(set(scales)) < len(scales):
            raise ValueError(
                f"{prefix}INPUT_SCALES must be different positive numbers with 1.0 among them, not "
                f"{list(scales)}."
            )
        self.bottom_up = bottom_up
        self.in_features, self.scales = tuple(in_features), tuple(scales)
        self._shape = shapes[in_features[0]]
        unit = math.lcm(bottom_up.size_divisibility or 1, self._shape.stride)
        self._unit = unit
        ratios = [Fraction(scale).limit_denominator(64) for scale in scales]
        # The sides whose product with a scale is a multiple of the unit.
        self._divisor = math.lcm(
            *(unit * r.denominator // math.gcd(unit * r.denominator, r.numerator) for r in ratios)
        )

    @property
    def size_divisibility(self) -> int:
        """Of both sides of a batch."""
        return self._divisor

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What else the backbone asks for."""
        return self.bottom_up.padding_constraints

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the shape of the map at each scale; strides are in pixels of the scaled image."""
        return {str(scale): self._shape for scale in self.scales}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps by scale.

        Args:
            x: (N, C, H, W), padded.

        Returns:
            Each (N, channels, about H * scale / stride, about W * scale / stride).
        """
        return {str(scale): self._map(self._scaled(x, scale)) for scale in self.scales}

    def _map(self, x: Tensor) -> Tensor:
        features = self.bottom_up(x)
        total, *others = (features[name] for name in self.in_features)
        for other in others:
            total = total + resize_to(other, total.shape[-2:])
        return total

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return x
        least = max(_MIN_SIDE, self._unit)
        return resize_to(x, [max(round(side * scale), least) for side in x.shape[-2:]])


def resize_to(x: Tensor, size_hw: Sequence[int]) -> Tensor:
    """Return (N, C, H, W) maps at another size, interpolated bilinearly."""
    if tuple(x.shape[-2:]) == tuple(size_hw):
        return x
    return F.interpolate(x, size=tuple(size_hw), mode="bilinear", align_corners=False)
