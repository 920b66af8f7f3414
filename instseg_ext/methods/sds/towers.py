"""The networks of SDS: one sees the box of a region, one the region alone (Sec. 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CaffeNet", "PooledBackbone", "TwoPathway"]


class CaffeNet(nn.Module):
    """AlexNet as Caffe ships it: pooling before normalisation, and the output of fc7."""

    def __init__(self, window: int, width: int = 64, fc_dim: int = 4096) -> None:
        """Make the layers with Caffe's initial weights.

        Args:
            window: pixels of a side of the input.
            width: a sixth of the widest layer; 64 as published: 96, 256, 384, 384, 256 channels.
            fc_dim: features.
        """
        super().__init__()
        one, two, three = width * 3 // 2, width * 4, width * 6
        self.conv1 = nn.Conv2d(3, one, 11, stride=4)
        self.conv2 = nn.Conv2d(one, two, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(two, three, 3, padding=1)
        self.conv4 = nn.Conv2d(three, three, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(three, two, 3, padding=1, groups=2)
        side = (window - 11) // 4 + 1
        for _ in range(3):
            side = _pooled(side)
        if side < 1:
            raise ValueError(f"Windows of {window} pixels are too small for CaffeNet.")
        self.fc6 = nn.Linear(two * side * side, fc_dim)
        self.fc7 = nn.Linear(fc_dim, fc_dim)
        self.num_features = fc_dim
        for name, layer in self.named_children():
            nn.init.normal_(layer.weight, std=0.005 if name.startswith("fc") else 0.01)
            nn.init.constant_(layer.bias, float(name not in ("conv1", "conv3")))

    def forward(self, windows: Tensor) -> Tensor:
        """Return (N, fc_dim) features of (N, 3, window, window)."""
        x = self._pool_and_normalise(self.conv1(windows))
        x = self._pool_and_normalise(self.conv2(x))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(F.relu(self.conv5(x)), 3, 2, ceil_mode=True)
        for layer in (self.fc6, self.fc7):
            x = F.dropout(F.relu(layer(x.flatten(1))), 0.5, self.training)
        return x

    @staticmethod
    def _pool_and_normalise(x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(x), 3, 2, ceil_mode=True)
        return F.local_response_norm(x, 5, alpha=1e-4, beta=0.75)


def _pooled(side: int) -> int:
    """Return what Caffe's pooling, 3 x 3 at stride 2, leaves of a side."""
    return -(-max(side - 3, 0) // 2) + 1 if side > 0 else 0


class PooledBackbone(nn.Module):
    """Any backbone of detectron2 as a tower: its last map, averaged over the window."""

    def __init__(self, bottom_up: nn.Module) -> None:
        """Keep the backbone, whose last feature is read."""
        super().__init__()
        self.bottom_up = bottom_up
        name, shape = list(bottom_up.output_shape().items())[-1]
        self._feature = name
        self.num_features = shape.channels

    def forward(self, windows: Tensor) -> Tensor:
        """Return (N, C) features of (N, 3, window, window)."""
        return self.bottom_up(windows)[self._feature].mean(dim=(2, 3))


class TwoPathway(nn.Module):
    """Features of windows and of the same windows without what is beside the region.

    Attributes:
        box: network that sees whole windows.
        region: network that sees the region alone.
        num_features: D, of both together.
    """

    def __init__(self, box: nn.Module, region: nn.Module) -> None:
        """Keep the networks."""
        super().__init__()
        self.box = box
        self.region = region
        self.num_features = box.num_features + region.num_features

    def forward(self, windows: Tensor, inside: Tensor) -> Tensor:
        """Return (N, D) features.

        Args:
            windows: (N, 3, S, S), where 0 is the mean colour.
            inside: (N, S, S) bool, the pixels of the region.
        """
        alone = windows * inside[:, None]
        return torch.cat([self.box(windows), self.region(alone)], dim=1)

    def rename_old_names(self, weights: dict[str, Any], prefix: str) -> None:
        """Give the weights of a single network, such as one for ImageNet, to both pathways.

        Args:
            weights: of a file; changed in place.
            prefix: of this module in the model, ``"backbone."``.
        """
        ours = (prefix, "head.")
        if any(name.startswith(ours) for name in weights):
            return
        inner = "bottom_up." if hasattr(self.box, "bottom_up") else ""
        single: Mapping[str, Any] = dict(weights)
        weights.clear()
        for path in ("box", "region"):
            for name, value in single.items():
                weights[f"{prefix}{path}.{inner}{name.removeprefix(inner)}"] = value
