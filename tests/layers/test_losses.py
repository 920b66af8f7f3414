"""Dice and focal losses against hand-computed values and plain loops."""

import math

import pytest
import torch

from instseg_ext.layers.losses import dice_loss, sigmoid_focal_loss_sum


def test_dice_hand_values():
    half = dice_loss(torch.full((1, 4), 0.5), torch.tensor([[1, 1, 0, 0]]))
    assert half.item() == pytest.approx(1 - 2 / 3.002, abs=1e-6)
    perfect = dice_loss(torch.ones(1, 100), torch.ones(1, 100))
    assert perfect.item() == pytest.approx(1.0e-5, abs=2e-7)


def test_dice_empty_target_is_one_without_gradient():
    probs = torch.rand(3, 4, 5, requires_grad=True)
    loss = dice_loss(probs, torch.zeros(3, 4, 5, dtype=torch.uint8))
    assert torch.equal(loss.detach(), torch.ones(3))
    loss.sum().backward()
    assert torch.equal(probs.grad, torch.zeros_like(probs))


def test_dice_half_precision_large_mask_is_finite():
    loss = dice_loss(torch.ones(1, 300, 300, dtype=torch.float16), torch.ones(1, 300, 300))
    assert loss.dtype == torch.float32
    assert loss.item() < 1e-6


def test_dice_gradcheck_and_empty():
    probs = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(2, 6) > 0.5).double()

    def reference(values):
        parts = []
        for p, t in zip(values, targets, strict=True):
            a = sum(p[i] * t[i] for i in range(6))
            b = sum(p[i] ** 2 for i in range(6)) + 1e-3
            d = sum(t[i] ** 2 for i in range(6)) + 1e-3
            parts.append(1 - 2 * a / (b + d))
        return torch.stack(parts)

    torch.testing.assert_close(
        dice_loss(probs, targets).double(), reference(probs), atol=1e-6, rtol=0
    )
    grads = [
        torch.autograd.grad(f(probs).sum(), probs)[0]
        for f in (reference, lambda p: dice_loss(p, targets))
    ]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)
    assert dice_loss(torch.zeros(0, 3, 3), torch.zeros(0, 3, 3)).shape == (0,)


def test_dice_refuses_unequal_shapes():
    with pytest.raises(ValueError, match="equal shapes"):
        dice_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_focal_sum_against_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator)
    labels = torch.tensor([0, 3, 2, 1, 3, 3, 0])  # 3 is background
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for k, value in enumerate(row):
            p = 1 / (1 + math.exp(-value))
            if k == label:
                expected += -0.25 * (1 - p) ** 2 * math.log(p)
            else:
                expected += -0.75 * p**2 * math.log(1 - p)
    assert sigmoid_focal_loss_sum(logits, labels).item() == pytest.approx(expected, rel=1e-5)
