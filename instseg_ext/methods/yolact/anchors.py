"""Anchors of all levels: where they lie and in which order.

Shape shorthand: A anchors per cell, P anchors of all levels together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["AnchorGrid"]


@dataclass(frozen=True)
class AnchorGrid:
    """Scales and shapes of the anchors of each level.

    Attributes:
        scales: per level, finest first, the sides in pixels of the network input.
        ratios: width / height of the anchors of each scale, whose area does not depend on it.
        square: give an anchor of ratio r two sides of ``scale * sqrt(r)``, so that the ratios
            become further scales.

    Note:
        ``square`` is a slip of the authors' code that their first COCO weights were trained with;
        their Pascal and YOLACT++ weights have true ratios.
    """

    scales: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...] = (1.0, 0.5, 2.0)
    square: bool = False

    def __post_init__(self) -> None:
        """Refuse what one prediction head cannot serve.

        Raises:
            ValueError: naming the key.
        """
        counts = [len(level) for level in self.scales]
        if len(set(counts)) != 1 or not counts[0]:
            raise ValueError(
                "MODEL.YOLACT.ANCHOR_SCALES needs the same number of scales on every level, at "
                f"least one, because the levels share their head; it has {counts}."
            )
        if not self.ratios or min(self.ratios) <= 0:
            raise ValueError(
                "MODEL.YOLACT.ASPECT_RATIOS needs positive numbers, at least one, not "
                f"{list(self.ratios)}."
            )
        if min(map(min, self.scales)) <= 0:
            raise ValueError(
                "MODEL.YOLACT.ANCHOR_SCALES needs positive numbers, not "
                f"{[list(level) for level in self.scales]}."
            )

    @property
    def num_per_cell(self) -> int:
        """Anchors per cell (A), equal on all levels."""
        return len(self.scales[0]) * len(self.ratios)

    def anchors(
        self,
        level_sizes: Sequence[tuple[int, int]],
        input_hw: tuple[int, int],
        device: torch.device | str,
    ) -> Tensor:
        """Return the anchors of all levels, in the order of the head's outputs.

        Levels come finest first; in a level row, column, scale, ratio, the last one fastest. The
        cells of a level divide the input evenly, also where its size is no multiple of theirs.

        Args:
            level_sizes: (height, width) of each level's map.
            input_hw: size of the network input in pixels.
            device: of the result.

        Returns:
            (P, 4) float32: centre x, centre y, width, height, divided by the input's width and
            height and not clipped to it. Kept for later calls: not to be modified.

        Raises:
            ValueError: if there are not as many sizes as levels.
        """
        sizes = tuple((int(height), int(width)) for height, width in level_sizes)
        # A traced program must make its own: what tracing makes is of no use outside of it.
        build = _build.__wrapped__ if torch.compiler.is_compiling() else _build
        return build(self, sizes, tuple(input_hw), torch.device(device))


@lru_cache(maxsize=16)
def _build(
    grid: AnchorGrid,
    level_sizes: tuple[tuple[int, int], ...],
    input_hw: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Compute the anchors in float64, as the authors do, and round once."""
    # Made while predicting, they must still serve a later training step.
    with torch.inference_mode(False):
        levels = [
            _level(size, scales, grid, input_hw)
            for size, scales in zip(level_sizes, grid.scales, strict=True)
        ]
        return torch.cat(levels).to(device=device, dtype=torch.float32)


def _level(
    size_hw: tuple[int, int],
    scales: tuple[float, ...],
    grid: AnchorGrid,
    input_hw: tuple[int, int],
) -> Tensor:
    """Return the (h * w * A, 4) float64 anchors of one level, on the CPU."""
    exact = {"dtype": torch.float64, "device": "cpu"}
    roots = torch.tensor(grid.ratios, **exact).sqrt()
    sides = torch.tensor(scales, **exact)[:, None]
    widths = sides * roots
    heights = widths if grid.square else sides / roots
    height, width = size_hw
    anchors = torch.empty(height, width, grid.num_per_cell, 4, **exact)
    anchors[..., 0] = ((torch.arange(width, **exact) + 0.5) / width)[:, None]
    anchors[..., 1] = ((torch.arange(height, **exact) + 0.5) / height)[:, None, None]
    anchors[..., 2] = (widths / input_hw[1]).flatten()
    anchors[..., 3] = (heights / input_hw[0]).flatten()
    return anchors.flatten(0, 2)
