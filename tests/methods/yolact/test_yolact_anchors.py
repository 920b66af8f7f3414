"""Anchors: numbers of the published inputs, order, and the cache."""

import math
from itertools import product

import pytest
import torch

from instseg_ext.methods.yolact.anchors import AnchorGrid

BASE = (24, 48, 96, 192, 384)
ONE = tuple((s,) for s in BASE)
THREE = tuple(tuple(s * 2 ** (i / 3) for i in range(3)) for s in BASE)
SIZES = {400: (50, 25, 13, 7, 4), 550: (69, 35, 18, 9, 5), 700: (88, 44, 22, 11, 6)}


def sizes_of(side):
    return [(s, s) for s in SIZES[side]]


def anchors_of(grid, side=550):
    return grid.anchors(sizes_of(side), (side, side), "cpu")


def oracle(grid, level_sizes, input_hw):
    """Loop over everything in Python's floats."""
    out = []
    for (height, width), scales in zip(level_sizes, grid.scales, strict=True):
        for row, col, scale, ratio in product(range(height), range(width), scales, grid.ratios):
            w = scale * math.sqrt(ratio)
            h = w if grid.square else scale / math.sqrt(ratio)
            center = ((col + 0.5) / width, (row + 0.5) / height)
            out.append((*center, w / input_hw[1], h / input_hw[0]))
    return torch.tensor(out)


@pytest.mark.parametrize(
    ("side", "scales", "count"),
    [(550, ONE, 19248), (550, THREE, 57744), (400, ONE, 10077), (700, ONE, 30963)],
)
def test_counts_of_published_inputs(side, scales, count):
    anchors = anchors_of(AnchorGrid(scales), side)
    assert anchors.shape == (count, 4)
    assert anchors.dtype == torch.float32


def test_first_square_anchors():
    grid = AnchorGrid(ONE, square=True)
    assert grid.num_per_cell == 3
    first, second, third = anchors_of(grid)[:3]
    torch.testing.assert_close(first, torch.tensor([0.5 / 69, 0.5 / 69, 24 / 550, 24 / 550]))
    torch.testing.assert_close(
        second[2:] * 550, torch.tensor([16.9706, 16.9706]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(third[2:] * 550, torch.tensor([33.9411, 33.9411]), atol=1e-4, rtol=0)


def test_first_nine_true_ratios():
    grid = AnchorGrid(THREE)
    assert grid.num_per_cell == 9
    sizes = anchors_of(grid)[:9, 2:] * 550
    scales = torch.tensor([24, 30.238, 38.098]).repeat_interleave(3)
    torch.testing.assert_close(sizes.prod(dim=1).sqrt(), scales, atol=1e-3, rtol=0)
    # Width by height: the second is tall, the third wide.
    expected = torch.tensor([[24, 24], [16.9706, 33.9411], [33.9411, 16.9706]])
    torch.testing.assert_close(sizes[:3], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("square", [False, True])
def test_equal_a_loop(square):
    grid = AnchorGrid(((8, 11.5), (16, 23)), (1, 0.5, 3), square)
    sizes, input_hw = [(5, 7), (3, 4)], (40, 60)
    assert torch.equal(grid.anchors(sizes, input_hw, "cpu"), oracle(grid, sizes, input_hw))


def test_published_order_equals_a_loop():
    grid = AnchorGrid(THREE)
    assert torch.equal(anchors_of(grid, 400), oracle(grid, sizes_of(400), (400, 400)))


def test_made_once_per_sizes():
    grid = AnchorGrid(ONE)
    assert anchors_of(grid) is anchors_of(AnchorGrid(ONE))
    assert len(anchors_of(grid, 400)) != len(anchors_of(grid))


def test_made_in_inference_mode_serve_training():
    grid = AnchorGrid(((8,), (17,)))
    with torch.inference_mode():
        grid.anchors([(4, 4), (2, 2)], (32, 32), "cpu")
    anchors = grid.anchors([(4, 4), (2, 2)], (32, 32), "cpu")
    deltas = torch.ones(anchors.shape, requires_grad=True)
    (deltas * anchors).sum().backward()
    assert torch.equal(deltas.grad, anchors)


def test_traced_programs_make_their_own(monkeypatch):
    grid, sizes = AnchorGrid(((8,), (18,))), [(4, 4), (2, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        traced = grid.anchors(sizes, (32, 32), "cpu")
    kept = grid.anchors(sizes, (32, 32), "cpu")
    assert traced is not kept
    assert torch.equal(traced, kept)


@pytest.mark.parametrize(
    ("scales", "ratios", "key"),
    [
        (((8, 16), (32,)), (1,), "ANCHOR_SCALES"),
        (((), ()), (1,), "ANCHOR_SCALES"),
        ((), (1,), "ANCHOR_SCALES"),
        (((8,), (0,)), (1,), "ANCHOR_SCALES"),
        (((8,),), (), "ASPECT_RATIOS"),
        (((8,),), (1, -2), "ASPECT_RATIOS"),
    ],
)
def test_bad_settings_are_refused(scales, ratios, key):
    with pytest.raises(ValueError, match=f"MODEL.YOLACT.{key}"):
        AnchorGrid(scales, ratios)


def test_levels_without_scales_are_refused():
    with pytest.raises(ValueError, match="argument"):
        AnchorGrid(((8,),)).anchors([(4, 4), (2, 2)], (32, 32), "cpu")
