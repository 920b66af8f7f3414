"""Loss functions on plain tensors: dice per mask and summed sigmoid focal loss.

All of them compute in float32 whatever the dtype of their inputs: a sum over the pixels of one mask
exceeds the range of float16 (65504) on any usual input size.
"""

import torch
from torchvision.ops import sigmoid_focal_loss

__all__ = ["dice_loss", "sigmoid_focal_loss_sum"]


def dice_loss(probs: torch.Tensor, targets: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Compute one dice loss per mask, with squared terms in the denominator.

    ``1 - 2 sum(p t) / (sum(p^2) + eps + sum(t^2) + eps)``: Eq. 6 of arXiv:1912.04488.
    ``eps`` stands in the denominator only, so an empty target costs exactly 1 whatever is predicted
    (and has no gradient), and a perfect mask of n pixels costs ``2 eps / (2 n + 2 eps)``, not 0.

    Args:
        probs: (P, ...) float in [0, 1], after the sigmoid.
        targets: (P, ...) of the same shape, any dtype, values 0 and 1.
        eps: added to each of the two sums of squares.

    Returns:
        (P,) float32; empty input gives an empty tensor. Differentiable with respect to ``probs``.

    Raises:
        ValueError: if the two shapes differ.
    """
    if probs.shape != targets.shape:
        raise ValueError(
            f"dice_loss needs equal shapes, got probs {tuple(probs.shape)} and targets "
            f"{tuple(targets.shape)}"
        )
    probs = probs.flatten(1).float()
    targets = targets.flatten(1).to(probs.dtype)
    overlap = (probs * targets).sum(dim=1)
    denominator = probs.square().sum(dim=1) + targets.square().sum(dim=1) + 2 * eps
    return 1 - 2 * overlap / denominator


def sigmoid_focal_loss_sum(
    logits: torch.Tensor, labels: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """Sum the sigmoid focal loss of K independent classes over all locations.

    Args:
        logits: (P, K) float, one column per foreground class (there is no background column).
        labels: (P,) int64 in [0, K]; K means background.
        alpha: weight of the positive term; the negative term gets ``1 - alpha``.
        gamma: focusing exponent.

    Returns:
        0-d float32, not normalised; Eq. 5 of arXiv:1708.02002.
    """
    num_classes = logits.shape[1]
    # Comparing with a range gives the one-hot rows without a background column and without a sync.
    classes = torch.arange(num_classes, device=logits.device)
    targets = (labels[:, None] == classes).float()
    return sigmoid_focal_loss(logits.float(), targets, alpha=alpha, gamma=gamma, reduction="sum")
