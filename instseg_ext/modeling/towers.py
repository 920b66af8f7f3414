"""Convolution towers that heads of dense methods are made of."""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from torch import nn

from instseg_ext.layers.deform_conv import DeformConvPack

__all__ = ["DeformOptions", "build_block", "build_predictor", "build_tower"]


@dataclass(frozen=True)
class DeformOptions:
    """Where the head uses deformable convolution; see the config keys of the same names.

    Attributes:
        towers: ``none``, ``last`` or ``all`` convolutions of each tower.
        mask_features: all convolutions of the mask features.
        modulated: v2 instead of v1.
        bias: see ``build_block``.
    """

    towers: str = "none"
    mask_features: bool = False
    modulated: bool = False
    bias: bool = False

    def in_tower(self, index: int, num_convs: int) -> bool:
        """Tell whether convolution ``index`` of a tower is deformable."""
        return self.towers == "all" or (self.towers == "last" and index == num_convs - 1)


def build_block(
    in_dim: int,
    out_dim: int,
    kernel_size: int,
    norm: str,
    *,
    deform: bool = False,
    modulated: bool = False,
    bias: bool = False,
) -> nn.Module:
    """Return (deformable) convolution, normalisation, ReLU.

    Args:
        in_dim: input channels.
        out_dim: output channels.
        kernel_size: odd; the size of the map is kept.
        norm: normalisation layer.
        deform: deformable convolution.
        modulated: version 2 of it.
        bias: whether a deformable convolution has a bias, zero at the start. Its weights then start
            uniform within 1 / sqrt(fan in), as such layers do by themselves, where all others start
            normal with deviation 0.01.
    """
    options = {
        "padding": kernel_size // 2,
        "bias": deform and bias,
        "norm": get_norm(norm, out_dim),
        "activation": F.relu_,
    }
    if deform:
        conv = DeformConvPack(in_dim, out_dim, kernel_size, modulated=modulated, **options)
    else:
        conv = Conv2d(in_dim, out_dim, kernel_size, **options)
    if conv.bias is None:
        nn.init.normal_(conv.weight, std=0.01)
    else:
        bound = conv.weight[0].numel() ** -0.5
        nn.init.uniform_(conv.weight, -bound, bound)
    return conv


def build_tower(
    in_dim: int, width: int, num_convs: int, norm: str, deform: DeformOptions
) -> nn.Sequential:
    """Return ``num_convs`` 3x3 blocks from ``in_dim`` to ``width`` channels."""
    dims = [in_dim] + [width] * num_convs
    style = {"modulated": deform.modulated, "bias": deform.bias}
    return nn.Sequential(
        *(
            build_block(a, b, 3, norm, deform=deform.in_tower(q, num_convs), **style)
            for q, (a, b) in enumerate(pairwise(dims))
        )
    )


def build_predictor(in_dim: int, out_dim: int, bias: float, kernel_size: int = 3) -> Conv2d:
    """Return a convolution with small weights and a constant bias."""
    conv = Conv2d(in_dim, out_dim, kernel_size, padding=kernel_size // 2)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv
