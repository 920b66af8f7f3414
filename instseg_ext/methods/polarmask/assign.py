"""Which locations are responsible for which objects.

Shape shorthand: N images, L levels, P locations of an image, level-major and then row-major, M_n
objects of image n, G objects of the batch, Q positive locations. Boxes are (x1, y1, x2, y2) with
x2 and y2 the last pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.structures.contours import expand_ragged

__all__ = ["AssignOptions", "Positives", "assign", "locations"]

# Below the first level's range and above the last one's.
_NO_BOUND = (-1.0, 1e8)


@dataclass(frozen=True)
class AssignOptions:
    """Rules of the assignment.

    Attributes:
        strides: distance of two locations in pixels, per level, finest first.
        size_ranges: L - 1 bounds between the levels, in pixels, ascending.
        center: where the positive locations of an object lie: around its mass centre (``mass``) or
            the centre of its box (``box``), or all over the box (``none``).
        radius: half side of the square around the centre, in strides.
    """

    strides: tuple[int, ...]
    size_ranges: tuple[float, ...]
    center: str = "mass"
    radius: float = 1.5

    def __post_init__(self) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: naming the key.
        """
        check_choice("MODEL.POLARMASK.CENTER", self.center, ("mass", "box", "none"))
        if len(self.size_ranges) != len(self.strides) - 1:
            raise ValueError(
                f"MODEL.POLARMASK.SIZE_RANGES needs {len(self.strides) - 1} bounds for "
                f"{len(self.strides)} levels, not {len(self.size_ranges)}."
            )


class Positives(NamedTuple):
    """The positive locations of a batch, by ascending ``index``.

    Attributes:
        index: (Q,) int64 into the N * P locations.
        instance: (Q,) int64 into the G objects.
        points: (Q, 2) float32 (x, y) of the location, whole pixels.
        boxes: (Q, 4) float32 distances to the left, top, right and bottom side of the box.
    """

    index: Tensor
    instance: Tensor
    points: Tensor
    boxes: Tensor


def locations(
    level_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return where the cells of all levels lie in the network input.

    Args:
        level_sizes: (height, width) of each level.
        strides: of each level.
        device: of the result.

    Returns:
        (P, 2) float32 (x, y).
    """
    grids = []
    for (height, width), stride in zip(level_sizes, strides, strict=True):
        x = torch.arange(width, dtype=torch.float32, device=device) * stride + stride // 2
        y = torch.arange(height, dtype=torch.float32, device=device) * stride + stride // 2
        grids.append(torch.cartesian_prod(y, x).flip(1))
    return torch.cat(grids)


@torch.no_grad()
def assign(
    level_sizes: Sequence[tuple[int, int]],
    gt_boxes: Sequence[Tensor],
    gt_centers: Sequence[Tensor] | None,
    options: AssignOptions,
) -> Positives:
    """Assign the objects of a batch to locations.

    A location is positive for an object when it lies strictly inside the object's region (the
    square around the centre, cut by the box) and its largest distance to a side of the box is in
    the range of its level, both ends included. Of several objects it takes the one whose box has
    the smallest area, of equal ones the first (Sec. 3.1 of arXiv:1909.13226).

    Only cells near the centres are looked at, never all pairs of locations and objects. On other
    devices than the CPU this waits twice, for the number of candidates and of positives.

    Args:
        level_sizes: (height, width) of each level.
        gt_boxes: N times (M_n, 4), x2 and y2 inclusive.
        gt_centers: N times (M_n, 2) (x, y); not used unless the centre is ``mass``.
        options: the rules.

    Returns:
        See `Positives`.

    Note:
        The authors' sampling finds no positive in an image whose first object has its centre in
        column 0. That is a slip and not followed.
    """
    boxes = torch.cat(list(gt_boxes)).float()
    counts = torch.tensor([len(part) for part in gt_boxes], device=boxes.device)
    image = torch.repeat_interleave(counts, output_size=len(boxes))
    limits = _limits(boxes, gt_centers, options)
    windows = _windows(limits, image, level_sizes, options.strides)
    size = windows[:, 2] * windows[:, 3]
    pair, cell = expand_ragged(torch.zeros_like(size), size)

    # Two look-ups for each candidate instead of one for each number.
    limits, windows = limits.index_select(0, pair), windows.index_select(0, pair)
    low, high, shortest, longest, corners = limits.split([2, 2, 1, 1, 4], dim=1)
    left, top, columns, _, start, width, stride = windows.unbind(dim=1)
    row = cell // columns
    column = cell - row * columns + left
    row = row + top
    points = torch.stack([column, row], dim=1) * stride[:, None] + (stride // 2)[:, None]
    points = points.float()
    distances = torch.cat([points - corners[:, :2], corners[:, 2:] - points], dim=1)
    farthest = distances.amax(dim=1, keepdim=True)
    tests = [points > low, points < high, farthest >= shortest, farthest <= longest]
    valid = torch.cat(tests, dim=1).all(dim=1)

    index = start + row * width + column
    instance = pair // len(level_sizes)
    chosen = _smallest_object(index, instance, valid, _areas(boxes))
    return Positives(index[chosen], instance[chosen], points[chosen], distances[chosen])


def _areas(boxes: Tensor) -> Tensor:
    """Return the (G,) areas in pixels of (G, 4) boxes."""
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def _limits(boxes: Tensor, gt_centers: Sequence[Tensor] | None, options: AssignOptions) -> Tensor:
    """Tell where a location must lie to be positive.

    Args:
        boxes: (G, 4) float32.
        gt_centers: as for `assign`.
        options: the rules.

    Returns:
        (G * L, 10) float32, object-major: the region, whose sides do not belong to it, the closed
        range of the largest distance to a side of the box, and the box.
    """
    corners = boxes[:, None].expand(-1, len(options.strides), -1)
    low, high = corners[..., :2], corners[..., 2:]
    if options.center != "none":
        if options.center == "mass":
            center = torch.cat(list(gt_centers)).float()[:, None]
        else:
            center = (low + high) / 2
        reach = [options.radius * stride for stride in options.strides]
        reach = torch.tensor(reach, dtype=torch.float32, device=boxes.device)[:, None]
        low, high = torch.maximum(center - reach, low), torch.minimum(center + reach, high)
    bounds = (_NO_BOUND[0], *options.size_ranges, _NO_BOUND[1])
    ranges = torch.tensor(list(pairwise(bounds)), dtype=torch.float32, device=boxes.device)
    return torch.cat([low, high, ranges.expand(len(boxes), -1, -1), corners], dim=2).flatten(0, 1)


def _windows(
    limits: Tensor,
    image: Tensor,
    level_sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
) -> Tensor:
    """List the cells that may be positive for each object and level, and a few more.

    Args:
        limits: (G * L, 10) of `_limits`.
        image: (G,) int64 image of each object.
        level_sizes: (height, width) of each level.
        strides: of each level.

    Returns:
        (G * L, 7) int64: first column and row, number of columns and of rows, index of the level's
        first location in the batch, width and stride of the level.
    """
    areas = [height * width for height, width in level_sizes]
    levels = [
        (width, height, sum(areas[:level]), width, stride)
        for level, ((height, width), stride) in enumerate(zip(level_sizes, strides, strict=True))
    ]
    levels = torch.tensor(levels, device=image.device).repeat(len(image), 1)
    size, start, width, stride = levels.split([2, 1, 1, 1], dim=1)
    image = image.repeat_interleave(len(areas), output_size=len(levels))
    start = start + sum(areas) * image[:, None]

    low, high, _, longest, corners = limits.split([2, 2, 1, 1, 4], dim=1)
    # A location farther than the range from some side of the box cannot be positive, which leaves
    # few cells of a large box.
    low = torch.maximum(low, corners[:, 2:] - longest)
    high = torch.minimum(high, corners[:, :2] + longest)
    # A bound that is itself a location belongs to the window, so that rounding cannot lose a cell.
    first = ((low - stride // 2) / stride).floor().clamp(min=0).long()
    last = torch.minimum(((high - stride // 2) / stride).ceil().long(), size - 1)
    return torch.cat([first, (last - first + 1).clamp(min=0), start, width, stride], dim=1)


def _smallest_object(index: Tensor, owner: Tensor, valid: Tensor, areas: Tensor) -> Tensor:
    """Settle who gets a location that several objects want.

    Args:
        index: (C,) int64 location of each candidate.
        owner: (C,) int64 object of each candidate.
        valid: (C,) bool; others are dropped.
        areas: (G,) float32.

    Returns:
        (Q,) int64 candidates that remain, by ascending location.
    """
    num = max(len(areas), 1)
    rank = torch.empty_like(areas, dtype=torch.int64)
    order = areas.argsort(stable=True)
    rank[order] = torch.arange(len(areas), device=areas.device)
    # One sort by location and then by rank; dropped candidates go last.
    dropped = torch.iinfo(torch.int64).max
    key = (index * num + rank[owner]).masked_fill_(~valid, dropped)
    key, candidate = key.sort()
    place = key // num
    first = torch.ones_like(valid)
    first[1:] = place[1:] != place[:-1]
    return candidate[first & (key != dropped)]
