"""Filled polygons: OpenCV's pixels exactly, whatever the polygon, and the same as run lengths."""

import cv2
import numpy as np
import pytest
import torch

from instseg_ext.layers import polygon_fill
from instseg_ext.layers.polygon_fill import fill_polygons, polygon_runs, polygons_to_rle
from instseg_ext.structures.rle import encode_masks

OPENCV = {
    "fillPoly": lambda mask, polygon: cv2.fillPoly(mask, [polygon], 1),
    # What the authors of PolarMask call.
    "drawContours": lambda mask, polygon: cv2.drawContours(mask, [polygon], -1, 1, cv2.FILLED),
}


def by_opencv(function, polygons, size_hw):
    masks = np.zeros((len(polygons), *size_hw), dtype=np.uint8)
    for mask, polygon in zip(masks, polygons.numpy(), strict=True):
        OPENCV[function](mask, polygon.astype(np.int32)[:, None])
    return torch.from_numpy(masks).bool()


def star(rng, num, vertices, size_hw):
    """Polygons around a centre, cut at the border of the image."""
    height, width = size_hw
    angles = np.arange(vertices) * 2 * np.pi / vertices
    centres = rng.uniform(0, 1, (num, 1, 2)) * [width, height]
    lengths = rng.uniform(0, 0.7 * max(size_hw), (num, vertices, 1))
    tips = centres + lengths * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    return torch.from_numpy(tips.clip(0, [width - 1, height - 1]).astype(np.int64))


def tangle(rng, num, vertices, size_hw):
    """Polygons that cross themselves in any way."""
    height, width = size_hw
    corners = [rng.integers(0, side, (num, vertices)) for side in (width, height)]
    return torch.from_numpy(np.stack(corners, axis=-1))


@pytest.mark.parametrize("function", OPENCV)
@pytest.mark.parametrize("make", [star, tangle])
def test_pixels_are_those_of_opencv(make, function):
    rng = np.random.default_rng(0)
    for _ in range(60):
        size_hw = tuple(int(side) for side in rng.integers(1, 60, 2))
        polygons = make(rng, rng.integers(1, 20), rng.integers(3, 40), size_hw)
        expected = by_opencv(function, polygons, size_hw)
        assert torch.equal(fill_polygons(polygons, size_hw), expected)


@pytest.mark.parametrize("function", OPENCV)
def test_long_edges_are_those_of_opencv(function):
    size_hw = (1000, 1400)
    polygons = tangle(np.random.default_rng(4), 3, 36, size_hw)
    expected = by_opencv(function, polygons, size_hw)
    assert torch.equal(fill_polygons(polygons, size_hw), expected)


def test_more_pixels_than_32_bits_can_number():
    small, side, num = 50, 20_000, 100
    # One pixel away from the border, so that no run goes on in the next column.
    polygons = star(np.random.default_rng(5), num, 36, (small - 2, small - 2)) + 1
    far = side - small
    index, *ends = polygon_runs(polygons, (small, small), by_column=True).T
    expected = [(x // small + far) * side + x % small + far for x in ends]
    found = polygon_runs(polygons + far, (side, side), by_column=True)
    assert torch.equal(found, torch.stack([index, *expected], dim=1))


@pytest.mark.parametrize("make", [star, tangle])
def test_run_lengths_are_those_of_the_masks(make):
    rng = np.random.default_rng(1)
    for _ in range(30):
        size_hw = tuple(int(side) for side in rng.integers(1, 60, 2))
        polygons = make(rng, rng.integers(1, 20), rng.integers(3, 40), size_hw)
        masks = fill_polygons(polygons, size_hw)
        assert polygons_to_rle(polygons, size_hw) == encode_masks(masks)


def test_other_devices_paint_the_same():
    size_hw = (50, 40)
    polygons = star(np.random.default_rng(2), 30, 36, size_hw)
    # The last pixel of one image and the first of the next both belong to a polygon.
    polygons[0], polygons[1] = torch.tensor([39, 49]), torch.tensor([0, 0])
    runs = polygon_runs(polygons, size_hw)
    painted = polygon_fill._paint_by_summing(runs[:, :1] * 2000 + runs[:, 1:], 30 * 2000)
    assert torch.equal(painted.view(30, *size_hw), fill_polygons(polygons, size_hw))


def test_parts_do_not_change_the_result(monkeypatch):
    size_hw = (60, 60)
    polygons = star(np.random.default_rng(3), 25, 36, size_hw)
    whole = polygon_runs(polygons, size_hw)
    monkeypatch.setattr(polygon_fill, "_MEETINGS", 300)
    assert len(polygon_fill._parts(polygons, 1)) > 5
    assert torch.equal(polygon_runs(polygons, size_hw), whole)


def test_a_point_is_a_pixel_and_a_collapsed_polygon_a_line():
    point = torch.tensor([3, 2]).expand(1, 36, 2)
    assert fill_polygons(point, (5, 8)).nonzero().tolist() == [[0, 2, 3]]
    on_the_edge = torch.stack([torch.zeros(4), torch.tensor([1, 3, 4, 2])], dim=1)[None].long()
    assert fill_polygons(on_the_edge, (6, 4)).nonzero().tolist() == [[0, y, 0] for y in range(1, 5)]


def test_no_polygon():
    none = torch.zeros((0, 36, 2), dtype=torch.int64)
    assert fill_polygons(none, (4, 5)).shape == (0, 4, 5)
    assert polygons_to_rle(none, (4, 5)) == []
