"""The layers behind the pooled crops: one tower for each, and one more for the boxes.

Shapes: R regions, C channels of all maps that a tower reads, P side of the pooled maps, D outputs
of a tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from instseg_ext.modeling.res5_tower import Res5Tower

__all__ = [
    "Mixer",
    "MultiPathBoxHead",
    "RegionFeatures",
    "SharedLayers",
    "Tower",
]

# First parts of the names in a tower, and what ImageNet models call these layers.
_IMAGENET_NAMES = {"fc6": "fc6", "fc7": "fc7", "blocks": "res5"}


class RegionFeatures(NamedTuple):
    """What the predictors read.

    Attributes:
        classes: (R, D times the number of crops), of all crops.
        boxes: (R, D) of the boxes' own tower; without one the same as ``classes``.
    """

    classes: Tensor
    boxes: Tensor


class Mixer(nn.Module):
    """Puts the maps of a tower together, and mixes them with a 1x1 convolution without ReLU."""

    def __init__(self, channels: int, mix_dim: int, copied: int = 0) -> None:
        """Create the convolution.

        Args:
            channels: C.
            mix_dim: outputs; 0 for no convolution.
            copied: so many of the first channels are passed on as they are at the beginning, and
                the others are not; 0: random weights.
        """
        super().__init__()
        # PyTorch's initial weights are those of Torch, uniform within 1 / sqrt(C).
        self.mix = nn.Conv2d(channels, mix_dim, 1) if mix_dim else None
        self.mixed = mix_dim or channels
        if self.mix is not None and copied:
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)
            with torch.no_grad():
                self.mix.weight[:, :copied, 0, 0] = torch.eye(mix_dim, copied)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn the features of each map, (R, C_m, P, P), into (R, mixed, P, P)."""
        x = torch.cat(list(maps), dim=1) if len(maps) > 1 else maps[0]
        return x if self.mix is None else self.mix(x)


class SharedLayers(nn.Module):
    """``fc6`` and ``fc7`` of VGG for all towers, each with ReLU and dropout."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float) -> None:
        """Create the layers; ``dropout`` is the share of their outputs that training drops."""
        super().__init__()
        self.out_dim, self.dropout = out_dim, dropout
        self.fc6, self.fc7 = _two_layers(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (R, C, P, P) to (R, D)."""
        return _run_layers(x, (self.fc6, self.fc7), self.dropout, self.training)


class Tower(Mixer):
    """A mixer and its own ``fc6`` and ``fc7``."""

    def __init__(
        self,
        channels: int,
        mix_dim: int,
        copied: int = 0,
        *,
        size: int,
        out_dim: int,
        dropout: float,
    ) -> None:
        """Create the layers.

        Args:
            channels: C.
            mix_dim: see ``Mixer``.
            copied: see ``Mixer``.
            size: P.
            out_dim: D.
            dropout: share of the layers' outputs that training drops.
        """
        super().__init__(channels, mix_dim, copied)
        self.out_dim, self.dropout = out_dim, dropout
        self.fc6, self.fc7 = _two_layers(self.mixed * size**2, out_dim)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Turn the features of each map, (R, C_m, P, P), into (R, D)."""
        x = super().forward(maps)
        return _run_layers(x, (self.fc6, self.fc7), self.dropout, self.training)


def _two_layers(in_dim: int, out_dim: int) -> tuple[nn.Linear, nn.Linear]:
    layers = nn.Linear(in_dim, out_dim), nn.Linear(out_dim, out_dim)
    for layer in layers:
        c2_xavier_fill(layer)
    return layers


def _run_layers(x: Tensor, layers: Sequence[nn.Module], dropout: float, training: bool) -> Tensor:
    x = x.flatten(1)
    for layer in layers:
        x = F.dropout(F.relu_(layer(x)), dropout, training)
    return x


class MultiPathBoxHead(nn.Module):
    """The towers of all crops, and the one of the boxes behind them if there is one."""

    def __init__(
        self, towers: Sequence[nn.Module], *, het: bool, shared: SharedLayers | None = None
    ) -> None:
        """Keep the parts.

        Args:
            towers: one for each view, (R, D) each; mixers with ``shared``.
            het: the last of them is for the boxes alone.
            shared: the layers of all towers, None if each has its own.
        """
        super().__init__()
        self.towers, self.shared, self.het = nn.ModuleList(towers), shared, het
        out_dim = towers[0].out_dim if shared is None else shared.out_dim
        self.class_dim = out_dim * (len(towers) - het)
        self.box_dim = out_dim if het else self.class_dim

    def forward(self, pooled: Sequence[Sequence[Tensor]]) -> RegionFeatures:
        """Run the towers.

        Args:
            pooled: of ``FovealPooler``.
        """
        outputs = [
            tower(maps[0] if isinstance(tower, Res5Tower) else maps)
            for tower, maps in zip(self.towers, pooled, strict=True)
        ]
        if self.shared is not None:
            outputs = [self.shared(x) for x in outputs]
        boxes = outputs.pop() if self.het else None
        classes = torch.cat(outputs, dim=1)
        return RegionFeatures(classes, classes if boxes is None else boxes)

    def take_imagenet_layers(self, weights: dict[str, Any], prefix: str) -> None:
        """Start all towers from the last layers of an ImageNet model.

        Args:
            weights: by name; changed in place. ``fc6`` and ``fc7`` of a VGG, or ``res5`` of a
                ResNet, go to every tower that fits them.
            prefix: of the new names.
        """
        taken = set()
        for name, own in self.state_dict().items():
            parts = name.split(".")
            start = 1 if parts[0] == "shared" else 2
            old = ".".join([_IMAGENET_NAMES.get(parts[start], ""), *parts[start + 1 :]])
            if old in weights and weights[old].shape == own.shape:
                weights[prefix + name] = weights[old]
                taken.add(old)
        for name in taken:
            del weights[name]
