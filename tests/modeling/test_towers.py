"""Blocks, towers and predictors: layers, initial values and names."""

import pytest
import torch
from detectron2.layers import Conv2d
from torch.nn import functional as F

from instseg_ext.layers.deform_conv import DeformConvPack
from instseg_ext.modeling.towers import DeformOptions, build_block, build_predictor, build_tower

# The deformable convolutions of PolarMask's published head.
WITH_BIAS = DeformOptions("all", modulated=True, bias=True)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_block_is_convolution_norm_and_relu(kernel_size):
    block = build_block(8, 32, kernel_size, "GN")
    x = torch.randn(2, 8, 5, 7)
    plain = F.conv2d(x, block.weight, padding=kernel_size // 2)
    torch.testing.assert_close(block(x), F.relu(F.group_norm(plain, 32)))
    assert set(block.state_dict()) == {"weight", "norm.weight", "norm.bias"}
    assert block.norm.eps == 1e-5


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_a_deformable_block_starts_without_offsets(modulated):
    block = build_block(8, 8, 3, "", deform=True, modulated=modulated)
    x = torch.randn(2, 8, 5, 7)
    factor = 0.5 if modulated else 1.0
    torch.testing.assert_close(block(x), F.relu(factor * F.conv2d(x, block.weight, padding=1)))
    assert block.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert set(block.state_dict()) == {"weight", "offset.weight", "offset.bias"}


def test_a_deformable_block_with_a_bias():
    block = build_block(16, 32, 3, "GN", deform=True, modulated=True, bias=True)
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    assert shapes == {
        "weight": (32, 16, 3, 3),
        "bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
        "offset.weight": (27, 16, 3, 3),
        "offset.bias": (27,),
    }
    assert not block.bias.any()
    assert not any(parameter.any() for parameter in block.offset.parameters())
    # Uniform within 1 / sqrt(16 * 9): a twelfth.
    assert block.weight.abs().max().item() == pytest.approx(1 / 12, rel=1e-3)
    assert block.weight.std().item() == pytest.approx(1 / 12 / 3**0.5, rel=0.05)

    torch.nn.init.normal_(block.bias)
    x = torch.randn(2, 16, 5, 7)
    half = F.conv2d(x, 0.5 * block.weight, block.bias, padding=1)
    torch.testing.assert_close(block(x), F.relu(F.group_norm(half, 32)), rtol=1e-5, atol=1e-5)


def test_a_bias_is_for_deformable_convolutions_only():
    block = build_block(8, 8, 3, "", bias=True)
    assert block.bias is None
    assert block.weight.std().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    ("towers", "where"),
    [("none", [False] * 3), ("last", [False, False, True]), ("all", [True] * 3)],
)
def test_where_a_tower_is_deformable(towers, where):
    tower = build_tower(5, 8, 3, "", DeformOptions(towers))
    assert [isinstance(block, DeformConvPack) for block in tower] == where
    assert [isinstance(block, Conv2d) for block in tower] == [not deform for deform in where]
    assert [block.weight.shape[1] for block in tower] == [5, 8, 8]
    assert all(block.bias is None for block in tower)
    assert tower(torch.randn(1, 5, 4, 6)).shape == (1, 8, 4, 6)


def test_a_tower_passes_every_option_on():
    tower = build_tower(5, 8, 2, "", WITH_BIAS)
    assert all(block.modulated and block.bias is not None for block in tower)


def test_a_predictor_starts_at_its_bias():
    layer = build_predictor(64, 16, -4.5)
    assert torch.equal(layer.bias, torch.full((16,), -4.5))
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert layer(torch.zeros(1, 64, 3, 4)).shape == (1, 16, 3, 4)
    assert build_predictor(8, 2, 0.0, kernel_size=1).weight.shape == (2, 8, 1, 1)
