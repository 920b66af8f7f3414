"""Adaptive feature pooling: the first layer of a head on every level, and what fuses the levels.

One level follows the other, so that at inference one pooled level is in memory at a time. A grouped
convolution (or batched product) of all levels has the same result; on the CPU it takes longer, most
of all with fully connected layers.

Shapes: R regions, L levels, C channels, P x P cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn

from instseg_ext.methods.panet.pooler import PooledRegions

__all__ = ["LevelConvs", "LevelLinears", "build_conv", "normalise_vectors"]


def build_conv(in_dim: int, out_dim: int, norm: str, *, relu: bool = True) -> Conv2d:
    """Return a 3x3 convolution with norm (or else a bias) and ReLU, MSRA weights."""
    conv = Conv2d(
        in_dim,
        out_dim,
        3,
        padding=1,
        bias=not norm,
        norm=get_norm(norm, out_dim),
        activation=F.relu_ if relu else None,
    )
    c2_msra_fill(conv)
    return conv


def normalise_vectors(x: Tensor, norm: nn.Module | None) -> Tensor:
    """Return (R, C) vectors after a norm of maps, or as they are without one."""
    return x if norm is None else norm(x[:, :, None, None]).flatten(1)


class LevelConvs(nn.ModuleList):
    """A 3x3 convolution and norm of its own for each level, then fusion and ReLU."""

    def __init__(self, num_levels: int, in_dim: int, out_dim: int, norm: str, fusion: str) -> None:
        """Create the layers.

        Args:
            num_levels: L.
            in_dim: channels of every level.
            out_dim: C.
            norm: normalisation layer; with "" the convolutions have a bias.
            fusion: "max" or "sum".
        """
        super().__init__(build_conv(in_dim, out_dim, norm, relu=False) for _ in range(num_levels))
        self.fusion = fusion

    def forward(self, regions: PooledRegions) -> Tensor:
        """Map regions to (R, C, P, P).

        Raises:
            TypeError: if the regions were pooled from one level each.
        """
        _check(regions)
        return _fuse(lambda i: self[i](regions.level(i)), len(self), self.fusion)


class LevelLinears(nn.ModuleList):
    """A fully connected layer of its own for each level, norms kept elsewhere, fusion and ReLU."""

    def __init__(self, num_levels: int, in_dim: int, out_dim: int, fusion: str) -> None:
        """Create the layers.

        Args:
            num_levels: L.
            in_dim: values of a region on one level, channels times cells.
            out_dim: C.
            fusion: "max" or "sum".
        """
        super().__init__(nn.Linear(in_dim, out_dim) for _ in range(num_levels))
        for layer in self:
            c2_xavier_fill(layer)
        self.fusion = fusion

    def forward(self, regions: PooledRegions, norms: Sequence[nn.Module] | None) -> Tensor:
        """Map regions to (R, C).

        Args:
            regions: the pooled regions.
            norms: the norm behind each level's layer; None for none at all.

        Raises:
            TypeError: if the regions were pooled from one level each.
        """
        _check(regions)

        def level(i: int) -> Tensor:
            norm = None if norms is None else norms[i]
            return normalise_vectors(self[i](regions.level(i).flatten(1)), norm)

        return _fuse(level, len(self), self.fusion)


def _check(regions: PooledRegions) -> None:
    if not isinstance(regions, PooledRegions):
        raise TypeError(
            "PANet's heads need every region from every level: set MODEL.ROI_HEADS.NAME to "
            "PANetROIHeads."
        )


def _fuse(level: Callable[[int], Tensor], num_levels: int, fusion: str) -> Tensor:
    """Join levels that no ReLU has seen yet; returns (R, ...), not negative.

    The largest of several ReLUs is the ReLU of the largest, so that one is enough. No name is bound
    to a level, so that each is freed before the next one is made.

    Args:
        level: gives level i, (R, ...).
        num_levels: how many.
        fusion: "max" or "sum".
    """
    if fusion == "max":
        fused = level(0)
        for i in range(1, num_levels):
            fused = torch.maximum(fused, level(i))
        return fused.relu()
    fused = level(0).relu()
    for i in range(1, num_levels):
        fused = fused + level(i).relu()
    return fused
