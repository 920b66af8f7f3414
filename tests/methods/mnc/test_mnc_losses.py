"""Losses: means over images of what one image alone would have."""

import pytest
import torch
import torch.nn.functional as F

from instseg_ext.methods.mnc.losses import box_loss, class_loss, mask_loss, row_weights


def test_rows_of_an_image_share_its_weight():
    weights = row_weights([2, 0, 3], torch.device("cpu"))
    torch.testing.assert_close(weights, torch.tensor([1 / 6] * 2 + [1 / 9] * 3))
    assert row_weights([0, 0], torch.device("cpu")).shape == (0,)


def test_class_loss_is_the_mean_of_the_images():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 2, 3])
    expected = (
        F.cross_entropy(logits[:2], labels[:2]) + F.cross_entropy(logits[2:], labels[2:])
    ) / 2
    found = class_loss(logits, labels, row_weights([2, 3], logits.device))
    torch.testing.assert_close(found, expected)


def test_mask_loss_is_the_mean_of_the_images():
    logits, targets = torch.randn(3, 5, 5), torch.rand(3, 5, 5) > 0.5
    one, two = (
        F.binary_cross_entropy_with_logits(logits[part], targets[part].float())
        for part in (slice(0, 1), slice(1, 3))
    )
    found = mask_loss(logits, targets, row_weights([1, 0, 2], logits.device))
    torch.testing.assert_close(found, (one + two) / 3)


def test_box_loss_reads_the_slots_of_the_class():
    """Smooth L1 by hand: 0.5 d^2 within beta 1, |d| - 0.5 beyond."""
    deltas = torch.zeros(2, 12)
    deltas[0, 4:8] = torch.tensor([0.5, -0.5, 3.0, 0.0])
    deltas[1, :4] = torch.tensor([0.0, 0, 0, 2.0])
    deltas[:, 8:] = 100.0
    weights = torch.tensor([0.25, 0.5])
    found = box_loss(deltas, torch.tensor([1, 0]), torch.zeros(2, 4), weights, beta=1.0)
    assert float(found) == pytest.approx(0.25 * (0.125 + 0.125 + 2.5) + 0.5 * 1.5)


def test_nothing_costs_nothing_and_keeps_the_graph():
    logits = torch.zeros(0, 5, 5, requires_grad=True)
    deltas = torch.zeros(0, 12, requires_grad=True)
    none = torch.zeros(0)
    total = mask_loss(logits, torch.zeros(0, 5, 5, dtype=torch.bool), none)
    total = total + box_loss(deltas, none.long(), torch.zeros(0, 4), none, 1.0)
    assert float(total.detach()) == 0
    total.backward()
    assert logits.grad.shape == (0, 5, 5)
    assert deltas.grad.shape == (0, 12)


def test_losses_are_float32_for_half_precision():
    logits = torch.randn(2, 4).bfloat16()
    found = class_loss(logits, torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    assert found.dtype == torch.float32
