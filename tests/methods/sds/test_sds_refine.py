"""Refinement of regions; numbers are the sheet's checks."""

import pytest
import torch
from methods.sds.sds_toys import tiles

from instseg_ext.methods.sds.refine import Refiner, enlarge, mask_cells, superpixel_means


def cells_per_column(legacy):
    """Return how many of 20 pixels lie in each of 10 cells."""
    line = torch.arange(20, dtype=torch.int32).expand(20, 20).contiguous()
    box = torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    counts = []
    for cell in range(10):
        coarse = torch.zeros(1, 10, 10)
        coarse[:, :, cell] = 1
        means = superpixel_means(coarse.flatten(1), box, line, 20, legacy=legacy)
        counts.append(round(means.sum().item()))
    return counts


def test_cells_of_pixels():
    """Check 10: by right edges in the authors' code, by centres here."""
    assert cells_per_column(legacy=True) == [1, 2, 2, 2, 2, 2, 2, 2, 2, 3]
    assert cells_per_column(legacy=False) == [2] * 10


@pytest.mark.parametrize("legacy", [False, True])
def test_a_constant_mask_stays_constant(legacy):
    """Check 10: every pixel in the box has one cell, those beside it have none."""
    regions = tiles(5, 8, [[0]])
    box = torch.tensor([[-3.3, 5.0, 20.0, 31.7]])
    means = superpixel_means(
        torch.full((1, 100), 0.25), box, regions.superpixels, 64, legacy=legacy
    )
    grid = means.view(8, 8)
    torch.testing.assert_close(grid[1:6, :4], torch.full((5, 4), 0.25))
    assert not grid[0].any()
    assert not grid[:, 4:].any()
    assert 0 < grid[6, 0] < 0.25


def test_box_with_context():
    boxes = torch.tensor([[100.0, 50.0, 295.0, 245.0]])
    expected = torch.tensor([[84.0, 34.0, 311.0, 261.0]], dtype=torch.float64)
    torch.testing.assert_close(enlarge(boxes, 16 / 195), expected)


def test_mask_in_cells():
    """A region of half a box fills half of the cells, and what is beyond the image is empty."""
    regions = tiles(10, 4, [[0, 1, 4, 5], range(16)])
    cells = mask_cells(
        regions, torch.tensor([[0.0, 0.0, 40.0, 20.0], [-40.0, 0.0, 40.0, 40.0]]), 10
    )
    # Bicubic weights swing over at the border.
    expected = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).expand(10, 8)
    columns = [0, 1, 2, 3, 6, 7, 8, 9]
    first, second = cells.view(2, 10, 10)[:, :, columns]
    torch.testing.assert_close(first, expected, atol=0.02, rtol=0)
    torch.testing.assert_close(second, 1 - expected, atol=0.02, rtol=0)


def test_mask_is_resized_as_by_matlab():
    """The middle one of three rows, enlarged: by hand, from the kernel at 1/4, 3/4, 5/4 and 7/4.

    The first row of cells sees it twice, once in the mirror.
    """
    regions = tiles(1, 3, [[3, 4, 5]])
    cells = mask_cells(regions, torch.tensor([[0.0, 0.0, 3.0, 3.0]]), 6).view(6, 6)
    half = [-0.0703125 - 0.0234375, 0.2265625, 0.8671875]
    expected = torch.tensor(half + half[::-1])[:, None].expand(6, 6)
    torch.testing.assert_close(cells, expected, atol=1e-6, rtol=0)


def test_no_weight_on_the_coarse_mask_keeps_the_region():
    """Check 11, first half; a refiner that was not fitted is such a one."""
    regions = tiles(5, 6, [[7, 8, 13], [0], range(36)])
    refiner = Refiner(2, 3, 10, 0.08, False)
    refiner.coarse_weight.normal_()
    members = refiner(regions, torch.rand(3, 3), torch.tensor([0, 1, 1]))
    assert torch.equal(members, regions.members)


def test_weight_on_the_coarse_mask_alone_gives_its_superpixels():
    """Check 11, second half: superpixels whose mean is above a half."""
    regions = tiles(5, 4, [range(16)])
    refiner = Refiner(1, 1, 10, 0.0, False)
    # The left half of the cells is sure, the right half sure not to belong.
    bias = torch.full((10, 10), -50.0)
    bias[:, :5] = 50.0
    refiner.coarse_bias[:] = bias.flatten()
    refiner.superpixel_weight[:] = torch.tensor([10.0, 0.0])
    members = refiner(regions, torch.zeros(1, 1), torch.tensor([0]))
    assert members.view(4, 4).int().tolist() == [[1, 1, 0, 0]] * 4


def test_no_region():
    refiner = Refiner(1, 2, 10, 0.08, False)
    regions = tiles(5, 2, [])
    assert refiner(regions, torch.zeros(0, 2), torch.zeros(0).long()).shape == (4, 0)
