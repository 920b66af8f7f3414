"""The bound of a gradient: rows, size, and loss scaling."""

import pytest
import torch

from instseg_ext.layers.gradient_limit import GradientLimit


def gradient(limit, *, passes=None, scale=1.0, upstream=(3.0, -0.001)):
    values = torch.zeros(2, 2, requires_grad=True)
    loss = (limit.apply(values, passes) * torch.tensor(upstream)).sum()
    limit.watch(loss)
    (loss * scale).backward()
    return values.grad


def test_components_are_bounded():
    assert gradient(GradientLimit(0.5)).tolist() == [[0.5, pytest.approx(-0.001)]] * 2


def test_rows_that_may_not_pass_get_none():
    passes = torch.tensor([True, False])
    assert gradient(GradientLimit(0.5), passes=passes)[1].tolist() == [0, 0]
    # not even where it is infinite
    found = gradient(GradientLimit(0.5), passes=passes, upstream=(float("inf"), 1.0))
    assert found.tolist() == [[0.5, 0.5], [0, 0]]


@pytest.mark.parametrize("scale", [0.25, 65536.0])
def test_the_bound_follows_the_scale_of_the_loss(scale):
    expected = gradient(GradientLimit(0.5)) * scale
    torch.testing.assert_close(gradient(GradientLimit(0.5), scale=scale), expected)


def test_values_are_unchanged():
    values = torch.randn(3, 4)
    assert torch.equal(GradientLimit(1.0).apply(values), values)
    assert GradientLimit(1.0).apply(torch.zeros(0, 4)).shape == (0, 4)
