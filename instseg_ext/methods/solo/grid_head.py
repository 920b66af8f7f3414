"""What the heads of all variants share: levels, the category branch, and how masks are asked for.

Shape shorthand: N images, L levels, S_l cells per side, C = sum of S_l^2 cells in level-major,
row-major order, K classes, (Hm, Wm) size of the mask map.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from instseg_ext.methods.solo.mask_source import MaskSource
from instseg_ext.methods.solo.targets import CellTargets
from instseg_ext.modeling.towers import DeformOptions, build_predictor, build_tower

__all__ = ["GridHead", "LevelCells", "flatten_cells", "resize_to_stride"]


def flatten_cells(levels: Sequence[Tensor]) -> Tensor:
    """Join level maps into one axis of cells.

    Args:
        levels: per level (N, D, S_l, S_l).

    Returns:
        (N, C, D), level-major, then row-major.
    """
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in levels], dim=1)


def resize_to_stride(
    features: Sequence[Tensor], strides: Sequence[int], finest: int
) -> list[Tensor]:
    """Bring each feature to its level's stride by a bilinear resize.

    The sizes follow from the padded input: P6 of an odd-sized P5 comes out at exactly P5's size.

    Args:
        features: per level (N, D, H_l, W_l), finest first.
        strides: wanted strides, input pixels.
        finest: stride of ``features[0]``.

    Returns:
        Per level (N, D, Hp / stride, Wp / stride).
    """
    height, width = (side * finest for side in features[0].shape[-2:])
    resized = []
    for feature, stride in zip(features, strides, strict=True):
        size = (math.ceil(height / stride), math.ceil(width / stride))
        if feature.shape[-2:] != size:
            feature = F.interpolate(feature, size=size, mode="bilinear", align_corners=False)
        resized.append(feature)
    return resized


class LevelCells(NamedTuple):
    """Some of the cells of one level.

    Attributes:
        level: index of the level.
        rows: (n,) int64 positions in the list of cells that was split.
        cells: (n,) int64 in [0, S_l^2), row-major within the level.
    """

    level: int
    rows: Tensor
    cells: Tensor


class GridHead(nn.Module, ABC):
    """Category tower and predictor, shared over levels, on S_l x S_l maps.

    A subclass adds the mask branch. ``forward`` gives the same raw outputs in training and
    inference; they stop short of per-cell masks, which are made for chosen cells only.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        strides: Sequence[int],
        num_grids: Sequence[int],
        num_classes: int,
        num_convs: int,
        width: int,
        norm: str = "GN",
        deform: DeformOptions | None = None,
        prior_prob: float = 0.01,
    ) -> None:
        """Build the category branch and initialise it as the authors do.

        Args:
            input_shape: channels and stride of every backbone feature; channels must be equal.
            in_features: features that carry grids, finest first.
            strides: stride to which each is resized before its grid is laid.
            num_grids: cells per side, per level.
            num_classes: K.
            num_convs: 3x3 convolutions per tower.
            width: channels of the towers.
            norm: normalisation layer of all convolutions.
            deform: deformable convolutions; none by default.
            prior_prob: category score of every cell before training.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        self.strides = tuple(strides)
        self.num_grids = tuple(num_grids)
        self.in_dim = input_shape[in_features[0]].channels
        self.finest = input_shape[in_features[0]].stride
        # Logit of the prior: what a predictor's bias starts at.
        self.prior_bias = -math.log((1 - prior_prob) / prior_prob)
        self.deform = deform or DeformOptions()
        self._tower_style = {
            "width": width,
            "num_convs": num_convs,
            "norm": norm,
            "deform": self.deform,
        }
        self.category_tower = self.build_tower(self.in_dim)
        self.category_pred = build_predictor(width, num_classes, self.prior_bias)

    def build_tower(self, in_dim: int) -> nn.Sequential:
        """Return a new tower in the style of this head, for ``in_dim`` input channels."""
        return build_tower(in_dim, **self._tower_style)

    def level_features(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the feature of each level at its stride, (N, D, Hp / stride, Wp / stride)."""
        levels = [features[name] for name in self.in_features]
        return resize_to_stride(levels, self.strides, self.finest)

    def to_grid(self, feature: Tensor, level: int) -> Tensor:
        """Resize (N, D, H, W) to the level's grid."""
        side = self.num_grids[level]
        return F.interpolate(feature, size=(side, side), mode="bilinear", align_corners=False)

    def by_level(self, cells: Tensor) -> Iterator[LevelCells]:
        """Split (n,) int64 cells in [0, C) by their level; levels without any are left out."""
        sizes = torch.tensor([side * side for side in self.num_grids], device=cells.device)
        ends = sizes.cumsum(0)
        levels = torch.searchsorted(ends, cells.contiguous(), right=True)
        order = levels.argsort(stable=True)
        starts = (ends - sizes)[levels]
        # One synchronisation for all levels.
        counts = levels.bincount(minlength=len(self.num_grids)).tolist()
        for level, rows in enumerate(order.split(counts)):
            if len(rows):
                yield LevelCells(level, rows, (cells - starts)[rows])

    @abstractmethod
    def forward(self, features: Mapping[str, Tensor]) -> Any:
        """Compute the raw outputs, a NamedTuple whose first entry is ``category_logits``.

        Args:
            features: backbone features by name, (N, D, H_l, W_l).
        """

    @abstractmethod
    def map_size(self, raw: Any) -> tuple[int, int]:
        """Return (Hm, Wm), the size of the masks that are compared and scored in inference."""

    @abstractmethod
    def target_sizes(self, raw: Any) -> dict[int, tuple[int, int]]:
        """Return the sizes at which target masks are needed, by their stride in input pixels."""

    @abstractmethod
    def mask_source(self, raw: Any, image: int, cells: Tensor) -> MaskSource:
        """Prepare the masks of one image.

        Args:
            raw: outputs of ``forward``.
            image: index in the batch.
            cells: (U,) int64, all cells whose masks may be asked for.

        Returns:
            What makes the masks of any of them.
        """

    @abstractmethod
    def mask_pairs(
        self, raw: Any, targets: Sequence[CellTargets]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the predicted and the wanted masks of all positive cells.

        Args:
            raw: outputs of ``forward``.
            targets: per image.

        Returns:
            Two lists of equal length, of (P, h, w) probabilities (float32) and (P, h, w) zeros and
            ones (uint8); sizes differ between entries where the levels' maps do.
        """

    @abstractmethod
    def branch_outputs(self, raw: Any) -> list[Tensor]:
        """Return the outputs through which all shared parameters of the mask branch are reached."""

    def level_parameters(self) -> list[Tensor]:
        """Return the parameters of single levels: no positive cell there, no gradient."""
        return []

    def usable_cells(self, raw: Any) -> Tensor | None:
        """Return (N, C) bool, False where a mask cannot be made of finite numbers.

        None where a broken mask shows itself by values that are not finite.
        """
        return None

    def masks(self, raw: Any, selection: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Make mask probabilities at inference's resolution.

        Args:
            raw: outputs of ``forward``.
            selection: per image (P_n,) int64 cells, repetitions allowed; None means all C of them.

        Returns:
            Per image (P_n, Hm, Wm) float32 in [0, 1].
        """
        if selection is None:
            levels = raw.category_logits
            count = sum(level[0, 0].numel() for level in levels)
            selection = [torch.arange(count, device=levels[0].device)] * len(levels[0])
        return [self.mask_source(raw, n, cells)(cells) for n, cells in enumerate(selection)]
