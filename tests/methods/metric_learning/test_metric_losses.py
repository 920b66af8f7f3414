"""Weights of pairs, the loss of embeddings, the class loss and its ramp."""

import math

import pytest
import torch
from methods.metric_learning.metric_toys import every_cell, planted

from instseg_ext.methods.metric_learning.labels import CellSample, draw_cells
from instseg_ext.methods.metric_learning.losses import (
    class_loss_sum,
    embedding_loss,
    lambda_at,
    pair_weights,
)

# Cells of two objects and the background.
SIZES = (10, 1000, 50)


def sample_of(sizes=SIZES, counts=(4, 4, 4)):
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return CellSample(torch.arange(len(owners)), owners, torch.tensor(sizes))


def block(weights, sample, a, b):
    return weights[sample.owners == a][:, sample.owners == b]


@pytest.mark.parametrize("kind", ["uniform", "product", "sum"])
@pytest.mark.parametrize("background", ["instance", "negative_only", "none"])
def test_acceptance_check_4_weights_sum_to_one(kind, background):
    weights = pair_weights(sample_of(), kind=kind, background=background)
    assert weights.sum().item() == pytest.approx(1)
    assert weights.diagonal().abs().max() == 0


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 4, 11)])
def test_acceptance_check_4_uniform_blocks_weigh_the_same(counts):
    sample = sample_of(counts=counts)
    weights = pair_weights(sample)
    sums = {
        round(block(weights, sample, a, b).sum().item(), 6)
        for a in range(3)
        for b in range(3)
        if a != b
    }
    assert len(sums) == 1


def test_uniform_is_equal_for_all_pairs():
    weights = pair_weights(sample_of())
    assert set(weights.flatten().tolist()) == {0.0, weights.max().item()}


def test_acceptance_check_4_product_of_sizes():
    sample = sample_of()
    weights = pair_weights(sample, kind="product")
    ratio = block(weights, sample, 0, 0).max() / block(weights, sample, 1, 1).max()
    assert ratio.item() == pytest.approx(1e4)
    weights = pair_weights(sample, kind="sum")
    ratio = block(weights, sample, 0, 0).max() / block(weights, sample, 1, 1).max()
    assert ratio.item() == pytest.approx(1e2)


def test_the_background_among_objects():
    sample = sample_of()
    only = pair_weights(sample, background="negative_only")
    assert block(only, sample, 2, 2).max() == 0
    assert block(only, sample, 0, 2).min() > 0
    none = pair_weights(sample, background="none")
    assert none[sample.owners == 2].max() == 0


def test_objects_without_cells_and_images_without_objects_weigh_nothing():
    weights = pair_weights(sample_of(sizes=(0, 1000, 50)))
    assert weights[:4].max() == 0
    assert weights.sum().item() == pytest.approx(1)
    assert pair_weights(sample_of(sizes=(0, 0, 50))).abs().max() == 0


def test_acceptance_check_3_separated_objects_cost_nothing():
    labels = torch.tensor([[0] * 5 + [1] * 7])
    sample = draw_cells(labels, 2, 5, 5)
    weights = pair_weights(sample)
    points = planted(labels, 2)[sample.cells]
    assert embedding_loss(points, sample, weights) < 1e-6


def test_acceptance_check_3_equal_embeddings():
    sample = sample_of()
    weights = pair_weights(sample)
    loss = embedding_loss(torch.full((12, 8), 3.0), sample, weights)
    different = weights[sample.owners[:, None] != sample.owners].sum()
    assert loss.item() == pytest.approx(9.9035 * different.item(), rel=1e-4)


def test_the_loss_is_the_formula():
    """All pairs one by one, in double precision."""
    torch.manual_seed(0)
    sample = sample_of(counts=(2, 3, 4))
    points = torch.randn(9, 3)
    weights = pair_weights(sample, kind="sum")
    expected = 0.0
    for p in range(9):
        for q in range(9):
            if p == q:
                continue
            distance = (points[p].double() - points[q].double()).square().sum().item() + 1e-4
            sigma = 2 / (1 + math.exp(distance))
            same = sample.owners[p] == sample.owners[q]
            expected -= weights[p, q].item() * math.log(sigma if same else 1 - sigma)
    loss = embedding_loss(points, sample, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    divided = embedding_loss(points, sample, weights, divide_by_cells=True)
    assert divided.item() == pytest.approx(expected / 9, rel=1e-4)


def test_acceptance_check_5_the_order_of_objects_does_not_matter():
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (6, 6))
    turned = torch.tensor([2, 0, 1, 3])[labels]
    points = torch.randn(36, 5)
    values = []
    for given in (labels, turned):
        sample = every_cell(given, 3)
        weights = pair_weights(sample, kind="product")
        values.append(embedding_loss(points[sample.cells], sample, weights))
    torch.testing.assert_close(values[0], values[1])


def test_gradients_of_coinciding_embeddings_push_them_apart():
    points = torch.tensor([[0.0, 0.0], [1e-3, 0.0]], requires_grad=True)
    sample = sample_of(sizes=(5, 5, 0), counts=(1, 1, 0))
    embedding_loss(points, sample, pair_weights(sample)).backward()
    assert points.grad[0, 0] > 1
    assert points.grad[1, 0] < -1
    assert points.grad.isfinite().all()


def test_class_loss_leaves_out_invalid_cells():
    logits, targets = torch.randn(3, 2, 4), torch.tensor([[0, 3], [1, 1], [2, 0]])
    valid = torch.tensor([True, False, True])
    logs = logits.log_softmax(dim=2)
    expected = -(logs[0, 0, 0] + logs[0, 1, 3] + logs[2, 0, 2] + logs[2, 1, 0])
    torch.testing.assert_close(class_loss_sum(logits, targets, valid), expected)


@pytest.mark.parametrize(
    ("iteration", "value"),
    [(0, 0.0), (99, 0.0), (100, 0.0), (200, 0.1), (250, 0.15), (300, 0.2), (999, 0.2)],
)
def test_acceptance_check_11_ramp(iteration, value):
    assert lambda_at(iteration, 100, 300, 0.2) == pytest.approx(value)


def test_a_ramp_of_no_length():
    assert lambda_at(4, 5, 5, 0.2) == 0
    assert lambda_at(5, 5, 5, 0.2) == lambda_at(0, 0, 0, 0.2) == 0.2
