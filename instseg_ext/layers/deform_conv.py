"""Deformable convolution v1 and v2 (arXiv:1703.06211, arXiv:1811.11168) for every device.

On CUDA the operator of torchvision does the work. On the CPU that operator is slow, barely threads
and refuses bfloat16, so a form made of one weighted row gather and one matrix product replaces it;
both give the same values and gradients.

Shapes: N images, C input channels, O output channels, G offset groups, K = kh * kw kernel taps, H x
W input and Ho x Wo output size, P = N * Ho * Wo output pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d as _torchvision_deform_conv2d

__all__ = ["DeformConv", "DeformConvPack", "deform_conv2d", "split_offset_mask"]

_COLUMN_BYTES = 64 * 2**20  # columns of one matrix product; larger calls are cut in pieces


def split_offset_mask(raw: Tensor, modulated: bool) -> tuple[Tensor, Tensor | None]:
    """Split the output of an offset convolution.

    Args:
        raw: (N, 2GK, Ho, Wo), or (N, 3GK, Ho, Wo) when modulated: first two thirds offsets, (dy,
            dx) interleaved per tap, last third the logits of the modulation.
        modulated: deformable convolution v2.

    Returns:
        (N, 2GK, Ho, Wo) offsets and (N, GK, Ho, Wo) modulation in (0, 1), None for v1.
    """
    if not modulated:
        return raw, None
    third = raw.shape[1] // 3
    offset, logits = raw.split([2 * third, third], dim=1)
    return offset, logits.sigmoid()


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """Convolve with a kernel whose taps are moved by ``offset``; zero outside the map.

    Computed in float32 whatever the input and the surrounding autocast are, float64 inputs in
    float64.

    Args:
        x: (N, C, H, W).
        offset: (N, 2GK, Ho, Wo), (dy, dx) interleaved per tap, in input pixels.
        weight: (O, C / groups, kh, kw); the number of groups follows from its shape.
        bias: (O,).
        stride: rows, columns.
        padding: rows, columns.
        dilation: rows, columns.
        mask: (N, GK, Ho, Wo) factor of each sample (v2), or None (v1).
        method: "auto" takes "gather" on the CPU and "torchvision" elsewhere.

    Returns:
        (N, O, Ho, Wo) in the dtype of ``x``, channels_last in memory when gathered.

    Raises:
        ValueError: if ``method`` is unknown.
    """
    if method not in ("auto", "gather", "torchvision"):
        raise ValueError(f'method must be "auto", "gather" or "torchvision", got {method!r}')
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        tensors = [None if t is None else t.to(dtype) for t in (x, offset, weight, bias, mask)]
        if x.numel() == 0 or offset.numel() == 0:
            out = _empty(*tensors[:4], stride, padding, dilation)
        elif method == "gather" or (method == "auto" and x.device.type == "cpu"):
            out = _gather_form(*tensors, stride, padding, dilation)
        else:
            xs, offsets, weights, biases, masks = tensors
            out = _torchvision_deform_conv2d(
                xs, offsets, weights, biases, stride, padding, dilation, masks
            )
    return out.to(x.dtype)


def _empty(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Return the empty result, connected to every input: all parameters get a gradient."""
    groups = x.shape[1] // weight.shape[1]
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return out + 0 * offset.sum()


def _sample_taps(
    offset: Tensor,
    mask: Tensor | None,
    size_hw: tuple[int, int],
    kernel_hw: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return the four neighbours of each sample point and their weights.

    Returns:
        Rows of the (N * H * W * G, C / G) table of the input, (P, K * G, 4) int64, and their
        bilinear weights times the modulation, same shape, zero outside the map; only the weights
        carry gradient.
    """
    num, _, out_h, out_w = offset.shape
    height, width = size_hw
    taps = kernel_hw[0] * kernel_hw[1]
    groups = offset.shape[1] // (2 * taps)
    line = [torch.arange(n, device=offset.device) for n in (num, out_h, out_w, groups)]
    tap = torch.arange(taps, device=offset.device)
    tap_y = tap // kernel_hw[1] * dilation[0] - padding[0]
    tap_x = tap % kernel_hw[1] * dilation[1] - padding[1]
    # (N, Ho, Wo, K, G) each
    moved = offset.view(num, groups, taps, 2, out_h, out_w).permute(3, 0, 4, 5, 2, 1)
    y = moved[0] + (line[1][:, None] * stride[0] + tap_y)[:, None, :, None]
    x = moved[1] + (line[2][:, None] * stride[1] + tap_x)[:, :, None]
    top, left = y.detach().floor(), x.detach().floor()
    frac_y, frac_x = y - top, x - left
    top, left = top.long(), left.long()
    rows = torch.stack([top, top, top + 1, top + 1], dim=-1)
    cols = torch.stack([left, left + 1, left, left + 1], dim=-1)
    weight_y = torch.stack([1 - frac_y, 1 - frac_y, frac_y, frac_y], dim=-1)
    weight_x = torch.stack([1 - frac_x, frac_x, 1 - frac_x, frac_x], dim=-1)
    valid = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    weights = weight_y * weight_x * valid
    if mask is not None:
        factor = mask.view(num, groups, taps, out_h, out_w).permute(0, 3, 4, 2, 1)
        weights = weights * factor[..., None]
    pixel = rows.clamp(0, height - 1) * width + cols.clamp(0, width - 1)
    pixel = pixel + (line[0] * (height * width)).view(-1, 1, 1, 1, 1, 1)
    index = pixel * groups + line[3][:, None]
    shape = (num * out_h * out_w, taps * groups, 4)
    return index.reshape(shape), weights.reshape(shape)


def _columns_product(table: Tensor, index: Tensor, weights: Tensor, kernel: Tensor) -> Tensor:
    """Sample the columns of some output pixels and multiply them with the kernel.

    Args:
        table: (rows, C / G), the input.
        index: (p, K * G, 4) rows of the table.
        weights: (p, K * G, 4).
        kernel: (groups, K, C / groups, O / groups).

    Returns:
        (p, O).
    """
    columns = F.embedding_bag(
        index.reshape(-1, 4), table, mode="sum", per_sample_weights=weights.reshape(-1, 4)
    )
    groups, taps, depth, _ = kernel.shape
    flat = kernel.flatten(1, 2)
    if groups == 1:
        return columns.view(len(index), taps * depth) @ flat[0]
    columns = columns.view(len(index), taps, groups, depth).permute(2, 0, 1, 3).flatten(2)
    return torch.bmm(columns, flat).transpose(0, 1).flatten(1)


def _gather_form(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Compute ``deform_conv2d`` as row gathers and matrix products, in pieces of bounded memory."""
    num, channels, height, width = x.shape
    out_channels, depth, kernel_h, kernel_w = weight.shape
    groups, taps = channels // depth, kernel_h * kernel_w
    out_h, out_w = offset.shape[2:]
    index, weights = _sample_taps(
        offset, mask, (height, width), (kernel_h, kernel_w), stride, padding, dilation
    )
    table = x.permute(0, 2, 3, 1).reshape(-1, channels * taps // index.shape[1])
    kernel = weight.view(groups, out_channels // groups, depth, taps).permute(0, 3, 2, 1)
    piece = max(1, _COLUMN_BYTES // (taps * channels * x.element_size()))
    if len(index) <= piece:
        out = _columns_product(table, index, weights, kernel)
    else:
        # Recomputing the columns in the backward pass keeps them out of memory in between.
        parts = zip(index.split(piece), weights.split(piece), strict=True)
        out = torch.cat(
            [
                checkpoint(_columns_product, table, i, w, kernel, use_reentrant=False)
                if torch.is_grad_enabled()
                else _columns_product(table, i, w, kernel)
                for i, w in parts
            ]
        )
    if bias is not None:
        out = out + bias
    return out.view(num, out_h, out_w, out_channels).permute(0, 3, 1, 2)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class DeformConv(nn.Module):
    """Deformable convolution whose offsets come from outside.

    Takes the arguments of detectron2's ``DeformConv`` and ``ModulatedDeformConv`` and has their
    parameter names: ``weight``, ``bias`` when asked for, ``norm``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Create the parameters: weight Kaiming-normal of the fan out, bias zero.

        Raises:
            ValueError: if channels are not divisible by ``groups`` or ``deformable_groups``.
        """
        super().__init__()
        if in_channels % groups or out_channels % groups or in_channels % deformable_groups:
            raise ValueError(
                f"deformable convolution of {in_channels} to {out_channels} channels cannot have "
                f"groups={groups} and deformable_groups={deformable_groups}: both must divide them"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)
        self.groups, self.deformable_groups = groups, deformable_groups
        self.norm, self.activation = norm, activation
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve, normalise, activate; shapes as in ``deform_conv2d``, ``mask`` for v2 only."""
        x = deform_conv2d(
            x,
            offset,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask,
        )
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def extra_repr(self) -> str:
        """Return the arguments for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, deformable_groups={self.deformable_groups}"
        )


class DeformConvPack(DeformConv):
    """Deformable convolution with its own offset convolution ``offset``, which starts at zero.

    At zero offsets v1 equals a plain convolution and v2 half of one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        modulated: bool = False,
        **kwargs: Any,
    ) -> None:
        """Create the parameters.

        Args:
            in_channels: C.
            out_channels: O.
            kernel_size: of both convolutions.
            modulated: v2, with a factor for each sample.
            **kwargs: further arguments of ``DeformConv``.
        """
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        self.modulated = modulated
        per_tap = 3 if modulated else 2
        self.offset = nn.Conv2d(
            in_channels,
            per_tap * self.deformable_groups * self.kernel_size[0] * self.kernel_size[1],
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Predict the offsets and convolve (N, C, H, W)."""
        return super().forward(x, *split_offset_mask(self.offset(x), self.modulated))
