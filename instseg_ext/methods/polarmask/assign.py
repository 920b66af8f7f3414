"""Which locations are responsible for which objects.

Shape shorthand: N images, L levels, P locations of an image, level-major and then row-major, M_n
objects of image n, G objects of the batch, Q positive locations. Boxes are (x1, y1, x2, y2) with
x2 and y2 the last pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.structures.contours import expand_ragged

__all__ = ["AssignOptions", "Positives", "assign", "locations"]

_NO_LIMIT = 1e8


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


class _Cells(NamedTuple):
    """Candidates: cells that some object may own, one entry per pair.

    Attributes:
        pair: (C,) int64, object * L + level.
        x: (C,) int64 column of the cell.
        y: (C,) int64 row of the cell.
    """

    pair: Tensor
    x: Tensor
    y: Tensor


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
    device = boxes.device
    sizes = torch.tensor(level_sizes, device=device)
    strides = torch.tensor(options.strides, device=device)
    bounds = (-1.0, *options.size_ranges, _NO_LIMIT)
    ranges = torch.tensor([bounds[:-1], bounds[1:]], dtype=torch.float32, device=device)

    lower, upper = _regions(boxes, gt_centers, options)
    cells = _candidates(boxes, lower, upper, sizes, strides, ranges[1])

    owner = cells.pair // len(strides)
    level = cells.pair - owner * len(strides)
    grid = torch.stack([cells.x, cells.y], dim=1)
    stride = strides[level][:, None]
    points = (grid * stride + stride // 2).float()
    corners = boxes[owner]
    distances = torch.cat([points - corners[:, :2], corners[:, 2:] - points], dim=1)
    farthest = distances.amax(dim=1)
    inside = (points > lower[cells.pair]) & (points < upper[cells.pair])
    valid = inside.all(dim=1) & (farthest >= ranges[0, level]) & (farthest <= ranges[1, level])

    per_level = sizes.prod(dim=1)
    starts = per_level.cumsum(0) - per_level
    counts = torch.tensor([len(part) for part in gt_boxes], device=device)
    image = torch.repeat_interleave(counts, output_size=len(boxes))
    index = starts[level] + cells.y * sizes[level, 1] + cells.x
    index += image[owner] * per_level.sum()
    chosen = _smallest_object(index, owner, valid, _areas(boxes))
    return Positives(index[chosen], owner[chosen], points[chosen], distances[chosen])


def _areas(boxes: Tensor) -> Tensor:
    """Return the (G,) areas in pixels of (G, 4) boxes."""
    return (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)


def _regions(
    boxes: Tensor, gt_centers: Sequence[Tensor] | None, options: AssignOptions
) -> tuple[Tensor, Tensor]:
    """Return the corners of the sampling regions, two times (G * L, 2) float32 (x, y)."""
    lower, upper = boxes[:, None, :2], boxes[:, None, 2:]
    if options.center == "none":
        levels = len(options.strides)
        lower, upper = lower.expand(-1, levels, -1), upper.expand(-1, levels, -1)
    else:
        if options.center == "mass":
            center = torch.cat(list(gt_centers)).float()
        else:
            center = (boxes[:, :2] + boxes[:, 2:]) / 2
        reach = [options.radius * stride for stride in options.strides]
        reach = torch.tensor(reach, dtype=torch.float32, device=boxes.device)[:, None]
        lower = torch.maximum(center[:, None] - reach, lower)
        upper = torch.minimum(center[:, None] + reach, upper)
    return lower.flatten(0, 1), upper.flatten(0, 1)


def _candidates(
    boxes: Tensor, lower: Tensor, upper: Tensor, sizes: Tensor, strides: Tensor, limits: Tensor
) -> _Cells:
    """List a few cells too many for each object and level.

    A location farther than the limit of its level from a side of the box cannot be positive, which
    leaves few cells of a large box too.

    Args:
        boxes: (G, 4).
        lower: (G * L, 2) of `_regions`.
        upper: likewise.
        sizes: (L, 2) int64 (height, width).
        strides: (L,) int64.
        limits: (L,) upper ends of the ranges.

    Returns:
        See `_Cells`.
    """
    limits = limits[:, None]
    lower = torch.maximum(lower, (boxes[:, None, 2:] - limits).flatten(0, 1))
    upper = torch.minimum(upper, (boxes[:, None, :2] + limits).flatten(0, 1))
    repeated = len(boxes), 1
    stride = strides.repeat(len(boxes))[:, None]
    last = (sizes.flip(1) - 1).repeat(repeated)
    # Bounds that are themselves a location belong to the list: rounding must not lose a cell.
    first = ((lower - stride // 2) / stride).floor().clamp(min=0).long()
    final = torch.minimum(((upper - stride // 2) / stride).ceil().long(), last)
    count = (final - first + 1).clamp(min=0)
    start = torch.zeros_like(count[:, 0])
    pair, cell = expand_ragged(start, count.prod(dim=1))
    row = cell // count[pair, 0]
    return _Cells(pair, first[pair, 0] + cell - row * count[pair, 0], first[pair, 1] + row)


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
