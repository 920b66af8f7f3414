"""SOLOv2's head: category scores and a mask kernel per cell, and one map of mask features.

Shape shorthand: see ``grid_head``; E kernel channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor

from instseg_ext.layers.coord import append_coords
from instseg_ext.methods.solo.grid_head import GridHead, flatten_cells
from instseg_ext.methods.solo.mask_features import MaskFeatures
from instseg_ext.methods.solo.mask_source import MaskSource
from instseg_ext.methods.solo.targets import CellTargets
from instseg_ext.modeling.towers import build_predictor

__all__ = ["SOLOv2Head", "SOLOv2Outputs"]


class SOLOv2Outputs(NamedTuple):
    """Raw outputs of the head.

    Attributes:
        category_logits: per level (N, K, S_l, S_l).
        kernels: per level (N, E, S_l, S_l).
        mask_features: (N, E, Hm, Wm), never negative.
    """

    category_logits: list[Tensor]
    kernels: list[Tensor]
    mask_features: Tensor


class _KernelMasks(MaskSource):
    """Products of kernels (C, E) and mask features (Hm * Wm, E)."""

    def __init__(self, kernels: Tensor, pixels: Tensor, size_hw: tuple[int, int]) -> None:
        super().__init__(size_hw)
        self.kernels, self.pixels = kernels, pixels

    def __call__(self, cells: Tensor) -> Tensor:
        """Return (n, Hm, Wm) probabilities."""
        return self._probs(self.kernels[cells], self.pixels).unflatten(1, self.size_hw)

    def pieces(self, cells: Tensor, numel: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield strips of pixels of all masks: the features, the larger factor, are read once."""
        kernels = self.kernels[cells]
        # Strips of whole cache lines.
        step = max(64, numel // max(len(cells), 1) // 64 * 64)
        for start in range(0, len(self.pixels), step):
            strip = slice(start, start + step)
            yield slice(None), strip, self._probs(kernels, self.pixels[strip])

    @staticmethod
    def _probs(kernels: Tensor, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, enabled=False):
            return (kernels @ pixels.T).float().sigmoid()


class SOLOv2Head(GridHead):
    """Category tower, kernel tower, mask features (arXiv:2003.10152).

    Towers are shared over levels and run on S_l x S_l maps. The kernel tower sees coordinates. The
    mask of a cell is the sigmoid of its kernel times the mask features, without bias.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        width: int,
        norm: str = "GN",
        kernel_dim: int = 256,
        mask_in_features: Sequence[str] = ("p2", "p3", "p4", "p5"),
        mask_width: int = 128,
        **grid_options: Any,
    ) -> None:
        """Build the layers and initialise them as the authors do.

        Args:
            input_shape: channels and stride of every backbone feature; channels must be equal.
            width: channels of the towers.
            norm: normalisation layer of all convolutions.
            kernel_dim: E.
            mask_in_features: features that make the mask features, finest first.
            mask_width: channels of the mask-feature convolutions before the sum.
            **grid_options: see the base class.
        """
        super().__init__(input_shape, width=width, norm=norm, **grid_options)
        self.mask_in_features = tuple(mask_in_features)
        self.mask_stride = input_shape[mask_in_features[0]].stride
        self.kernel_tower = self.build_tower(self.in_dim + 2)
        self.kernel_pred = build_predictor(width, kernel_dim, 0.0)
        self.mask_features = MaskFeatures(
            in_dim=self.in_dim,
            width=mask_width,
            out_dim=kernel_dim,
            strides=[input_shape[name].stride for name in mask_in_features],
            norm=norm,
            deform=self.deform,
        )

    def forward(self, features: Mapping[str, Tensor]) -> SOLOv2Outputs:
        """Compute the raw outputs; see the base class."""
        category_logits, kernels = [], []
        for level, feature in enumerate(self.level_features(features)):
            cells = self.to_grid(feature, level)
            category_logits.append(self.category_pred(self.category_tower(cells)))
            # Resizing the coordinates by themselves equals resizing them with the features.
            cells = append_coords(cells, tuple(feature.shape[-2:]))
            kernels.append(self.kernel_pred(self.kernel_tower(cells)))
        mask_features = self.mask_features([features[name] for name in self.mask_in_features])
        return SOLOv2Outputs(category_logits, kernels, mask_features)

    def map_size(self, raw: SOLOv2Outputs) -> tuple[int, int]:
        """Return the size of the mask features."""
        return tuple(raw.mask_features.shape[-2:])

    def target_sizes(self, raw: SOLOv2Outputs) -> dict[int, tuple[int, int]]:
        """Return the one size of all masks."""
        return {self.mask_stride: self.map_size(raw)}

    def mask_source(self, raw: SOLOv2Outputs, image: int, cells: Tensor) -> MaskSource:
        """Return the product of kernels and mask features; see the base class."""
        kernels = flatten_cells([level[image : image + 1] for level in raw.kernels])[0]
        # Rows of pixels: no copy of a channels_last map.
        pixels = raw.mask_features[image].permute(1, 2, 0).flatten(0, 1)
        return _KernelMasks(kernels, pixels, self.map_size(raw))

    def mask_pairs(
        self, raw: SOLOv2Outputs, targets: Sequence[CellTargets]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return every (instance, cell) pair: a contested cell is asked for several masks."""
        probs = self.masks(raw, [t.cells for t in targets])
        return probs, [t.masks[self.mask_stride][t.instances] for t in targets]

    def branch_outputs(self, raw: SOLOv2Outputs) -> list[Tensor]:
        """Return kernels and mask features."""
        return [*raw.kernels, raw.mask_features]

    def usable_cells(self, raw: SOLOv2Outputs) -> Tensor:
        """Return where kernel and mask features are finite: infinity times zero is not."""
        kernels = flatten_cells(raw.kernels).isfinite().all(dim=2)
        # Mask features are never negative, so their maximum tells whether all are finite.
        return kernels & raw.mask_features.amax(dim=(1, 2, 3)).isfinite()[:, None]
