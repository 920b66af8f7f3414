"""A bound on the gradient that passes a point of the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["GradientLimit"]


class _Bounded(torch.autograd.Function):
    """The identity, whose gradient is masked and clamped on its way back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, passes: Tensor, limit: GradientLimit) -> Tensor:
        ctx.save_for_backward(passes)
        ctx.limit = limit
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        bound = ctx.limit.bound(gradient)
        # where, not a product: a value that may not pass can be infinite
        allowed = torch.where(passes[:, None], gradient, gradient.new_zeros(()))
        return allowed.clamp(-bound, bound), None, None


class GradientLimit:
    """Clamps gradients of the loss with respect to some values, whatever the loss is scaled by.

    A trainer multiplies the loss before ``backward``, to accumulate several batches or to keep half
    precision from underflow. So that the bound means the same in all cases, it is multiplied by
    the gradient that arrives at a loss which ``watch`` was given.
    """

    def __init__(self, largest: float) -> None:
        """Keep the bound.

        Args:
            largest: of the absolute value of each component, for a loss that is not scaled.
        """
        self.largest = largest
        self._scale: Tensor | None = None

    def watch(self, *losses: Tensor) -> None:
        """Learn from these scalars, when their gradients come, how the loss is scaled.

        All of them must lead to the bounded values, so that their gradients come first.
        """
        for loss in losses:
            if loss.requires_grad:
                loss.register_hook(self._store)

    def _store(self, gradient: Tensor) -> None:
        self._scale = gradient.detach().abs()

    def bound(self, gradient: Tensor) -> Tensor:
        """Return the scalar bound for a gradient of the running backward pass."""
        scale = gradient.new_ones(()) if self._scale is None else self._scale.to(gradient)
        return scale * self.largest

    def apply(self, values: Tensor, passes: Tensor | None = None) -> Tensor:
        """Return ``values`` unchanged; their gradient will be bounded.

        Args:
            values: (R, D).
            passes: (R,) bool, the rows that get a gradient at all; None for all.
        """
        if passes is None:
            passes = torch.ones(len(values), dtype=torch.bool, device=values.device)
        return _Bounded.apply(values, passes, self)
