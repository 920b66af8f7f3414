"""SOLO's first head, where the mask of a cell is one channel of its level's map.

The raw outputs end at the mask tower: the predictors run for chosen cells only, since the full set
of masks at stride 4 takes a gigabyte.

Shape shorthand: see ``grid_head``; D width of the towers, (h_l, w_l) size of level l at its stride.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from instseg_ext.layers.coord import append_coords
from instseg_ext.methods.solo.grid_head import GridHead
from instseg_ext.methods.solo.mask_source import MaskSource
from instseg_ext.methods.solo.targets import CellTargets
from instseg_ext.modeling.towers import build_predictor

__all__ = ["SOLOHead", "SOLOOutputs", "VanillaSOLOHead", "doubled", "resize_maps"]


class SOLOOutputs(NamedTuple):
    """Raw outputs of the head.

    Attributes:
        category_logits: per level (N, K, S_l, S_l).
        mask_towers: per level the outputs of the mask towers, (N, D, h_l, w_l) each: one, or that
            of columns and that of rows.
    """

    category_logits: list[Tensor]
    mask_towers: list[tuple[Tensor, ...]]


def resize_maps(maps: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Resize (n, h, w) bilinearly."""
    if tuple(maps.shape[1:]) == size_hw:
        return maps
    return F.interpolate(maps[None], size=size_hw, mode="bilinear", align_corners=False)[0]


def doubled(feature: Tensor) -> tuple[int, int]:
    """Return the size of a level's mask map: twice that of its tower outputs (..., h, w)."""
    return 2 * feature.shape[-2], 2 * feature.shape[-1]


class SOLOHead(GridHead):
    """Base of the heads of the first paper (arXiv:1912.04488).

    A subclass names its mask towers and makes the masks of some cells of one level.
    """

    def forward(self, features: Mapping[str, Tensor]) -> SOLOOutputs:
        """Compute the raw outputs; see the base class."""
        category_logits, mask_towers = [], []
        for level, feature in enumerate(self.level_features(features)):
            cells = self.to_grid(feature, level)
            category_logits.append(self.category_pred(self.category_tower(cells)))
            mask_towers.append(self.run_mask_towers(feature))
        return SOLOOutputs(category_logits, mask_towers)

    @abstractmethod
    def run_mask_towers(self, feature: Tensor) -> tuple[Tensor, ...]:
        """Map one level's (N, D, h_l, w_l) feature to the outputs of the mask towers."""

    @abstractmethod
    def level_masks(self, raw: SOLOOutputs, image: int, level: int, cells: Tensor) -> Tensor:
        """Make masks at the level's own resolution.

        Args:
            raw: outputs of ``forward``.
            image: index in the batch.
            level: index of the level.
            cells: (P,) int64 in [0, S_l^2), row-major.

        Returns:
            (P, 2 h_l, 2 w_l) float32 probabilities.
        """

    def map_size(self, raw: SOLOOutputs) -> tuple[int, int]:
        """Return the size of the finest level's masks."""
        return doubled(raw.mask_towers[0][0])

    def target_sizes(self, raw: SOLOOutputs) -> dict[int, tuple[int, int]]:
        """Return the sizes of the levels' mask maps, which have half the levels' strides."""
        return {
            stride // 2: doubled(towers[0])
            for stride, towers in zip(self.strides, raw.mask_towers, strict=True)
        }

    def mask_pairs(
        self, raw: SOLOOutputs, targets: Sequence[CellTargets]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return one mask per positive cell: the last instance takes a contested cell."""
        probs, wanted = [], []
        for image, target in enumerate(targets):
            positive = (target.winners >= 0).nonzero().squeeze(1)
            for level, rows, cells in self.by_level(positive):
                probs.append(self.level_masks(raw, image, level, cells))
                owners = target.winners[positive[rows]]
                wanted.append(target.masks[self.strides[level] // 2][owners])
        return probs, wanted

    def branch_outputs(self, raw: SOLOOutputs) -> list[Tensor]:
        """Return the outputs of the mask towers."""
        return [tower for towers in raw.mask_towers for tower in towers]


class _ChannelMasks(MaskSource):
    """Channels of all levels, predicted when asked for, at the finest level's resolution."""

    def __init__(self, head: SOLOHead, raw: SOLOOutputs, image: int) -> None:
        super().__init__(head.map_size(raw))
        self.head, self.raw, self.image = head, raw, image

    def __call__(self, cells: Tensor) -> Tensor:
        """Return (n, Hm, Wm) probabilities."""
        parts = [
            (
                rows,
                resize_maps(
                    self.head.level_masks(self.raw, self.image, level, local), self.size_hw
                ),
            )
            for level, rows, local in self.head.by_level(cells)
        ]
        if len(parts) == 1:  # ordinary for a piece of sorted cells
            return parts[0][1]
        masks = torch.empty((len(cells), *self.size_hw), device=cells.device)
        for rows, maps in parts:
            masks[rows] = maps
        return masks


class VanillaSOLOHead(SOLOHead):
    """One mask channel per cell: channel ``i S + j`` for row i and column j.

    The 1x1 predictor and the doubling of its input commute, so the predictor runs first, on a
    quarter of the pixels, and for the chosen channels only.
    """

    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, width: int, **grid_options: Any
    ) -> None:
        """Build the layers and initialise them as the authors do; see the base class."""
        super().__init__(input_shape, width=width, **grid_options)
        self.mask_tower = self.build_tower(self.in_dim + 2)
        self.mask_pred = nn.ModuleList(
            build_predictor(width, side * side, self.prior_bias, kernel_size=1)
            for side in self.num_grids
        )

    def run_mask_towers(self, feature: Tensor) -> tuple[Tensor, ...]:
        """Run the one tower, on features and both coordinates."""
        return (self.mask_tower(append_coords(feature)),)

    def level_masks(self, raw: SOLOOutputs, image: int, level: int, cells: Tensor) -> Tensor:
        """Predict the chosen channels; see the base class."""
        feature = raw.mask_towers[level][0][image]
        predictor = self.mask_pred[level]
        # Rows of pixels: no copy of a channels_last map.
        pixels = feature.permute(1, 2, 0).flatten(0, 1)
        with torch.autocast(feature.device.type, enabled=False):
            weight = predictor.weight.flatten(1)[cells].to(pixels.dtype)
            logits = (weight @ pixels.T).float() + predictor.bias[cells][:, None]
            logits = logits.unflatten(1, tuple(feature.shape[1:]))
            return resize_maps(logits, doubled(feature)).sigmoid()

    def mask_source(self, raw: SOLOOutputs, image: int, cells: Tensor) -> MaskSource:
        """Return masks of any of the cells, brought to the finest level's resolution."""
        return _ChannelMasks(self, raw, image)

    def level_parameters(self) -> list[Tensor]:
        """Return the predictors' parameters."""
        return list(self.mask_pred.parameters())
