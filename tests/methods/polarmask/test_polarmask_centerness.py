"""Centerness targets."""

import math

import pytest
import torch

from instseg_ext.methods.polarmask.centerness import (
    fcos_centerness,
    polar_centerness,
    soft_polar_centerness,
)

KINDS = ((polar_centerness, 36), (soft_polar_centerness, 36), (fcos_centerness, 4))


def test_polar_compares_the_extremes():
    rays = torch.tensor([[4.0, 9.0, 16.0, 5.0], [3.0, 3.0, 3.0, 3.0], [1e-6, 100.0, 50.0, 50.0]])
    assert polar_centerness(rays).tolist() == pytest.approx([0.5, 1.0, 1e-4])


def test_soft_compares_opposite_quarters():
    rays = torch.tensor([[1.0, 3.0, 10.0, 10.0, 8.0, 8.0, 2.0, 3.0]])
    assert soft_polar_centerness(rays).item() == pytest.approx(math.sqrt(2 / 8 * 2.5 / 10))


def test_soft_forgives_a_missing_ray():
    rays = torch.full((1, 36), 20.0)
    rays[0, 7] = 1e-6
    assert polar_centerness(rays).item() < 1e-3
    assert soft_polar_centerness(rays).item() == pytest.approx(math.sqrt(8 / 9), abs=1e-6)


def test_soft_needs_quarters():
    with pytest.raises(ValueError, match=r"MODEL\.POLARMASK\.NUM_RAYS divisible by 4, not 18"):
        soft_polar_centerness(torch.ones(2, 18))


def test_fcos_compares_opposite_sides():
    distances = torch.tensor([[2.0, 9.0, 8.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    assert fcos_centerness(distances).tolist() == pytest.approx([math.sqrt(1 / 9), 1.0])


@pytest.mark.parametrize(("kind", "width"), KINDS)
def test_range_and_scale(kind, width):
    values = torch.rand(200, width) * 100
    targets = kind(values)
    assert targets.shape == (200,)
    assert targets.dtype == torch.float32
    assert targets.min() >= 0
    assert targets.max() <= 1
    torch.testing.assert_close(kind(values * 4), targets)


@pytest.mark.parametrize(("kind", "width"), KINDS)
def test_nothing_and_zeros(kind, width):
    assert kind(torch.zeros(0, width)).shape == (0,)
    assert kind(torch.zeros(2, width)).tolist() == [0, 0]
    one_zero = torch.ones(1, width)
    one_zero[0, 0] = 0
    assert torch.isfinite(kind(one_zero)).all()
