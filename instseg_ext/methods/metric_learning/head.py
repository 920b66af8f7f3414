"""The two heads: embeddings, and classes of the masks that cells would give.

Shape shorthand: N images, h x w cells, D numbers of an embedding, T similarities, C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn

from instseg_ext.methods.metric_learning.pyramid import resize_to
from instseg_ext.modeling.towers import DeformOptions, build_predictor, build_tower

__all__ = ["DeepMetricHead", "DeepMetricOutputs"]


class DeepMetricOutputs(NamedTuple):
    """Raw outputs of a batch, float32.

    Attributes:
        embeddings: (N, D, h, w).
        class_logits: (N, T, C + 1, h, w); the background is the last class.
    """

    embeddings: Tensor
    class_logits: Tensor


class _Branch(nn.Module):
    """Convolutions and a predictor."""

    def __init__(
        self, channels: int, out_channels: int, *, num_convs: int, width: int, norm: str, extra: int
    ) -> None:
        super().__init__()
        self.convs = build_tower(channels, width, num_convs, norm, DeformOptions())
        last = width if num_convs else channels
        # Small weights: at the start all cells are alike, which is where the loss has a gradient.
        self.predictor = build_predictor(last + extra, out_channels, 0.0, kernel_size=1)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = self.convs(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self.predictor(x if extra is None else torch.cat([x, extra], dim=1))


class DeepMetricHead(nn.Module):
    """Concatenates the maps of all scales and predicts."""

    def __init__(
        self,
        in_channels: int,
        *,
        stride: int,
        num_scales: int,
        reduce_dim: int,
        num_classes: int,
        num_taus: int,
        embed_dim: int,
        num_convs: int,
        width: int,
        norm: str,
        coord_unit: float = 0.0,
    ) -> None:
        """Build the layers; see the config keys of the same names.

        Args:
            in_channels: of the backbone's map.
            stride: of it, in pixels.
            num_scales: maps that are concatenated.
            reduce_dim: channels of each of them after a 1x1 convolution; 0 = no such layer.
            num_classes: C.
            num_taus: T.
            embed_dim: D.
            num_convs: of each branch.
            width: their channels.
            norm: their normalisation.
            coord_unit: pixels; 0.0 = embeddings do not see where their cell is.
        """
        super().__init__()
        self.stride, self.num_taus, self.coord_unit = stride, num_taus, coord_unit
        self.reduce = None
        if reduce_dim:
            self.reduce = Conv2d(in_channels, reduce_dim, 1)
            nn.init.kaiming_normal_(self.reduce.weight, nonlinearity="linear")
            nn.init.zeros_(self.reduce.bias)
        channels = (reduce_dim or in_channels) * num_scales
        style = {"num_convs": num_convs, "width": width, "norm": norm}
        extra = 2 if coord_unit else 0
        self.embed_head = _Branch(channels, embed_dim, extra=extra, **style)
        self.cls_head = _Branch(channels, num_taus * (num_classes + 1), extra=0, **style)

    def forward(self, features: dict[str, Tensor]) -> DeepMetricOutputs:
        """Predict for every cell.

        Args:
            features: maps by scale, see ``ScalePyramid``; that of scale 1.0 gives the cells.
        """
        size = features["1.0"].shape[-2:]
        maps = [x if self.reduce is None else self.reduce(x) for x in features.values()]
        maps = [resize_to(x, size) for x in maps]
        x = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        coords = None
        if self.coord_unit:
            coords = self._coords(size, x.device).expand(len(x), -1, -1, -1)
        logits = self.cls_head(x)
        return DeepMetricOutputs(
            embeddings=self.embed_head(x, coords),
            class_logits=logits.unflatten(1, (self.num_taus, -1)),
        )

    def _coords(self, size: torch.Size, device: torch.device) -> Tensor:
        """Return (1, 2, h, w), x before y, of the middles of cells."""
        # In pixels from the corner: padding and the size of the image change nothing.
        y, x = (
            (torch.arange(n, device=device) + 0.5) * self.stride / self.coord_unit for n in size
        )
        return torch.stack([x.expand(size), y[:, None].expand(size)])[None]
