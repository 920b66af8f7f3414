"""Outlines of instance masks: traced, kept as ragged points, with their centres of mass.

Shapes: M contours, T points of all contours together, masks of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg_ext import compat
from instseg_ext.structures.rle import tight_box

__all__ = ["Contours", "expand_ragged", "trace_contours"]

# Points are stored as int16.
_MAX_SIDE = torch.iinfo(torch.int16).max


class Contours:
    """Closed contours with different numbers of points, usable as a field of ``Instances``.

    Attributes:
        points: (T, 2) int16, (x, y) pixel indices, contour after contour.
        lengths: (M,) int64 number of points of each contour, 0 allowed.
    """

    def __init__(self, points: Tensor, lengths: Tensor) -> None:
        """Keep the points and how many belong to each contour.

        Args:
            points: (T, 2) int16, (x, y).
            lengths: (M,) int64 with the sum T, on the device of ``points``.
        """
        self.points = points
        self.lengths = lengths

    @classmethod
    def empty(cls) -> Contours:
        """Return no contour, on the CPU."""
        return cls(torch.zeros((0, 2), dtype=torch.int16), torch.zeros(0, dtype=torch.int64))

    @classmethod
    def cat(cls, parts: Sequence[Contours]) -> Contours:
        """Return the contours of all ``parts``, which lie on one device, in order."""
        if not parts:
            return cls.empty()
        return cls(
            torch.cat([part.points for part in parts]), torch.cat([part.lengths for part in parts])
        )

    @property
    def device(self) -> torch.device:
        """Where the points live."""
        return self.points.device

    @property
    def starts(self) -> Tensor:
        """(M,) int64: the first row of ``points`` of each contour."""
        return self.lengths.cumsum(0) - self.lengths

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Contours:
        """Return the contours on another device."""
        return Contours(
            self.points.to(device, non_blocking=non_blocking),
            self.lengths.to(device, non_blocking=non_blocking),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: Any) -> Contours:
        """Select contours by int (gives one contour), slice, list, or bool or int64 tensor."""
        lengths = self.lengths[item].reshape(-1)
        _, rows = expand_ragged(self.starts[item].reshape(-1), lengths)
        return Contours(self.points[rows], lengths)

    def __repr__(self) -> str:
        return f"Contours({len(self)} contours, {len(self.points)} points, {self.device})"


def expand_ragged(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """List the rows of ranges one range after the other.

    Range i stands for the rows ``starts[i], starts[i] + 1, ..., starts[i] + lengths[i] - 1``. On
    other devices than the CPU this waits once, for the size of the result.

    Args:
        starts: (n,) integer.
        lengths: (n,) of the same integer type, not negative.

    Returns:
        ``(owner, row)``: the index of the range and the row, one dimension each, of that type.
    """
    owner = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0, dtype=lengths.dtype) - lengths
    row = torch.arange(len(owner), dtype=owner.dtype, device=owner.device)
    return owner, row.add_((starts - before).index_select(0, owner))


def trace_contours(masks: Tensor | np.ndarray) -> tuple[Contours, Tensor, Tensor]:
    """Trace the largest contour of each mask and compute where its mass lies.

    A contour runs through the centres of all border pixels of an 8-connected component. The largest
    is the one that encloses the largest polygon; of equal ones it is the first that OpenCV lists.
    Other components and holes are ignored, also by the centre.

    The centre is the area centroid of the polygon, truncated to whole pixels as in the authors'
    code of arXiv:1909.13226. A contour without area (a line, one or two points) has the mean of its
    points instead.

    Args:
        masks: (M, H, W) bool, or any other type whose non-zero entries are the object. Not changed.

    Returns:
        ``(contours, centers, found)``: M contours, (M, 2) int64 (x, y), (M,) bool. A mask without a
        pixel has no points, the centre (0, 0), and False. On the device of ``masks``; the work is
        done on the CPU.

    Raises:
        ValueError: if ``masks`` does not have three dimensions, or a side exceeds 32767.
    """
    if masks.ndim != 3 or max(masks.shape[1:]) > _MAX_SIDE:
        raise ValueError(
            f"masks must have shape (M, H, W), with sides up to {_MAX_SIDE}, "
            f"got {tuple(masks.shape)}."
        )
    device = masks.device if isinstance(masks, Tensor) else torch.device("cpu")
    stack = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else masks
    if stack.dtype != np.bool_:
        stack = stack != 0

    traced = [_largest_contour(mask) for mask in stack]
    centers = np.array([_mass_center(points) for points in traced], dtype=np.int64).reshape(-1, 2)
    points = np.concatenate([np.zeros((0, 2), dtype=np.int16), *traced], dtype=np.int16)
    lengths = torch.tensor([len(points) for points in traced], dtype=torch.int64)
    contours = Contours(torch.from_numpy(points), lengths)
    return contours.to(device), torch.from_numpy(centers).to(device), (lengths > 0).to(device)


def _largest_contour(mask: np.ndarray) -> np.ndarray:
    """Return (n, 2) int32 (x, y), the contour of largest area of one (H, W) bool mask."""
    box = tight_box(mask)
    if box is None:
        return np.zeros((0, 2), dtype=np.int32)
    cv2 = compat.opencv()
    left, top, right, bottom = box
    result = cv2.findContours(
        # Only the box is scanned: what lies around it does not change the points or their order.
        mask[top:bottom, left:right].view(np.uint8),
        cv2.RETR_TREE,
        cv2.CHAIN_APPROX_NONE,
        offset=(left, top),
    )
    contours = result[-2]  # OpenCV 3 returns three values, others two
    largest = contours[0] if len(contours) == 1 else max(contours, key=cv2.contourArea)
    return largest[:, 0]


def _mass_center(points: np.ndarray) -> tuple[int, int]:
    """Return the truncated centroid (x, y) of one (n, 2) contour, (0, 0) if it has no points.

    The centroid of a symmetric shape is often a whole number, and the last bit of the sums decides
    which pixel it becomes. So they are summed one after the other, from the first point on, as the
    authors do (``cumsum``; ``sum`` adds pairwise).
    """
    if not len(points):
        return 0, 0
    closed = np.concatenate([points[-1:], points]).astype(np.float64).T
    before, here = closed[:, :-1], closed[:, 1:]
    parts = (here[0] * before[1] - here[1] * before[0]) / 2
    area = parts.cumsum()[-1]
    if area == 0:
        x, y = points.mean(axis=0)
    else:
        x, y = (parts * (here + before) / 3).cumsum(axis=1)[:, -1] / area
    return int(x), int(y)
