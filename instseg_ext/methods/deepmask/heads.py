"""DeepMask's heads, in the form that slides over a map of any size.

A window is a square of ``cells`` x ``cells`` on the trunk's map (10 x 10 for 160 pixels). What is
fully connected for one window is a convolution of that size for all of them.

Shapes: N images, h x w windows of each, C the length of a window's code, m the side of masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from instseg_ext.methods.deepmask.config import TRUNK_STRIDE

__all__ = ["DeepMaskHead", "MaskBranch", "ScoreBranch", "SeparateScoreBranch", "WindowMaps"]


class WindowMaps(NamedTuple):
    """Raw outputs: what is computed for all windows.

    Attributes:
        codes: (N, C, h, w), from which the mask of a window is made.
        scores: (N, h, w) logits.
        laterals: of SharpMask, coarse to fine: (N, c, H, W) whose windows have ``cells`` times
            1, 2, 4, 8 lines and begin at as many times their index; () for DeepMask.
    """

    codes: Tensor
    scores: Tensor
    laterals: tuple[Tensor, ...] = ()


class MaskBranch(nn.Module):
    """Masks from codes: one linear layer."""

    def __init__(self, code_dim: int, out_size: int) -> None:
        """Build the layer.

        Args:
            code_dim: length of a code, C.
            out_size: side of the masks, m.
        """
        super().__init__()
        self.out_size = out_size
        self.fc = nn.Linear(code_dim, out_size**2)

    def forward(self, codes: Tensor) -> Tensor:
        """Map (n, C) codes to (n, m, m) logits."""
        return self.fc(codes).unflatten(1, (self.out_size, self.out_size))


class ScoreBranch(nn.Module):
    """Scores from codes: two layers."""

    def __init__(self, code_dim: int, hidden_dim: int, dropout: float) -> None:
        """Build the layers.

        Args:
            code_dim: length of a code, C.
            hidden_dim: outputs of the first layer.
            dropout: share of inputs dropped in training before both layers.
        """
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(code_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, 1)

    def forward(self, codes: Tensor) -> Tensor:
        """Map (N, C, h, w) codes to (N, h, w) logits."""
        x = F.dropout(codes.permute(0, 2, 3, 1), self.dropout, self.training)
        x = F.dropout(F.relu(self.fc1(x)), self.dropout, self.training)
        return self.fc2(x).squeeze(3)


class SeparateScoreBranch(ScoreBranch):
    """The score branch of the first paper, with a code of its own from the trunk's pooled map."""

    def __init__(
        self, in_channels: int, cells: int, code_dim: int, hidden_dim: int, dropout: float
    ) -> None:
        """Build the layers.

        Args:
            in_channels: of the trunk's map.
            cells: side of a window on that map; even.
            code_dim: see ``ScoreBranch``.
            hidden_dim: see ``ScoreBranch``.
            dropout: see ``ScoreBranch``.
        """
        super().__init__(code_dim, hidden_dim, dropout)
        self.encode = nn.Conv2d(in_channels, code_dim, kernel_size=cells // 2, dilation=2)

    def forward(self, features: Tensor) -> Tensor:
        """Map the trunk's (N, C_in, H, W) to (N, h, w) logits.

        Pooling halves the map of a window. Over an image, the four maps that begin at even and odd
        cells interleave to one of the full size, which a convolution with dilation 2 reads.
        """
        pooled = F.max_pool2d(features, kernel_size=2, stride=1)
        return super().forward(F.relu(self.encode(pooled)))


class DeepMaskHead(nn.Module):
    """Code and score of every window; masks for those asked for."""

    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_feature: str,
        window_size: int,
        reduce_dim: int,
        code_dim: int,
        out_size: int,
        score_dim: int,
        score_dropout: float,
        separate: bool = False,
    ) -> None:
        """Build the layers.

        Weights and biases of new layers are drawn uniformly from +-1/sqrt(inputs), torch's default
        and the authors'.

        Args:
            input_shape: of the trunk's features.
            in_feature: name of the one at stride 16.
            window_size: side of a window in pixels.
            reduce_dim: channels of the 1x1 convolution before the code.
            code_dim: length of a window's code, C.
            out_size: side of the masks, m.
            score_dim: outputs of the score branch's hidden layer.
            score_dropout: see ``ScoreBranch``.
            separate: the score has its own layers on the trunk.

        Raises:
            ValueError: if the trunk has no such feature, or it is not at stride 16.
        """
        super().__init__()
        shape = input_shape.get(in_feature)
        if shape is None or shape.stride != TRUNK_STRIDE:
            known = {name: spec.stride for name, spec in input_shape.items()}
            raise ValueError(
                f"DeepMask's heads need a feature of stride {TRUNK_STRIDE}, but the backbone has "
                f"{known}: see MODEL.BACKBONE.NAME and its OUT_FEATURES."
            )
        self.in_feature, self.cells, self.separate = (
            in_feature,
            window_size // TRUNK_STRIDE,
            separate,
        )
        self.reduce = nn.Conv2d(shape.channels, reduce_dim, kernel_size=1)
        self.encode = nn.Conv2d(reduce_dim, code_dim, kernel_size=self.cells)
        self.mask = MaskBranch(code_dim, out_size)
        if separate:
            self.score: ScoreBranch = SeparateScoreBranch(
                shape.channels, self.cells, code_dim, score_dim, score_dropout
            )
        else:
            self.score = ScoreBranch(code_dim, score_dim, score_dropout)

    def forward(self, features: dict[str, Tensor]) -> WindowMaps:
        """Return what the windows of a map have in common.

        Args:
            features: of the trunk, H x W cells at stride 16, at least as large as a window.

        Returns:
            The raw outputs for h = H - cells + 1 times w = W - cells + 1 windows.
        """
        trunk = features[self.in_feature]
        codes = self.encode(F.relu(self.reduce(trunk)))
        return WindowMaps(codes, self.score(trunk if self.separate else codes))
