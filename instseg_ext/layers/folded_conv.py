"""Convolutions that take the batch norm behind them into their weights at inference.

A batch norm with fixed statistics is a scale and a shift per channel: applied to the weights it
costs nothing, applied to the maps it costs one pass over each of them, an eighth of a ResNet's time
on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

__all__ = ["FoldedConv2d", "fold_norms"]

_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d)


class FoldedConv2d(Conv2d):
    """detectron2's convolution with a batch norm, in one step where nothing but the result counts.

    That is in eval mode without gradients, outside tracing and compilation, and without hooks on
    the norm. Otherwise, and in its parameters and their names, it is detectron2's layer. The folded
    weights are kept until a parameter or a statistic changes, ``train`` or ``eval`` is called, or a
    forward pass cannot use them.

    Note:
        Changes that PyTorch does not count, those through ``.data``, show after the next call of
        ``eval``, with which detectron2's and our evaluation begins.
    """

    _folded: tuple[tuple, Tensor, Tensor] | None = None

    def train(self, mode: bool = True) -> FoldedConv2d:
        """Set the mode, for ``eval`` as well, and forget the folded weights."""
        self._folded = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedConv2d:
        """Move or convert the layer; folded weights would keep the memory it leaves."""
        self._folded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and files have; folded weights would double them."""
        state = self.__dict__.copy()
        state.pop("_folded", None)
        return state

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the normalised and activated (N, C_out, H', W')."""
        replaced = not isinstance(self.norm, _NORMS)  # by whoever prepares the model for something
        if replaced or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return super().forward(x)
        sources = self._sources()
        if not self._can_fold(sources):
            # Training may be the reason, and fused optimisers and norms do not count their changes.
            self._folded = None
            return super().forward(x)
        # In-place changes raise the version, replacement changes the place.
        state = tuple((t.data_ptr(), t._version, t.dtype) for t in sources)
        if self._folded is None or self._folded[0] != state:
            self._folded = (state, *self._fold())
        _, weight, bias = self._folded
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _sources(self) -> list[Tensor]:
        norm = self.norm
        tensors = (
            self.weight,
            self.bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
        )
        return [t for t in tensors if t is not None]

    def _can_fold(self, sources: list[Tensor]) -> bool:
        norm = self.norm
        return not (
            self.training
            or norm.training
            or norm.running_var is None
            or torch.is_grad_enabled()
            or norm._forward_hooks
            or norm._forward_pre_hooks
            # Tensors made in inference mode do not tell when they are changed.
            or any(t.is_inference() for t in sources)
        )

    def _fold(self) -> tuple[Tensor, Tensor]:
        """Return the weight (C_out, C, k, k) and bias (C_out,) of convolution and norm together."""
        norm = self.norm
        scale = (norm.running_var.float() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.float()
        before = -norm.running_mean.float()
        if self.bias is not None:
            before = before + self.bias.float()
        bias = before * scale
        if norm.bias is not None:
            bias = bias + norm.bias.float()
        weight = self.weight.float() * scale[:, None, None, None]
        dtype = self.weight.dtype
        return weight.to(dtype), bias.to(dtype)


def fold_norms(model: nn.Module) -> None:
    """Let every convolution of detectron2's that has a batch norm fold it, in place.

    Parameters and state dict stay as they are. Subclasses of the layer are left alone.
    """
    for module in model.modules():
        if type(module) is Conv2d and isinstance(module.norm, _NORMS):
            module.__class__ = FoldedConv2d
