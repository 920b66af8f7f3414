"""Position-sensitive pooling against plain loops and the cells it must read."""

from __future__ import annotations

import math

import pytest
import torch

from instseg_ext.layers import ps_roi_pool
from instseg_ext.layers.ps_roi_pool import ps_roi_average_pool, ps_roi_scores

SCALE = 1 / 16


def half_away(value):
    return math.copysign(math.floor(abs(value) + 0.5), value)


def edges(low, high, scale, bins, length):
    """First and past-the-last cell of each bin of one axis, in float32 step by step."""
    start, end = (torch.tensor(half_away(float(v))) * scale for v in (low, high))
    step = torch.maximum(end - start, torch.tensor(0.1)) / bins
    for k in range(bins):
        first = math.floor(float(torch.tensor(float(k)) * step + start))
        last = math.ceil(float(torch.tensor(float(k + 1)) * step + start))
        yield min(max(first, 0), length), min(max(last, 0), length)


def loop_pool(features, rois, scale, groups, bins):
    """Region by region, bin by bin."""
    _, channels, height, width = features.shape
    maps = channels // groups**2
    regions = []
    for image, x1, y1, x2, y2 in rois.tolist():
        grouped = features[int(image)].view(maps, groups, groups, height, width)
        cells = []
        for p, (top, bottom) in enumerate(edges(y1, y2, scale, bins, height)):
            for q, (left, right) in enumerate(edges(x1, x2, scale, bins, width)):
                window = grouped[:, p * groups // bins, q * groups // bins, top:bottom, left:right]
                area = (bottom - top) * (right - left)
                cells.append(window.sum((1, 2)) / area if area > 0 else window.new_zeros(maps))
        regions.append(torch.stack(cells, dim=1).view(maps, bins, bins))
    return torch.stack(regions)


def regions():
    """Boxes on two images of 224 x 160 pixels."""
    rois = [
        [0, 3.2, 5.5, 100.7, 90.1],
        [1, 0, 0, 224, 160],
        [0, -40.5, -60, 70, 300],  # beyond three borders
        [1, 50, 60, 50, 60],  # no extent
        [0, 90, 80, 70, 60],  # inverted
        [1, 300, 10, 400, 90],  # outside
        [0, 215.5, 148.5, 224, 160],
        [1, -300, -300, -200, -200],
    ]
    return torch.tensor(rois)


@pytest.mark.parametrize(("maps", "groups", "bins"), [(1, 7, 21), (2, 3, 6), (2, 2, 5), (3, 3, 3)])
def test_values_and_gradients_equal_plain_loops(maps, groups, bins):
    gen = torch.Generator().manual_seed(0)
    shape = (2, maps * groups**2, 10, 14)
    features = torch.randn(shape, generator=gen, dtype=torch.float64, requires_grad=True)
    pooled = ps_roi_average_pool(features, regions(), SCALE, group_size=groups, output_size=bins)
    expected = loop_pool(features, regions(), SCALE, groups, bins)
    assert pooled.shape == (8, maps, bins, bins)
    assert (pooled - expected).abs().max() < 1e-12
    assert pooled[[5, 7]].eq(0).all()
    upstream = torch.randn(pooled.shape, generator=gen, dtype=torch.float64)
    gradients = [torch.autograd.grad((v * upstream).sum(), features)[0] for v in (pooled, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-12


@pytest.fixture
def lists(monkeypatch):
    """Lengths of the lists of cells that are made."""
    lengths, listed = [], ps_roi_pool._cells_of_bins

    def spy(*args):
        found = listed(*args)
        lengths.append(len(found[0]))
        return found

    monkeypatch.setattr(ps_roi_pool, "_cells_of_bins", spy)
    return lengths


@pytest.mark.parametrize("gradients", [False, True])
def test_parts_of_the_regions_are_pooled_as_all_of_them(lists, monkeypatch, gradients):
    features = torch.randn(2, 3 * 9, 10, 14, dtype=torch.float64, requires_grad=gradients)
    pooled = [ps_roi_average_pool(features, regions(), SCALE, group_size=3, output_size=6)]
    # lists of three regions
    monkeypatch.setattr(ps_roi_pool, "_LIST_MB", 3.5 * 22 * 26 * 64 / 2**20)
    pooled.append(ps_roi_average_pool(features, regions(), SCALE, group_size=3, output_size=6))
    assert len(lists) == 1 + 3
    assert torch.equal(*pooled)
    if gradients:
        assert torch.equal(*(torch.autograd.grad(x.square().sum(), features)[0] for x in pooled))


def test_memory_does_not_grow_with_regions(lists):
    roi = torch.tensor([[0.0, 0, 0, 2672, 1600]])
    ps_roi_average_pool(torch.zeros(1, 49, 100, 167), roi.expand(40, -1), SCALE)
    assert len(lists) > 1
    assert max(lists) * 8 * 8 <= 64 * 2**20


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_region_of_21_cells_is_read_cell_by_cell(layout):
    features = torch.randn(1, 3 * 49, 23, 24).contiguous(memory_format=layout)
    roi = torch.tensor([[0.0, 16, 16, 16 + 336, 16 + 336]])
    pooled = ps_roi_average_pool(features, roi, SCALE)
    grouped = features.view(3, 7, 7, 23, 24)
    for p in range(21):
        for q in range(21):
            expected = grouped[:, p // 3, q // 3, 1 + p, 1 + q]
            assert torch.equal(pooled[0, :, p, q], expected)


def test_bins_of_a_region_of_80_pixels():
    # a ramp over columns in every channel: the mean is the middle of the bin's columns
    ramp = torch.arange(12.0).expand(1, 49, 12, 12).contiguous()
    roi = torch.tensor([[0.0, 32, 32, 112, 112]])
    means = ps_roi_average_pool(ramp, roi, SCALE)[0, 0, 0]
    begin = [2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6]
    end = [3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7]
    assert list(edges(32, 112, SCALE, 21, 12)) == list(zip(begin, end, strict=True))
    assert means.tolist() == [(a + b - 1) / 2 for a, b in zip(begin, end, strict=True)]


def test_channel_order():
    # class 3, inside, third row and sixth column of the groups
    features = torch.zeros(1, 4 * 2 * 49, 24, 24)
    features[:, ((2 * 3 + 1) * 7 + 2) * 7 + 5] = 1
    roi = torch.tensor([[0.0, 10, 20, 300, 330]])
    pooled = ps_roi_average_pool(features, roi, SCALE).view(4, 2, 21, 21)
    expected = torch.zeros(4, 2, 21, 21)
    expected[3, 1, 6:9, 15:18] = 1
    assert torch.equal(pooled, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scores_and_masks_are_those_of_the_pooled_maps(layout, monkeypatch):
    # parts of two regions
    monkeypatch.setattr(ps_roi_pool, "_PART_MB", 2 * 5 * 2 * 36 * 8 / 2**20)
    gen = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5 * 2 * 9, 10, 14, generator=gen, dtype=torch.float64)
    features = features.contiguous(memory_format=layout)
    features[:, 4 * 2 * 9 :] += 5  # the background is the best class everywhere
    sizes = {"group_size": 3, "output_size": 6}
    logits, masks = ps_roi_scores(features, regions(), SCALE, **sizes)
    pooled = ps_roi_average_pool(features, regions(), SCALE, **sizes).view(8, 5, 2, 6, 6)
    expected = pooled.amax(dim=2).mean(dim=(2, 3))
    assert torch.allclose(logits, expected, atol=1e-12)
    best = expected[:, :4].argmax(dim=1)
    expected = pooled[torch.arange(8), best].softmax(dim=1)[:, 1]
    assert torch.allclose(masks, expected, atol=1e-12)


def test_score_of_an_inside_map():
    # the inside map of the one class is 1.5 everywhere, its outside map 0
    features = torch.zeros(1, 2, 2, 49, 8, 8)
    features[:, 0, 1] = 1.5
    roi = torch.tensor([[0.0, 10, 10, 100, 90]])
    logits, masks = ps_roi_scores(features.view(1, -1, 8, 8), roi, SCALE)
    assert logits[0].tolist() == pytest.approx([1.5, 0])
    assert torch.allclose(masks, torch.full((1, 21, 21), 0.81757), atol=1e-5)
    # a constant on both maps moves the score alone
    features[:, 0] += 2
    moved, same = ps_roi_scores(features.view(1, -1, 8, 8), roi, SCALE)
    assert moved[0].tolist() == pytest.approx([3.5, 0])
    assert torch.allclose(same, masks)


def test_scores_of_no_regions_and_in_half_precision():
    features = torch.randn(1, 6 * 49, 8, 8).bfloat16()
    roi = torch.tensor([[0.0, 10, 10, 100, 90]])
    with torch.autocast("cpu", torch.bfloat16):
        logits, masks = ps_roi_scores(features, roi, SCALE)
    expected = ps_roi_scores(features.float(), roi, SCALE)
    assert torch.equal(logits, expected[0])
    assert torch.equal(masks, expected[1])
    logits, masks = ps_roi_scores(features, roi[:0], SCALE)
    assert logits.shape == (0, 3)
    assert masks.shape == (0, 21, 21)


def test_half_precision_autocast_and_no_regions():
    features = torch.randn(1, 49, 8, 8).bfloat16()
    roi = torch.tensor([[0.0, 10, 10, 100, 90]])
    with torch.autocast("cpu", torch.bfloat16):
        pooled = ps_roi_average_pool(features, roi, SCALE)
    assert pooled.dtype == torch.bfloat16
    assert torch.equal(pooled, ps_roi_average_pool(features.float(), roi, SCALE).bfloat16())
    features = features.float().requires_grad_()
    none = ps_roi_average_pool(features, roi[:0], SCALE)
    assert none.shape == (0, 1, 21, 21)
    none.sum().backward()
    assert features.grad.abs().max() == 0


def test_regions_all_outside_the_map():
    features = torch.ones(1, 2 * 2 * 49, 8, 8, requires_grad=True)
    rois = torch.tensor([[0.0, 300, 300, 400, 400], [0, -90, 10, -20, 50]])
    pooled = ps_roi_average_pool(features, rois, SCALE)
    assert pooled.eq(0).all()
    pooled.sum().backward()
    assert features.grad.eq(0).all()
    logits, masks = ps_roi_scores(features, rois, SCALE)
    assert logits.eq(0).all()
    assert masks.eq(0.5).all()


def test_regions_that_are_no_numbers_are_no_reason_to_stop():
    roi = torch.tensor([[0.0, float("nan"), 0, float("inf"), 64], [0, 0, 0, 64, 64]])
    pooled = ps_roi_average_pool(torch.ones(1, 49, 8, 8), roi, SCALE)
    assert pooled[1].eq(1).all()


def test_channels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="a multiple of 49 channels, not 50"):
        ps_roi_average_pool(torch.zeros(1, 50, 8, 8), torch.zeros(1, 5), SCALE)
    with pytest.raises(ValueError, match="as many outside as inside maps are needed, not 3 in all"):
        ps_roi_scores(torch.zeros(1, 3 * 49, 8, 8), torch.zeros(1, 5), SCALE)
