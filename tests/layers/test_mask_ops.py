"""Counting the pixels of masks."""

import pytest
import torch

from instseg_ext.layers.mask_ops import count_pixels


@pytest.mark.parametrize("size", [(200, 336), (3, 3), (8, 8), (2, 4), (1, 2040), (1, 2048), (0, 8)])
def test_count_equals_the_sum(size):
    masks = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) > 0.3
    masks[1] = True
    for part in (masks, masks[1:], masks[:0], masks.mT):
        assert torch.equal(count_pixels(part), part.flatten(1).sum(dim=1))
