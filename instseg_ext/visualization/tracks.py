"""Keep colours steady over the frames of a video."""

from __future__ import annotations

import numpy as np

__all__ = ["ColourTracks", "box_iou"]


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Give the (N, M) overlaps of (N, 4) and (M, 4) XYXY boxes; 0 where both are empty."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    far = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(far - corner, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


class ColourTracks:
    """Numbers instances so that one that moves little from frame to frame keeps its number.

    Greedy: the pair of equal class with the largest overlap of boxes is joined first. Good enough
    for steady colours, not meant as a tracker.
    """

    def __init__(self, min_iou: float = 0.3, memory: int = 10) -> None:
        """Begin without instances.

        Args:
            min_iou: smallest overlap of boxes that counts as the same instance.
            memory: frames for which an instance that is not seen keeps its number.
        """
        self.min_iou, self.memory = min_iou, memory
        self._boxes = np.zeros((0, 4))
        self._classes = np.zeros(0, dtype=np.int64)
        self._numbers = np.zeros(0, dtype=np.int64)
        self._age = np.zeros(0, dtype=np.int64)
        self._next = 0

    def update(self, boxes: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Number the instances of the next frame.

        Args:
            boxes: (N, 4) float XYXY.
            classes: (N,) int.

        Returns:
            (N,) int64 numbers.
        """
        boxes, classes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4), np.asarray(classes)
        overlaps = box_iou(boxes, self._boxes)
        overlaps[classes[:, None] != self._classes[None, :]] = 0
        numbers = np.full(len(boxes), -1, dtype=np.int64)
        while overlaps.size and overlaps.max() >= self.min_iou:
            here, there = np.unravel_index(overlaps.argmax(), overlaps.shape)
            numbers[here] = self._numbers[there]
            overlaps[here], overlaps[:, there] = 0, 0
        fresh = numbers < 0
        numbers[fresh] = np.arange(self._next, self._next + fresh.sum())
        self._next += int(fresh.sum())
        lost = ~np.isin(self._numbers, numbers) & (self._age < self.memory)
        self._boxes = np.concatenate([boxes, self._boxes[lost]])
        self._classes = np.concatenate([classes, self._classes[lost]])
        self._age = np.concatenate([np.zeros(len(boxes), dtype=np.int64), self._age[lost] + 1])
        self._numbers = np.concatenate([numbers, self._numbers[lost]])
        return numbers
