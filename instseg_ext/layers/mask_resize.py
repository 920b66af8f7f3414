"""Resize probabilities and threshold them on the CPU, only where a mask can be.

A chain of bilinear resizes and top-left crops is linear and separable: ``out = R @ probs @ C.T``
with one sparse, banded matrix per axis. ``ThresholdedResize`` applies both to the part of the map
that can exceed the threshold, block by block. Rounding differs from that of the single steps by a
known bound: pixels closer to the threshold than the bound count as not above it, all others are
those of the single steps.

Shapes: h x w low-resolution map, H x W output.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from instseg_ext.layers.mask_ops import above

__all__ = ["AxisMap", "ThresholdedResize", "axis_map", "exact_float32_matmul", "true_spans"]

_UNIT_ROUNDOFF = 2.0**-24
_BLOCK = 128  # output lines per matrix product: keeps the band narrow and the values in cache
_MAX_MATRIX = 2**25  # elements; a larger axis matrix (128 MiB) is not worth building
_MAX_RESIZES = 3  # the error bound doubles its tap count with each


@dataclass(frozen=True)
class AxisMap:
    """One axis of a chain of resizes and crops.

    Attributes:
        weights: (L_out, L_in) float32; row o holds the weights of output line o.
        first: L_out numbers, non-decreasing: first input line with a weight.
        last: L_out numbers, non-decreasing: last input line with a weight.
    """

    weights: Tensor
    first: list[int]
    last: list[int]

    def window(self, low: int, high: int) -> tuple[int, int]:
        """Return the output lines [start, end) that see any of the input lines [low, high)."""
        start = bisect_left(self.last, low)
        end = bisect_right(self.first, high - 1)
        return start, max(start, end)

    def band(self, start: int, end: int) -> tuple[int, int]:
        """Return the input lines [low, high) that the output lines [start, end) see."""
        return self.first[start], self.last[end - 1] + 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread.

    The products here are small: waking other threads for each of them gains little on a free
    machine and costs a time slice each on a busy one, as when loader workers run beside.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=8)  # images of a folder or a video share their sizes
def axis_map(length: int, steps: tuple[tuple[str, int], ...]) -> AxisMap | None:
    """Compose the steps of one axis.

    The weights are read off ``F.interpolate`` itself: they carry the rounding of its coordinates.

    Args:
        length: input lines.
        steps: ("resize" | "crop", lines after the step), in order.

    Returns:
        The map, or None when a matrix would grow too large to be worth it.
    """
    if length * max(length, *(size for _, size in steps), 1) > _MAX_MATRIX:
        return None
    total = torch.eye(length, dtype=torch.float64)
    for kind, size in steps:
        if kind == "crop":
            total = total[:size]
        elif size != total.shape[0]:
            weights, lines = _taps(total.shape[0], size)
            total = sum(weights[:, k, None] * total[lines[:, k]] for k in range(3))
    seen = total > 0
    first = seen.to(torch.uint8).argmax(dim=1)
    last = length - 1 - seen.flip(1).to(torch.uint8).argmax(dim=1)
    # With a zero weight at its edge a line may start later than the next one; the window only has
    # to hold every line with a weight, and bisection needs order.
    first = first.flip(0).cummin(0).values.flip(0)
    return AxisMap(total.float(), first.tolist(), last.cummax(0).values.tolist())


def _taps(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the weights (size, 3) float64 and the input lines (size, 3) of one bilinear resize.

    Resizing three indicator signals, of the lines 0, 1 and 2 modulo 3, tells the weight of each
    residue. The at most two lines with a weight are among the three around the source coordinate,
    whose residues differ.
    """
    residue = torch.arange(length)[:, None] % 3 == torch.arange(3)
    weights = F.interpolate(
        residue.float()[None, None], (size, 3), mode="bilinear", align_corners=False
    )[0, 0]
    source = (torch.arange(size, dtype=torch.float64) + 0.5) * (length / size) - 0.5
    lines = source.clamp(0, length - 1).round().long()[:, None] + torch.arange(-1, 2)
    inside = (lines >= 0) & (lines < length)
    weights = weights.double().gather(1, lines % 3) * inside
    return weights, lines.clamp(0, length - 1)


def exact_float32_matmul() -> bool:
    """Return whether float32 matrix products on the CPU are computed in float32."""
    if torch.get_float32_matmul_precision() != "highest":
        return False
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(matmul, "fp32_precision", "none") in ("none", "ieee")


class ThresholdedResize:
    """Make bool masks from low-resolution probabilities by one product per axis.

    Attributes:
        tolerance: how far above the threshold a value must be: the most by which its rounding and
            that of the single steps can differ. A value that is the threshold itself, as all of
            a map of one half are, is therefore never above it.
    """

    def __init__(self, rows: AxisMap, cols: AxisMap, *, num_resizes: int, threshold: float) -> None:
        """Keep the maps and derive the error bound.

        Args:
            rows: map of the first axis.
            cols: map of the second axis.
            num_resizes: resizes in the chain.
            threshold: strict lower bound of a mask pixel, positive.
        """
        self.rows, self.cols, self.threshold = rows, cols, threshold
        # Relative to the value, all terms being non-negative: four roundings per single
        # resize; here one for each of the 2**n taps and one for the product along each axis, one
        # for each composed weight. Half as much again for good measure.
        roundings = 4 * num_resizes + 2 * (2**num_resizes + 1) + 2
        self.tolerance = 1.5 * roundings * _UNIT_ROUNDOFF * threshold

    @staticmethod
    def applicable(probs: Tensor, num_resizes: int, threshold: float) -> bool:
        """Return whether the bound holds: CPU, finite values >= 0, positive threshold."""
        if probs.device.type != "cpu" or not 0 < num_resizes <= _MAX_RESIZES or threshold <= 0:
            return False
        values = probs.numpy()
        return bool(values.size and values.min() >= 0 and values.max() < 1e6)

    def __call__(self, probs: Tensor, out: Tensor) -> None:
        """Write masks.

        Args:
            probs: (n, h, w) float32, ``applicable``.
            out: (n, H, W) bool, overwritten.
        """
        with _one_thread():
            out.zero_()
            # Where every tap is this far below, no rounding lifts the result above the threshold.
            support = above(probs, self.threshold * (1 - 1e-5)).numpy()
            spans = zip(
                true_spans(support.any(axis=2)), true_spans(support.any(axis=1)), strict=True
            )
            for mask, values, (row_span, col_span) in zip(out, probs, spans, strict=True):
                if row_span[0] < row_span[1]:
                    self._fill(mask, values, row_span, col_span)

    def _fill(
        self, out: Tensor, probs: Tensor, row_span: tuple[int, int], col_span: tuple[int, int]
    ) -> None:
        """Write one mask into ``out``, which is zero."""
        rows, cols = self.rows, self.cols
        top, bottom = rows.window(*row_span)
        left, right = cols.window(*col_span)
        if top == bottom or left == right:
            return
        # Only the input lines that the output sees.
        first, last = rows.band(top, bottom)
        wide = torch.empty((last - first, right - left))
        for start in range(left, right, _BLOCK):
            end = min(start + _BLOCK, right)
            low, high = cols.band(start, end)
            weights = cols.weights[start:end, low:high]
            torch.mm(
                probs[first:last, low:high], weights.t(), out=wide[:, start - left : end - left]
            )
        for start in range(top, bottom, _BLOCK):
            end = min(start + _BLOCK, bottom)
            low, high = rows.band(start, end)
            value = rows.weights[start:end, low:high] @ wide[low - first : high - first]
            above(value, self.threshold + self.tolerance, out=out[start:end, left:right])


def true_spans(hit: np.ndarray) -> list[tuple[int, int]]:
    """Return [first, end) of the True entries of each row of (N, L) bool; (0, 0) if none."""
    some = hit.any(axis=1)
    first = hit.argmax(axis=1) * some
    end = (hit.shape[1] - hit[:, ::-1].argmax(axis=1)) * some
    return list(zip(first.tolist(), end.tolist(), strict=True))
