"""Counting the pixels of masks, and where they are."""

import pytest
import torch

from instseg_ext.layers.mask_ops import (
    above,
    count_pixels,
    mass_centers,
    tight_boxes,
    tight_boxes_within,
)


@pytest.mark.parametrize("size", [(200, 336), (3, 3), (8, 8), (2, 4), (1, 2040), (1, 2048), (0, 8)])
def test_count_equals_the_sum(size):
    masks = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) > 0.3
    masks[1] = True
    for part in (masks, masks[1:], masks[:0], masks.mT):
        assert torch.equal(count_pixels(part), part.flatten(1).sum(dim=1))


@pytest.mark.parametrize("size", [(16, 24), (9, 13), (7, 5), (8, 1333), (2050, 3), (1, 1)])
def test_centers_equal_the_mean_of_the_indices(size):
    masks = torch.rand(4, *size, generator=torch.Generator().manual_seed(1)) > 0.4
    masks[1], masks[2] = True, False
    for part in (masks, masks[1:], masks[:, :, : size[1] // 2 + 1]):
        y, x, area = mass_centers(part)
        for i, mask in enumerate(part):
            indices = mask.nonzero().double()
            assert area[i] == len(indices)
            mean = indices.mean(dim=0) if len(indices) else torch.zeros(2)
            assert [y[i].item(), x[i].item()] == pytest.approx(mean.tolist(), abs=1e-12)


def test_centers_of_nothing():
    y, x, area = mass_centers(torch.zeros(0, 8, 8, dtype=torch.bool))
    assert y.shape == x.shape == area.shape == (0,)
    assert mass_centers(torch.zeros(2, 0, 8, dtype=torch.bool))[2].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_above_is_the_strict_comparison(dtype, threshold):
    values = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)).to(dtype)
    values[0, 0], values[1, 1], values[2, 2] = threshold, float("nan"), float("inf")
    assert torch.equal(above(values, threshold), values > threshold)
    out = torch.ones(5, 9, dtype=torch.bool)
    above(values[:, 1:6], threshold, out=out[:, 2:7])
    assert torch.equal(out[:, 2:7], values[:, 1:6] > threshold)
    assert out[:, :2].all()
    assert out[:, 7:].all()


def test_boxes_within_windows_are_those_of_the_masks():
    masks = torch.zeros(4, 9, 12, dtype=torch.bool)
    masks[0, 2:5, 3:9] = True
    masks[1, 8, 11] = masks[2, 0, 0] = True
    windows = [(1, 2, 10, 9), (11, 8, 12, 9), (0, 0, 12, 9), (3, 3, 3, 3)]
    found = tight_boxes_within(masks, windows)
    assert found.dtype == torch.float32
    assert torch.equal(found, tight_boxes(masks))
    assert found[3].tolist() == [0, 0, 0, 0]
    assert tight_boxes_within(masks[:0], []).shape == (0, 4)
