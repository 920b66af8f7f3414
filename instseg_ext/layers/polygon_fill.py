"""Filled polygons: from vertices to runs of pixels, and from these to masks or COCO run lengths.

The rule is that of OpenCV's ``fillPoly`` and ``drawContours`` with 8-connected borders. Vertices
are integers that number pixels. A pixel belongs to the polygon when its centre lies inside
(even-odd rule) or when an edge passes through it. An edge passes through one pixel for each step
along its longer side, the nearest one; of two equally near the one closer to the edge's left end,
measured along its shorter side. So no polygon is empty: one whose vertices coincide is one pixel.

Nothing loops over pixels, lines or polygons: a polygon becomes one interval of pixels for every
edge and line of the image that meet, and one sort unites the intervals. Time and memory grow with
outlines, not with areas.

Shapes: N polygons of V vertices, H x W image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from instseg_ext.layers.mask_ops import RLEList
from instseg_ext.structures.contours import expand_ragged
from instseg_ext.structures.rle import encode_runs

__all__ = ["fill_polygons", "polygon_runs", "polygons_to_rle"]

# Meetings of edges and lines that are worked on at once; each takes some 200 bytes.
_MEETINGS = 2**20


def polygon_runs(polygons: Tensor, size_hw: tuple[int, int], *, by_column: bool = False) -> Tensor:
    """Return the runs of pixels that make up filled polygons.

    Args:
        polygons: (N, V, 2) integers, (x, y), inside the image; V is at least 3.
        size_hw: (H, W).
        by_column: number the pixels down the columns, as COCO's run lengths do, not along the rows.

    Returns:
        (S, 3) int64: index of the polygon, first pixel, one past the last pixel. Sorted; runs of
        one polygon do not touch.
    """
    axes = (0, 1) if by_column else (1, 0)
    line_length, num_lines = size_hw if by_column else size_hw[::-1]
    # One pixel more than the image has, so that runs of two polygons cannot touch.
    stride = line_length * num_lines + 1
    polygons = polygons.long()
    runs, start = [torch.zeros((0, 3), dtype=torch.int64, device=polygons.device)], 0
    for part in _parts(polygons, axes[0]):
        first, end = _part_runs(part, axes, line_length, stride)
        index = torch.div(first, stride, rounding_mode="floor")
        runs.append(
            torch.stack([index + start, first - index * stride, end - index * stride], dim=1)
        )
        start += len(part)
    return torch.cat(runs)


def _parts(polygons: Tensor, scan: int) -> Sequence[Tensor]:
    """Split polygons so that those of one part meet a bounded number of lines."""
    meetings = (polygons - polygons.roll(-1, dims=1))[..., scan].abs().sum(dim=1)
    part = torch.div((meetings + polygons.shape[1]).cumsum(0), _MEETINGS, rounding_mode="floor")
    return polygons.split(part.unique_consecutive(return_counts=True)[1].tolist())


def _part_runs(
    polygons: Tensor, axes: tuple[int, int], line_length: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Return first pixel and end of runs, each polygon's pixels numbered from ``stride`` times it.

    Args:
        polygons: (N, V, 2) int64.
        axes: the coordinate that numbers the lines, and the one along them.
        line_length: pixels of a line.
        stride: pixels between two polygons.
    """
    scan, other = axes
    edge = torch.stack([polygons, polygons.roll(-1, dims=1)], dim=2).flatten(0, 1)
    # From the left end: that is where ties are decided.
    edge = torch.where((edge[:, 0, 0] > edge[:, 1, 0])[:, None, None], edge.flip(1), edge)
    begin, step = edge[:, 0], edge[:, 1] - edge[:, 0]
    base = torch.arange(len(polygons), device=edge.device).repeat_interleave(polygons.shape[1])
    base = base * stride + begin[:, scan] * line_length + begin[:, other]

    lines = step[:, scan].abs() + 1
    row, j = expand_ragged(torch.zeros_like(lines), lines)
    line_step, place_step = step[:, scan][row], step[:, other][row]
    place = base[row] + line_step.sign() * j * line_length
    spans = _spans(place, place_step, line_step, j)
    borders = _borders(place, place_step, line_step, j)
    return _union(torch.cat([spans, borders], dim=1))


def _spans(place: Tensor, place_step: Tensor, line_step: Tensor, j: Tensor) -> Tensor:
    """Return (2, S): first pixel and end of what lies between pairs of edges on a line.

    Args:
        place: (L,) where the edge begins, moved to the line.
        place_step: (L,) extent of the edge along the line.
        line_step: (L,) extent of the edge across the lines.
        j: (L,) lines from the beginning of the edge.
    """
    # A vertex must count once: an edge meets its line with the lowest number, not the last one.
    meets = torch.where(line_step > 0, j < line_step, (j > 0) & (line_step < 0))
    meets = meets.nonzero().squeeze(1)
    place, place_step, lines, j = place[meets], place_step[meets], line_step[meets].abs(), j[meets]
    # Float64 holds the products, and a quotient that is no integer differs from one by far more
    # than it rounds.
    crossing = place + (place_step * j / lines.double()).ceil().long()
    # Every line is met an even number of times.
    return _sorted(crossing).view(-1, 2).T


def _borders(place: Tensor, place_step: Tensor, line_step: Tensor, j: Tensor) -> Tensor:
    """Return (2, L): first pixel and end of what an edge passes on a line; see ``_spans``."""
    run, rise = place_step.abs(), line_step.abs().double()
    # More steps along the lines than across them: all those whose nearest line this is.
    twice = 2 * rise.clamp(min=1)
    low = torch.where(j == 0, 0, ((2 * j - 1) * run / twice).floor() + 1)
    high = torch.where(j == rise, run, ((2 * j + 1) * run / twice).floor())
    # More steps across: the one nearest to where the edge meets the line.
    nearest = ((2 * j * run - rise) / twice).ceil()
    steep = rise > run
    low, high = torch.where(steep, nearest, low).long(), torch.where(steep, nearest, high).long()
    back = place_step < 0
    first = torch.where(back, place - high, place + low)
    last = torch.where(back, place - low, place + high)
    return torch.stack([first, last + 1])


def _sorted(values: Tensor) -> Tensor:
    """Return (L,) int64 values in order."""
    if values.device.type == "cpu":
        # Torch sorts indices along with them, at four times the price.
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values


def _union(intervals: Tensor) -> tuple[Tensor, Tensor]:
    """Return first pixel and end of the runs that (2, L) intervals make together."""
    # Both numbers in one, so that one sort of values orders them: intervals lie within a line, and
    # no line has 2 ** 20 pixels.
    packed = _sorted(intervals[0] * 2**20 + (intervals[1] - intervals[0]))
    first = packed >> 20
    end = (first + packed % 2**20).cummax(dim=0).values
    begins = torch.ones_like(first, dtype=torch.bool)
    begins[1:] = first[1:] > end[:-1]
    # A run ends where the interval before the next run's first one does.
    return first[begins], end[begins.roll(-1)]


def fill_polygons(polygons: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Draw filled polygons.

    Args:
        polygons: (N, V, 2) integers, (x, y), inside the image; V is at least 3.
        size_hw: (H, W).

    Returns:
        (N, H, W) bool on the device of ``polygons``.
    """
    num, pixels = len(polygons), size_hw[0] * size_hw[1]
    runs = polygon_runs(polygons, size_hw)
    bounds = runs[:, :1] * pixels + runs[:, 1:]
    paint = _paint_by_repeating if bounds.device.type == "cpu" else _paint_by_summing
    return paint(bounds, num * pixels).view(num, *size_hw)


def _paint_by_repeating(bounds: Tensor, pixels: int) -> Tensor:
    """Return (pixels,) bool that is true in the sorted runs of (S, 2) bounds."""
    # NumPy repeats bytes at the speed of memory, torch by way of an index for each pixel.
    edges = np.concatenate([[0], bounds.flatten().numpy(), [pixels]])
    inside = np.arange(len(edges) - 1) % 2 == 1
    return torch.from_numpy(np.repeat(inside, np.diff(edges)))


def _paint_by_summing(bounds: Tensor, pixels: int) -> Tensor:
    """Return what ``_paint_by_repeating`` does, on any device."""
    steps = torch.zeros(pixels + 1, dtype=torch.int8, device=bounds.device)
    # Added, because one run may end where that of the next polygon begins.
    for column, value in ((0, 1), (1, -1)):
        steps.index_add_(0, bounds[:, column], steps.new_full((len(bounds),), value))
    return steps.cumsum(dim=0, dtype=torch.int8)[:pixels].view(torch.bool)


def polygons_to_rle(polygons: Tensor, size_hw: tuple[int, int]) -> RLEList:
    """Encode filled polygons as compressed COCO RLE, without drawing them.

    Args:
        polygons: (N, V, 2) integers, (x, y), inside the image; V is at least 3.
        size_hw: (H, W).

    Returns:
        N dictionaries as ``encode_rle`` gives them for the drawn masks.
    """
    runs = polygon_runs(polygons, size_hw, by_column=True)
    return RLEList(encode_runs(runs.cpu().numpy(), len(polygons), size_hw))
