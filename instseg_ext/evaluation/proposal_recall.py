"""Recall of class-agnostic proposals by COCO's rules (``COCOeval`` with ``useCats`` 0).

Only objects that count have to be followed: what else a proposal overlaps (crowds, objects of
another size) decides whether it is a false one, and recall does not ask for these.

Shapes: D proposals and G objects of an image, A ranges of object area, T IoU thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["AREAS", "IOU_THRESHOLDS", "RecallTable", "counted_objects", "match_ranks"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Names of the ranges in figures, and their bounds in pixels, both included.
AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}


def counted_objects(areas: Sequence[float], crowd: Sequence[bool]) -> np.ndarray:
    """Tell which objects count in which range.

    Args:
        areas: (G,) as annotated.
        crowd: (G,) crowds never count.

    Returns:
        (A, G) bool.
    """
    area, single = np.asarray(areas, dtype=float), ~np.asarray(crowd, dtype=bool)
    return np.stack([single & (area >= low) & (area <= high) for low, high in AREAS.values()])


def match_ranks(iou: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Match the proposals of an image to its objects, greedily, best score first.

    A proposal takes the free object that it overlaps most, and of equal ones the last.

    Args:
        iou: (D, G) float64, proposals by falling score.
        counted: (A, G) bool, see ``counted_objects``.

    Returns:
        (A, T, G) int32: rank, from 0, of the proposal that found the object; -1 for none.
    """
    bounds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    free = np.repeat(counted[:, None], len(bounds), axis=1)
    ranks = np.full(free.shape, -1, dtype=np.int32)
    last = iou.shape[1] - 1
    # Nearly all proposals overlap no object enough, and are passed over at once.
    close = (iou >= bounds[0]) & counted.any(axis=0)
    for rank in np.flatnonzero(close.any(axis=1)):
        usable = free & (iou[rank] >= bounds)
        area, threshold = usable.any(axis=2).nonzero()
        overlap = np.where(usable[area, threshold], iou[rank], -1.0)
        found = last - overlap[:, ::-1].argmax(axis=1)
        ranks[area, threshold, found] = rank
        free[area, threshold, found] = False
    return ranks


class RecallTable:
    """Recall as a function of the number of proposals per image.

    Args:
        images: of every judged image what ``match_ranks`` and ``counted_objects`` gave.
        limit: largest number of proposals that is asked for.
    """

    def __init__(self, images: Iterable[tuple[np.ndarray, np.ndarray]], limit: int) -> None:
        found = np.zeros((len(AREAS), len(IOU_THRESHOLDS), limit))
        objects = np.zeros(len(AREAS))
        for ranks, counted in images:
            area, threshold, column = ((ranks >= 0) & (ranks < limit)).nonzero()
            np.add.at(found, (area, threshold, ranks[area, threshold, column]), 1)
            objects += counted.sum(axis=1)
        # Without objects there is nothing to recall: NaN.
        self._recall = (
            found.cumsum(axis=2) / np.where(objects > 0, objects, math.nan)[:, None, None]
        )

    def average_recall(self, area: str, count: int) -> float:
        """Return the mean over the IoU thresholds, 0 to 1; NaN without objects.

        Args:
            area: a name of ``AREAS``.
            count: proposals per image.
        """
        return float(self._recall[list(AREAS).index(area), :, count - 1].mean())

    def area_under_curve(self) -> float:
        """Return the mean height of average recall over the logarithm of the number, 0 to 1."""
        curve = self._recall[0].mean(axis=0)
        steps = np.diff(np.log(np.arange(1, len(curve) + 1)))
        return float(((curve[1:] + curve[:-1]) / 2 * steps).sum() / steps.sum())
