"""Points against values worked out by hand and against detectron2's RoIAlign and BitMasks."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ROIAlign

from instseg_ext.layers.point_sample import (
    PointMap,
    cell_weights,
    grid_points,
    points_in_boxes,
    sample_masks,
    sample_points,
)


@pytest.mark.parametrize(
    ("point", "value"),
    [
        ((0.25, 0.25), 0.0),
        ((0.5, 0.5), 1.5),
        ((0.75, 0.25), 1.0),
        ((0.5, 0.25), 0.5),
        ((0.0, 0.0), 0.0),
        ((1.0, 1.0), 0.75),
    ],
)
def test_single_points(point, value):
    cells = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert sample_points(cells, torch.tensor([[point]])).item() == pytest.approx(value)


def test_maps_fade_out_at_their_border():
    sampled = sample_points(torch.full((1, 1, 7, 7), 4.0), grid_points(28)[None]).view(28, 28)
    assert torch.allclose(sampled[0, :4], torch.tensor([1.5625, 2.1875, 2.5, 2.5]))
    assert torch.allclose(sampled[14, :4], torch.tensor([2.5, 3.5, 4.0, 4.0]))


def test_points_may_form_a_grid():
    cells = torch.randn(2, 3, 4, 5)
    points = torch.rand(2, 6, 2, 2)
    sampled = sample_points(cells, points)
    assert sampled.shape == (2, 3, 6, 2)
    assert torch.equal(sampled.flatten(2), sample_points(cells, points.flatten(1, 2)))


def test_half_precision_maps_are_read_in_float32():
    cells = torch.randn(1, 2, 300, 300).bfloat16()
    points = torch.rand(1, 50, 2)
    with torch.autocast("cpu", torch.bfloat16):
        sampled = sample_points(cells, points)
    assert torch.equal(sampled, sample_points(cells.float(), points))


def test_grid_runs_along_x_first():
    points = grid_points(28)
    expected = torch.tensor([[0.017857, 0.017857], [0.053571, 0.017857], [0.017857, 0.053571]])
    assert torch.allclose(points[[0, 1, 28]], expected, atol=1e-6)


def test_points_in_boxes():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    points = torch.tensor([[0.0, 0.0], [0.5, 0.25], [1.0, 1.0]])
    expected = torch.tensor([[[10.0, 20.0], [20.0, 30.0], [30.0, 60.0]]])
    assert torch.equal(points_in_boxes(boxes, points), expected)
    assert torch.equal(points_in_boxes(boxes, points[None]), expected)


def test_levels_equal_roi_align_inside_the_image():
    levels = [torch.randn(1, 3, 32, 40), torch.randn(1, 2, 16, 20)]
    boxes = torch.tensor([[20.0, 16.0, 90.0, 100.0], [40.0, 30.0, 61.0, 45.0]])
    grid = points_in_boxes(boxes, grid_points(14))
    maps = [PointMap.of(level, stride) for level, stride in zip(levels, (4, 8), strict=True)]
    sampled = torch.cat([level.at(grid) for level in maps], dim=2).mT.unflatten(2, (14, 14))
    rois = torch.cat([torch.zeros(2, 1), boxes], dim=1)
    expected = [
        ROIAlign((14, 14), 1 / stride, 1, aligned=True)(level, rois)
        for level, stride in zip(levels, (4, 8), strict=True)
    ]
    assert torch.allclose(sampled, torch.cat(expected, dim=1), atol=1e-4)


def test_levels_fade_out_at_the_border_where_roi_align_does_not():
    level = torch.ones(1, 1, 16, 16)
    box = torch.tensor([[0.0, 10.0, 14.0, 50.0]])
    sampled = PointMap.of(level, 4).at(points_in_boxes(box, grid_points(14))).view(14, 14)
    aligned = ROIAlign((14, 14), 0.25, 1, aligned=True)(level, torch.tensor([[0, 0, 10, 14, 50.0]]))
    assert torch.allclose(sampled[:, 0], torch.tensor(0.625))
    assert torch.allclose(sampled[:, 2:], aligned[0, 0, :, 2:])
    assert torch.allclose(aligned, torch.tensor(1.0))


def test_no_regions():
    level = torch.randn(1, 3, 8, 8, requires_grad=True)
    sampled = PointMap.of(level, 4).at(torch.zeros(0, 5, 2))
    assert sampled.shape == (0, 5, 3)
    sampled.sum().backward()
    assert torch.equal(level.grad, torch.zeros_like(level))


def test_maps_are_read_as_grid_sample_reads_them():
    level = torch.randn(1, 3, 50, 70, dtype=torch.float64).float().requires_grad_()
    points = torch.rand(4, 60, 2) * torch.tensor([320.0, 240.0]) - 20
    for layout in (torch.contiguous_format, torch.channels_last):
        read = PointMap.of(level.contiguous(memory_format=layout), 4).at(points)
        relative = (points / torch.tensor([280.0, 200.0])).flatten(0, 1)[None]
        expected = sample_points(level, relative)[0].mT.unflatten(0, (4, 60))
        assert torch.allclose(read, expected, atol=1e-6)
        weights = torch.randn_like(read)
        gradients = [torch.autograd.grad((x * weights).sum(), level)[0] for x in (read, expected)]
        assert torch.allclose(*gradients, atol=1e-5)


def test_a_linear_map_may_come_first():
    level, weight = PointMap.of(torch.randn(1, 6, 9, 8), 4), torch.randn(5, 6)
    points = torch.rand(2, 30, 2) * 40 - 4
    expected = level.at(points) @ weight.t()
    assert torch.allclose(level.times(weight).at(points), expected, atol=1e-5)


def test_weights_of_cells():
    points = torch.rand(3, 40, 2) * 1.4 - 0.2
    maps = torch.randn(3, 5, 7, 7)
    expected = sample_points(maps, points)
    assert torch.allclose(maps.flatten(2) @ cell_weights(points, 7).mT, expected, atol=2e-6)
    assert ((cell_weights(points, 7) != 0).sum(dim=2) <= 4).all()


def test_masks_have_soft_values_between_pixels():
    masks = torch.zeros(1, 12, 30, dtype=torch.bool)
    masks[:, :, :10] = True
    x = torch.tensor([9.5, 9.75, 10.0, 10.5, 0.0, -3.0, 40.0])
    points = torch.stack([x, torch.full_like(x, 6.0)], dim=1)[None]
    values = sample_masks(masks, torch.tensor([0]), points)
    assert torch.allclose(values, torch.tensor([[1.0, 0.75, 0.5, 0.0, 0.5, 0.0, 0.0]]))


def test_masks_equal_the_interpolation_of_float_masks():
    masks = torch.rand(3, 40, 50) > 0.5
    index = torch.tensor([2, 0, 0, 1])
    points = torch.rand(4, 60, 2) * torch.tensor([60.0, 50.0]) - 5
    expected = sample_points(masks[index].float()[:, None], points / torch.tensor([50.0, 40.0]))
    assert torch.allclose(sample_masks(masks, index, points), expected[:, 0], atol=1e-5)
