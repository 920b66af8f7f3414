"""The network of YOLACT++ (arXiv:1912.06218) that predicts how good a mask is."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from instseg_ext.methods.yolact.convs import build_conv

__all__ = ["MaskIoUNet"]

_WIDTHS = (1, 8, 16, 32, 64, 128)
# Five unpadded 3x3 convolutions of stride 2 make one pixel of it.
_SMALLEST = 63


class MaskIoUNet(nn.Module):
    """Five strided convolutions, one 1x1 convolution to the classes, and a global maximum.

    Note:
        A ReLU follows every convolution, the last one too: predictions are not negative, and
        nothing bounds them above. Masks of less than 63 pixels per side are filled up with zeros at
        the bottom and right; the authors' network fails on them.
    """

    def __init__(self, num_classes: int) -> None:
        """Create the convolutions.

        Args:
            num_classes: K, without background.
        """
        super().__init__()
        for i, (a, b) in enumerate(pairwise(_WIDTHS), start=1):
            self.add_module(f"conv{i}", build_conv(a, b, stride=2, padding=0, relu=True))
        self.pred = build_conv(_WIDTHS[-1], num_classes, 1, relu=True)

    def forward(self, masks: Tensor) -> Tensor:
        """Predict the IoU of each mask with its object.

        Args:
            masks: (n, 1, h, w) probabilities at the prototypes' size, zero outside the box.

        Returns:
            (n, K), one prediction for each class the mask may have.
        """
        height, width = masks.shape[-2:]
        x = masks
        if min(height, width) < _SMALLEST:
            x = F.pad(x, (0, max(0, _SMALLEST - width), 0, max(0, _SMALLEST - height)))
        for layer in self.children():
            x = layer(x)
        return x.amax(dim=(2, 3))
