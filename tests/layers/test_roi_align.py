"""RoIAlign as sums of rows against torchvision's operator."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ROIAlign

from instseg_ext.layers.roi_align import RowROIAlign


def regions(num=40):
    """Boxes on two maps of 30 x 24 cells of 4 pixels: inside, across the border, beyond, empty."""
    gen = torch.Generator().manual_seed(0)
    corner = torch.rand(num, 2, generator=gen) * 140 - 20
    boxes = torch.cat([corner, corner + torch.rand(num, 2, generator=gen) * 90], dim=1)
    boxes[0] = torch.tensor([10.0, 10.0, 10.0, 10.0])
    boxes[1] = torch.tensor([400.0, 10.0, 500.0, 80.0])
    boxes[2] = torch.tensor([-40.0, -40.0, 200.0, 200.0])
    return torch.cat([torch.randint(0, 2, (num, 1), generator=gen).float(), boxes], dim=1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("size", "samples"), [((7, 7), 2), ((3, 5), 1), ((2, 2), 3)])
def test_equals_the_operator(size, samples, aligned, monkeypatch):
    maps = torch.randn(2, 6, 24, 30)
    expected = ROIAlign(size, 0.25, samples, aligned=aligned)(maps, regions())
    assert expected[1].abs().max() == 0
    monkeypatch.setattr(ROIAlign, "forward", None)
    pooler = RowROIAlign(size, 0.25, samples, aligned=aligned)
    pooled = pooler(maps.contiguous(memory_format=torch.channels_last), regions())
    assert torch.allclose(pooled, expected, atol=1e-5)
    assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_no_regions():
    maps = torch.randn(1, 6, 8, 8).contiguous(memory_format=torch.channels_last)
    assert RowROIAlign((7, 7), 0.25, 2)(maps, torch.zeros(0, 5)).shape == (0, 6, 7, 7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_the_operator(layout):
    maps = torch.randn(2, 6, 24, 30).contiguous(memory_format=layout).requires_grad_()
    gradients = []
    for kind in (ROIAlign, RowROIAlign):
        pooled = kind((7, 7), 0.25, 2)(maps, regions())
        gradients.append(torch.autograd.grad(pooled.square().sum(), maps)[0])
    assert torch.equal(*gradients)


def test_samples_that_depend_on_the_region_are_left_to_the_operator():
    maps = torch.randn(2, 6, 24, 30).contiguous(memory_format=torch.channels_last)
    expected = ROIAlign((7, 7), 0.25, 0)(maps, regions())
    assert torch.equal(RowROIAlign((7, 7), 0.25, 0)(maps, regions()), expected)
