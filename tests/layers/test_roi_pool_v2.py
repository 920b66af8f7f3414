"""Max pooling with bins that share no cell, against the loop."""

import math

import pytest
import torch
from layers.roi_pool_loop import pooled_by_loop

from instseg_ext.layers.roi_pool_v2 import ROIPoolV2, bin_edges


@pytest.mark.parametrize(("size", "scale"), [(7, 1 / 16), (7, 1 / 4), (14, 1 / 16)])
def test_equals_the_kernel(size, scale):
    gen = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 20, 25, generator=gen)
    extent = torch.tensor([25, 20]) / scale
    corners = (torch.rand(40, 2, generator=gen) * 1.4 - 0.2) * extent
    sides = torch.rand(40, 2, generator=gen) ** 2 * extent
    index = torch.randint(2, (40, 1), generator=gen)
    rois = torch.cat([index, corners, corners + sides], dim=1)
    found = ROIPoolV2((size, size), scale)(maps, rois)
    assert torch.equal(found, pooled_by_loop(maps, rois, size, scale))


def test_acceptance_check_5_bins():
    """Widths of 7, 3 and 10 cells at stride 16."""
    end = torch.tensor([112.0, 48.0, 160.0]) / 16
    left, right = bin_edges(torch.zeros(3), end, 7, 100)
    assert (right - left).tolist() == [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 1, 0, 1, 0],
        [1, 2, 1, 2, 1, 2, 1],
    ]
    maps = torch.full((1, 1, 10, 10), -1.0)
    pooled = ROIPoolV2((7, 7), 1 / 16)(maps, torch.tensor([[0.0, 0, 0, 48, 160]]))[0, 0]
    assert pooled[:, [0, 2, 4, 6]].eq(0).all()
    assert pooled[:, [1, 3, 5]].eq(-1).all()


def test_gradient_goes_to_the_largest_cell():
    maps = torch.tensor([[[[1.0, 5, 2], [0, 3, 4]]]], requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 3, 2]])
    ROIPoolV2((1, 1), 1.0)(maps, rois).sum().backward()
    assert maps.grad.tolist() == [[[[0, 1, 0], [0, 0, 0]]]]


def test_outside_and_nowhere():
    maps = torch.ones(1, 2, 4, 4)
    boxes = [[0.0, -90, -90, -50, -50], [0, 90, 90, 99, 99], [0, math.nan, 0, 9, 9]]
    pooled = ROIPoolV2((7, 7), 1.0)(maps, torch.tensor(boxes))
    assert pooled[:2].eq(0).all()
    assert pooled.isfinite().all()
    assert ROIPoolV2((7, 7), 1.0)(maps, torch.zeros(0, 5)).shape == (0, 2, 7, 7)
