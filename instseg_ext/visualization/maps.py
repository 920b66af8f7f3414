"""Colours for maps of numbers."""

from __future__ import annotations

import numpy as np

from instseg_ext import compat

__all__ = ["draw_map", "draw_signed_map"]

# BGR at -1, 0 and 1.
_COLD, _ZERO, _WARM = (178, 102, 33), (247, 247, 247), (43, 24, 178)


def draw_map(
    values: np.ndarray, size_hw: tuple[int, int], limit: float | None = None
) -> np.ndarray:
    """Draw a map of numbers from 0 up: dark to light.

    Args:
        values: (h, w) float, not negative.
        size_hw: height and width of the picture.
        limit: the number that is drawn lightest; None for the largest.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    cv2 = compat.opencv()
    scaled = _enlarge(values, size_hw) / _positive(values.max() if limit is None else limit)
    return cv2.applyColorMap((255 * scaled.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_VIRIDIS)


def draw_signed_map(
    values: np.ndarray, size_hw: tuple[int, int], limit: float | None = None
) -> np.ndarray:
    """Draw a map of numbers around 0: blue below, white at it, red above.

    Args:
        values: (h, w) float.
        size_hw: height and width of the picture.
        limit: the magnitude that is drawn darkest; None for the largest.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    largest = _positive(np.abs(values).max() if limit is None else limit)
    scaled = (_enlarge(values, size_hw) / largest).clip(-1, 1)[..., None]
    zero = np.array(_ZERO)
    ends = np.where(scaled < 0, np.array(_COLD), np.array(_WARM))
    return np.rint(zero + np.abs(scaled) * (ends - zero)).astype(np.uint8)


def _enlarge(values: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    cv2 = compat.opencv()
    return cv2.resize(values.astype(np.float32), size_hw[::-1], interpolation=cv2.INTER_LINEAR)


def _positive(limit: float) -> float:
    """Return the limit; 1 where a map is zero throughout."""
    return float(limit) if limit > 0 else 1.0
