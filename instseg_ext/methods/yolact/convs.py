"""The one kind of convolution that YOLACT has outside its backbone's trunk."""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import nn

__all__ = ["build_conv"]


def build_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: int | None = None,
    relu: bool = False,
) -> Conv2d:
    """Return a convolution with bias and no norm, weight Xavier-uniform, bias zero.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: odd.
        stride: in both directions.
        padding: on every side; None keeps the size of the map at stride 1.
        relu: whether a ReLU follows.
    """
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2 if padding is None else padding,
        activation=F.relu_ if relu else None,
    )
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv
