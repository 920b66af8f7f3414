"""SharpMask's refinement: a coarse mask encoding that grows by the trunk's features.

Shapes: n windows; stage i from 0 to 3 has f = cells * 2^i lines per window.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from instseg_ext.layers.symmetric_pad import mirror_pad
from instseg_ext.methods.deepmask.heads import DeepMaskHead, WindowMaps

__all__ = ["REFINE_FEATURES", "Refinement", "SharpMaskHead"]

# Coarse to fine, at strides 16, 8, 4 and 2.
REFINE_FEATURES = ("res4", "res3", "res2", "stem")
# Outputs of the first convolution on each of them.
_LATERAL_DIMS = (64, 64, 64, 32)


class _Convs(nn.ModuleList):
    """3x3 convolutions with mirrored borders, ReLU in between."""

    def __init__(self, channels: Sequence[int], pad_mode: str) -> None:
        super().__init__(
            nn.Conv2d(before, after, kernel_size=3) for before, after in pairwise(channels)
        )
        self.pad_mode = pad_mode

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self):
            x = conv(mirror_pad(F.relu(x) if i else x, 1, self.pad_mode))
        return x


class Refinement(nn.Module):
    """Four modules, each of which doubles the side of the encoding (section 3 of 1603.08695).

    As in the authors' code, features and encoding are convolved apart and summed, and the
    enlargement repeats samples.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        code_dim: int,
        cells: int,
        mask_dim: int,
        pad_mode: str,
    ) -> None:
        """Build the layers.

        Args:
            channels: of ``REFINE_FEATURES``.
            code_dim: length of a window's code, C.
            cells: side of a window at stride 16.
            mask_dim: channels of the encoding at stage 0; halved by each stage.
            pad_mode: see ``mirror_pad``.
        """
        super().__init__()
        self.cells, self.pad_mode = cells, pad_mode
        self.encode = nn.Linear(code_dim, mask_dim * cells**2)
        self.lateral = nn.ModuleList(
            _Convs((width, hidden, mask_dim >> i, mask_dim >> i + 1), pad_mode)
            for i, (width, hidden) in enumerate(zip(channels, _LATERAL_DIMS, strict=True))
        )
        self.topdown = nn.ModuleList(
            _Convs((mask_dim >> i, mask_dim >> i, mask_dim >> i + 1), pad_mode) for i in range(4)
        )
        self.predict = nn.Conv2d(mask_dim >> 4, 1, kernel_size=3)

    def laterals(self, features: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return what the features contribute, (N, mask_dim / 2^(i+1), H, W) each.

        Over a whole map, windows see beyond their borders here; in training, they see their mirror
        image. So it is in the authors' code.
        """
        maps = (features[name] for name in REFINE_FEATURES)
        return tuple(net(x) for net, x in zip(self.lateral, maps, strict=True))

    def forward(self, codes: Tensor, laterals: Sequence[Tensor]) -> Tensor:
        """Return masks.

        Args:
            codes: (n, C) of the windows.
            laterals: of the same windows, (n, mask_dim / 2^(i+1), f, f).

        Returns:
            (n, 16 * cells, 16 * cells) logits.
        """
        x = self.encode(codes).unflatten(1, (-1, self.cells, self.cells))
        if laterals[0].is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        for topdown, lateral in zip(self.topdown, laterals, strict=True):
            x = F.relu(lateral + topdown(x))
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.predict(mirror_pad(x, 1, self.pad_mode)).squeeze(1)


class SharpMaskHead(DeepMaskHead):
    """DeepMask's head and the refinement."""

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        mask_dim: int,
        pad_mode: str,
        **options: Any,
    ) -> None:
        """Build the layers.

        Args:
            input_shape: of the trunk's features.
            mask_dim: see ``Refinement``.
            pad_mode: see ``Refinement``.
            **options: of ``DeepMaskHead``.

        Raises:
            ValueError: if the trunk lacks a feature.
        """
        super().__init__(input_shape, **options)
        missing = [name for name in REFINE_FEATURES if name not in input_shape]
        if missing:
            raise ValueError(
                f"SharpMask needs the trunk's features {', '.join(reversed(REFINE_FEATURES))}: add "
                f"{', '.join(reversed(missing))} to MODEL.RESNETS.OUT_FEATURES."
            )
        self.refine = Refinement(
            [input_shape[name].channels for name in REFINE_FEATURES],
            code_dim=options["code_dim"],
            cells=self.cells,
            mask_dim=mask_dim,
            pad_mode=pad_mode,
        )

    def forward(self, features: dict[str, Tensor]) -> WindowMaps:
        """Return what the windows of a map have in common, see the base class."""
        maps = super().forward(features)
        return maps._replace(laterals=self.refine.laterals(features))
