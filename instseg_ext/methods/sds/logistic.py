"""Logistic regression with a penalty on the weights, for many labels of the same samples at once.

Shapes: N samples of D features, L labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fit_logistic"]


def fit_logistic(
    features: Tensor, labels: Tensor, c: float, *, bias: bool = True, max_iterations: int = 500
) -> tuple[Tensor, Tensor]:
    """Minimise ``|w|^2 / 2 + c * sum of log(1 + exp(-score))`` for each label, as LIBLINEAR does.

    The bias is the weight of a constant feature 1 and is penalised as the others are, so that a
    label that all samples have, or none, has a solution as well.

    Args:
        features: (N, D) float32 or float64, the precision of the computation.
        labels: (N, L) bool.
        c: weight of the losses.
        bias: whether there is one.
        max_iterations: of L-BFGS, on all labels together.

    Returns:
        (L, D) weights and (L,) biases of the features' type; zeros without samples.
    """
    num, dim = features.shape
    weight = features.new_zeros((labels.shape[1], dim + 1))
    if num == 0:
        return weight[:, :dim], weight[:, dim]
    inputs = torch.cat([features, torch.full_like(features[:, :1], float(bias))], dim=1)
    sign = torch.where(labels, 1.0, -1.0).to(features)
    weight.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.softplus(-sign * (inputs @ weight.T))
        total = weight.square().sum() / 2 + c * losses.sum()
        total.backward()
        return total

    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        optimizer.step(closure)
    found = weight.detach()
    return found[:, :dim].clone(), found[:, dim].clone()
