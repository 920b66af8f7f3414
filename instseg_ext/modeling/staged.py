"""What the trunks made of stages in a row have in common."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone
from torch import Tensor, nn

from instseg_ext.config import check_choice

__all__ = ["StagedBackbone", "check_out_features", "freeze", "stages_up_to"]


def check_out_features(key: str, names: Sequence[str], stages: Sequence[str]) -> Sequence[str]:
    """Return ``names``, the value of config key ``key``.

    Raises:
        ValueError: if ``names`` is empty or has one that is not among ``stages``.
    """
    for name in names or [""]:
        check_choice(key, name, stages)
    return names


def stages_up_to(stages: Sequence[str], out_features: Sequence[str]) -> Sequence[str]:
    """Return ``stages`` up to the last one that ``out_features`` names."""
    return stages[: max(stages.index(name) for name in out_features) + 1]


def freeze(module: nn.Module) -> None:
    """Stop training ``module``, its batch norms' running statistics included, in place."""
    module.requires_grad_(False)
    FrozenBatchNorm2d.convert_frozen_batchnorm(module)


class StagedBackbone(Backbone):
    """A stem and stages in a row; the output of a stage is the feature of its name.

    A subclass assigns ``stem``, calls ``add_stage`` for each stage in order, then
    ``freeze_parts``.
    """

    stem: nn.Module

    def __init__(self, out_features: Sequence[str]) -> None:
        """Create a backbone without stages.

        Args:
            out_features: names of the features wanted.
        """
        super().__init__()
        self._wanted = frozenset(out_features)
        self._out_features: list[str] = []
        self._out_feature_channels: dict[str, int] = {}
        self._out_feature_strides: dict[str, int] = {}

    def add_stage(self, name: str, stage: nn.Module, *, channels: int, stride: int) -> None:
        """Append a stage.

        Args:
            name: of the submodule and of the feature.
            stage: maps the output of the stage before it.
            channels: of its output.
            stride: of its output, in pixels of the image.
        """
        self.add_module(name, stage)
        self._out_feature_channels[name] = channels
        self._out_feature_strides[name] = stride
        if name in self._wanted:
            self._out_features.append(name)

    def freeze_parts(self, count: int) -> None:
        """Freeze the first ``count`` parts; the stem is the first."""
        for name in ("stem", *self._out_feature_strides)[:count]:
            freeze(self.get_submodule(name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of an image batch.

        Args:
            x: (N, C, H, W).

        Returns:
            The wanted features by name, each (N, channels, H / stride, W / stride), rounded up.
        """
        features = {}
        x = self.stem(x)
        for name in self._out_feature_strides:
            x = self.get_submodule(name)(x)
            if name in self._wanted:
                features[name] = x
        return features
