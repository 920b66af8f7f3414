"""Similarities, their logarithms, and squared distances."""

import math

import pytest
import torch

from instseg_ext.methods.metric_learning.similarity import (
    log_dissimilarity,
    log_similarity,
    radii,
    radius,
    similarity,
    squared_distances,
)


def test_acceptance_check_1_values():
    assert similarity(torch.tensor(0.0)) == 1
    assert similarity(torch.tensor(math.log(3), dtype=torch.float64)) == pytest.approx(0.5, 1e-15)
    falling = similarity(torch.linspace(0, 20, 500, dtype=torch.float64))
    assert (falling.diff() < 0).all()


@pytest.mark.parametrize(
    ("tau", "limit", "root"),
    [
        (0.25, 1.945910, 1.394959),
        (0.50, 1.098612, 1.048147),
        (0.75, 0.510826, 0.714721),
        (0.90, 0.200671, 0.447963),
    ],
)
def test_acceptance_check_1_radii(tau, limit, root):
    assert radius(tau) == pytest.approx(limit, abs=1e-6)
    assert radius(tau) ** 0.5 == pytest.approx(root, abs=1e-6)
    assert radii([tau]).item() == pytest.approx(limit, abs=1e-6)
    exact = torch.tensor(radius(tau), dtype=torch.float64)
    assert similarity(exact).item() == pytest.approx(tau, abs=1e-15)


def test_acceptance_check_2_the_logarithms_are_those_of_the_formula():
    distance = torch.logspace(-3, math.log10(20), 300, dtype=torch.float64)
    naive = 2 / (1 + distance.exp())
    torch.testing.assert_close(log_similarity(distance), naive.log(), rtol=0, atol=1e-11)
    # Below 1, where the formula itself is exact to that.
    expected = (1 - naive).log()
    found = log_dissimilarity(distance, floor=0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e4])
def test_acceptance_check_2_extremes_are_finite(value):
    distance = torch.tensor(value, requires_grad=True)
    for function in (log_similarity, log_dissimilarity):
        found = function(distance)
        [gradient] = torch.autograd.grad(found, distance)
        assert found.isfinite()
        assert gradient.isfinite()
    assert log_dissimilarity(torch.tensor(0.0)).item() == pytest.approx(-9.9035, abs=1e-4)


def test_acceptance_check_2_the_gradient_is_largest_at_a_hundredth():
    apart = torch.logspace(-5, 1, 2001, dtype=torch.float64, requires_grad=True)
    [gradient] = torch.autograd.grad(log_dissimilarity(apart.square()).sum(), apart)
    assert gradient.max().item() == pytest.approx(100, rel=1e-3)
    assert apart[gradient.argmax()].item() == pytest.approx(0.01, rel=0.01)
    assert (gradient > 0).all()


def test_squared_distances_are_exact_far_from_the_origin():
    torch.manual_seed(0)
    a, b = torch.randn(7, 5) + 100, torch.randn(9, 5) + 100
    expected = (a.double()[:, None] - b.double()).square().sum(dim=2)
    torch.testing.assert_close(squared_distances(a, b).double(), expected, rtol=1e-5, atol=1e-5)
    assert squared_distances(a, a).diagonal().max() < 1e-5
    assert squared_distances(a, a).min() >= 0


def test_no_embeddings():
    assert squared_distances(torch.zeros(0, 3), torch.zeros(4, 3)).shape == (0, 4)
    assert squared_distances(torch.zeros(4, 3), torch.zeros(0, 3)).shape == (4, 0)
