"""Target lengths of the rays.

Shape shorthand: Q positive locations, R rays, M contours, C (location, contour point) pairs.

Angles are in degrees from +y (down) towards +x (right).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.structures.contours import Contours, expand_ragged

__all__ = ["ray_targets"]

_MISSING = 1e-6
_NUM_BINS = 360
# The authors' code has no other number. Their rays ignore the bins on both sides of 45 degrees,
# where float32 is at its worst: the bin of a diagonal offset depends on its place in the tensor.
_AUTHORS_RAYS = 36
# Bins beside that of the ray, in the order in which they are looked at.
_WINDOW = (0, 1, -1, 2, -2, 3, -3)
# Smaller differences of angles (in rays) and sines are rounding.
_SNAP = 1e-9
# Entries (pairs, or bins of a location) worked on at a time. On the CPU temporaries stay in the
# cache; elsewhere they stay below a gigabyte.
_BUDGET_CPU = 2**17
_BUDGET = 2**22


class _Pairs(NamedTuple):
    """Some locations with all points of their contours.

    Attributes:
        owner: (C,) int32 location, counted from the first of these.
        dx: (C,) float32 from the location to the point, contiguous, whole pixels.
        dy: (C,) float32, likewise.
        num: number of locations.
    """

    owner: Tensor
    dx: Tensor
    dy: Tensor
    num: int


@torch.no_grad()
def ray_targets(
    points: Tensor,
    contours: Contours,
    instance: Tensor,
    *,
    num_rays: int,
    mode: str = "bins",
    origin: str = "down",
) -> Tensor:
    """Measure how far the contour is from each location in the direction of each ray.

    ``bins`` is the rule of the authors' code of arXiv:1909.13226: the contour points fall into bins
    of one degree, a ray takes the first bin with a point among its own and the three on each side
    (the nearest first, +1 before -1), and in it the farthest point. The window does not reach
    across 0 degrees, so ray 0 has no bins on the left. A ray without a point is 1e-6 long, which
    happens to most small objects.

    ``exact`` takes the farthest intersection of the ray with the closed polygon through the
    contour's points, 1e-6 where there is none beyond the location itself.

    Work is done in parts of bounded size. On other devices than the CPU this waits for the sizes
    of the parts and of what is in them.

    Args:
        points: (Q, 2) float (x, y), whole pixels.
        contours: M contours on the same device.
        instance: (Q,) int64 contour of each location. One without points gives 1e-6 everywhere.
        num_rays: R, a divisor of 360.
        mode: ``bins`` or ``exact``.
        origin: ``down``: ray 0 points to +y, and ray R / 4 to +x; ``left``: ray 0 points to -x, and
            ray R / 4 to +y, the authors' order before 2019-11-12 (R divisible by 4).

    Returns:
        (Q, R) float32, pixels.

    Raises:
        ValueError: if an option is unknown or R does not fit.

    Note:
        On the CPU, ``bins`` with 36 rays repeats the float32 arithmetic of the authors, which puts
        a few points within 2e-5 degrees of a bin's border on its other side. Everything else is
        exact.
    """
    check_choice("MODEL.POLARMASK.RAY_TARGET", mode, ("bins", "exact"))
    check_choice("MODEL.POLARMASK.RAY_ORIGIN", origin, ("down", "left"))
    if num_rays < 1 or _NUM_BINS % num_rays or (origin == "left" and num_rays % 4):
        divisible = " and be divisible by 4" if origin == "left" else ""
        raise ValueError(
            f"MODEL.POLARMASK.NUM_RAYS must divide {_NUM_BINS}{divisible}, not {num_rays}."
        )
    on_cpu = points.device.type == "cpu"
    rays = [points.new_zeros((0, num_rays), dtype=torch.float32)]
    for pairs in _parts(points, contours, instance, _BUDGET_CPU if on_cpu else _BUDGET):
        if mode == "exact":
            rays.append(_farthest_crossings(pairs, num_rays))
        else:
            like_authors = on_cpu and num_rays == _AUTHORS_RAYS
            rays.append(_window_lengths(pairs, num_rays, like_authors))
    rays = torch.cat(rays)
    return rays.roll(num_rays // 4, dims=1) if origin == "left" else rays


def _parts(points: Tensor, contours: Contours, instance: Tensor, budget: int) -> Iterator[_Pairs]:
    """Yield the pairs of some locations at a time, in order.

    Args:
        points: (Q, 2).
        contours: M contours.
        instance: (Q,).
        budget: how many entries to exceed by at most one location.

    Yields:
        See `_Pairs`.
    """
    lengths = contours.lengths[instance]
    entries = (lengths + _NUM_BINS).cumsum(0)
    _, sizes = torch.unique_consecutive(entries // budget, return_counts=True)
    sizes = sizes.tolist()
    # int32 halves the memory that the indices of the pairs go through.
    lengths, starts = lengths.int(), contours.starts[instance].int()
    # A contiguous tensor for each axis: torch.atan2 rounds differently on strided ones.
    contour_x, contour_y = contours.points.T.float().contiguous()
    x, y = points.T.float().contiguous()
    pieces = (column.split(sizes) for column in (starts, lengths, x, y))
    for start, length, left, top in zip(*pieces, strict=True):
        owner, row = expand_ragged(start, length)
        dx = contour_x.index_select(0, row).sub_(left.index_select(0, owner))
        dy = contour_y.index_select(0, row).sub_(top.index_select(0, owner))
        yield _Pairs(owner, dx, dy, len(length))


def _degree_bins(dx: Tensor, dy: Tensor, like_authors: bool) -> Tensor:
    """Return the whole degrees of the angles of offsets, (C,) int32 in [0, 360).

    Args:
        dx: (C,) float32, contiguous.
        dy: likewise.
        like_authors: in float32 and step by step as the authors' code; otherwise exact for offsets
            of up to 1450 pixels, whose angles are whole degrees or at least 1e-6 away from them.
    """
    if like_authors:
        angle = torch.atan2(dx, dy).mul_(180).div_(math.pi)
    else:
        angle = torch.atan2(dx.double(), dy.double()).mul_(180 / math.pi)
    # 360 is added to negative angles; a comparison would take several times as long.
    angle.sub_(angle.sign().clamp_(max=0), alpha=360)
    return (angle if like_authors else angle.add_(1e-9)).int()


def _window_bins(num_rays: int, device: torch.device) -> Tensor:
    """Return the bins that each ray looks at, (7, R) int64; 360 stands for none."""
    rays = torch.arange(0, _NUM_BINS, _NUM_BINS // num_rays, device=device)
    bins = rays + torch.tensor(_WINDOW, device=device)[:, None]
    return bins.masked_fill_((bins < 0) | (bins > _NUM_BINS), _NUM_BINS)


def _window_lengths(pairs: _Pairs, num_rays: int, like_authors: bool) -> Tensor:
    """Return (num, R) float32 lengths by the rule of bins; see `_degree_bins` for the flag.

    The farthest point of each bin is found for all bins, because the windows of neighbouring rays
    overlap when there are more than 36. One column more than there are bins stays empty.
    """
    bins = _degree_bins(pairs.dx, pairs.dy, like_authors)
    squared = pairs.dx.square().add_(pairs.dy.square())
    # Squared distances fit int32, of which scatter_reduce_ is several times faster than of float32.
    # One is added to tell the distance 0 from an empty bin.
    farthest = bins.new_zeros((_NUM_BINS + 1) * pairs.num)
    place = torch.add(pairs.owner, bins, alpha=pairs.num).long()
    farthest.scatter_reduce_(0, place, squared.int().add_(1), "amax")

    window = _window_bins(num_rays, bins.device)
    found = farthest.view(-1, pairs.num).index_select(0, window.flatten()).long()
    found = found.view(*window.shape, pairs.num)
    # In the upper half of the number the first bins of the window get the largest values.
    rank = torch.arange(len(window), 0, -1, device=bins.device)[:, None, None] << 32
    best = (found + found.clamp(max=1) * rank).amax(dim=0) & 0xFFFFFFFF
    return torch.where(best > 0, (best - 1).float().sqrt(), _MISSING).T


def _farthest_crossings(pairs: _Pairs, num_rays: int) -> Tensor:
    """Return (num, R) float32 distances to the farthest crossing of each ray with the polygon.

    Each edge is paired with the rays between the angles of its ends, mostly none or one.
    """
    x, y = pairs.dx.double(), pairs.dy.double()
    following = _next_rows(pairs)
    first, count = _rays_of_edges(x, y, following, num_rays)
    edge, ray = expand_ragged(first, count)
    ray = ray.remainder(num_rays)

    angle = ray.double() * (2 * math.pi / num_rays)
    ray_x, ray_y = angle.sin(), angle.cos()
    start_x, start_y = x[edge], y[edge]
    end_x, end_y = x[following][edge], y[following][edge]
    edge_x, edge_y = end_x - start_x, end_y - start_y
    turn = ray_x * edge_y - ray_y * edge_x
    # Along the ray no crossing lies beyond the farther end, and of an edge on the ray (or very
    # nearly) it is that end.
    limit = torch.maximum(start_x * ray_x + start_y * ray_y, end_x * ray_x + end_y * ray_y)
    crossing = torch.minimum((start_x * edge_y - start_y * edge_x) / turn, limit)
    crossing = torch.where(turn.abs() < _SNAP, limit, crossing).float()

    lengths = crossing.new_full((pairs.num * num_rays,), _MISSING)
    lengths.scatter_reduce_(0, pairs.owner[edge].long() * num_rays + ray, crossing, "amax")
    return lengths.view(pairs.num, num_rays)


def _next_rows(pairs: _Pairs) -> Tensor:
    """Return (C,) int64: the pair with the next point, that of the first after the last."""
    row = torch.arange(len(pairs.owner), device=pairs.owner.device)
    counts = torch.bincount(pairs.owner, minlength=pairs.num)
    begins = counts.cumsum(0) - counts
    last = torch.ones_like(row, dtype=torch.bool)
    last[:-1] = pairs.owner[1:] != pairs.owner[:-1]
    return torch.where(last, begins[pairs.owner], row + 1)


def _rays_of_edges(x: Tensor, y: Tensor, following: Tensor, num_rays: int) -> tuple[Tensor, Tensor]:
    """Find the rays that cross each edge, its ends included.

    Args:
        x: (C,) float64 from the location to where the edge begins.
        y: likewise.
        following: (C,) int64 entry where the edge ends.
        num_rays: R.

    Returns:
        ``(first, count)``: (C,) int64; the rays are ``first``, ``first + 1``, ..., modulo R.
    """
    angle = torch.atan2(x, y) * (num_rays / (2 * math.pi))  # in rays
    whole = angle.round()
    angle = torch.where((angle - whole).abs() < _SNAP, whole, angle)
    # The location itself has no direction: an edge from there lies on the ray to its other end.
    here = (x == 0) & (y == 0)
    begin = torch.where(here, angle[following], angle)
    end = torch.where(here[following], angle, angle[following])
    end = end - num_rays * ((end - begin) / num_rays).round()  # the short way round
    first = torch.minimum(begin, end).ceil()
    count = torch.maximum(begin, end).floor() - first + 1
    return first.long(), count.long()
