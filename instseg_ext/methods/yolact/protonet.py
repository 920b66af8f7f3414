"""The branch that makes the prototype masks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from instseg_ext.methods.yolact.convs import build_conv

__all__ = ["ProtoNet"]


class ProtoNet(nn.Module):
    """Four 3x3 convolutions, one doubling of the size, and a 1x1 convolution, all with ReLU.

    Fig. 3 of arXiv:1904.02689.
    """

    def __init__(self, in_channels: int, *, width: int = 256, num_protos: int = 32) -> None:
        """Create the convolutions.

        Args:
            in_channels: channels of the finest pyramid level.
            width: channels between.
            num_protos: k.
        """
        super().__init__()
        self.conv1 = build_conv(in_channels, width, relu=True)
        self.conv2 = build_conv(width, width, relu=True)
        self.conv3 = build_conv(width, width, relu=True)
        self.conv4 = build_conv(width, width, relu=True)
        self.pred = build_conv(width, num_protos, 1, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to prototypes (N, k, 2H, 2W), not negative."""
        x = self.conv3(self.conv2(self.conv1(x)))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.pred(self.conv4(x))
