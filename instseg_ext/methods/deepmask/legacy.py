"""Windows as the authors' sampler draws them, with its defects, for comparisons.

Against :class:`WindowSampler`: windows are moved to whole pixels; the mask's window lies one more
pixel of the image file right and down; objects of any size and crowds are positive examples of the
score; distances between a negative window and objects are measured as if both were magnified alike;
and the last of a hundred windows is negative whatever it shows. Images without annotations are not
sampled.
"""

from __future__ import annotations

import math

import numpy as np

from instseg_ext.methods.deepmask.index import PatchIndex
from instseg_ext.methods.deepmask.patches import Window
from instseg_ext.methods.deepmask.sampling import (
    NEGATIVE_ZOOMS,
    TRIES,
    Geometry,
    Patch,
    WindowSampler,
)

__all__ = ["LegacyWindowSampler"]

# Boxes outside these many steps of magnification are not in the authors' index.
_MOST_STEPS = 32
# Boxes magnified by up to this many steps more or less keep negative windows away ...
_NEAR_STEPS = 10
# ... within so many times the shift of mask patches.
_NEAR_SHIFTS = 3


class LegacyWindowSampler(WindowSampler):
    """Draws windows as the authors' code does."""

    def __init__(self, index: PatchIndex, geometry: Geometry):
        """See the base class."""
        super().__init__(index, geometry)
        self.indexed = np.abs(self.zooms) <= _MOST_STEPS * geometry.scale
        self._with_indexed = np.unique(index.images[self.indexed])

    def mask_patch(self, generator: np.random.Generator) -> Patch:
        """Draw a patch around an object, on whole pixels."""
        patch = super().mask_patch(generator)
        window = Window(*(_round(value) for value in patch.window))
        side = self.geometry.window * (window.side / self.geometry.patch)
        # Indices that begin with 1 are taken for coordinates that begin with 0.
        left, top, _ = Window(window.left + 1, window.top + 1, window.side).inner(side)
        pixel = side / self.geometry.gt_size
        target = Window(_round(left / pixel) * pixel, _round(top / pixel) * pixel, side)
        return patch._replace(window=window, target=target)

    def score_patch(self, generator: np.random.Generator) -> Patch:
        """Draw an image with annotations, then whether its patch is positive."""
        image = int(self._with_indexed[generator.integers(len(self._with_indexed))])
        if generator.random() < 0.5:
            return self.positive(image, generator)
        return self.negative(image, generator)

    def positive(self, image: int, generator: np.random.Generator) -> Patch:
        """Draw a patch around any annotation."""
        annotation = self.index.draw_by_zoom(image, self.zooms, self.indexed, generator)
        window = self._window(image, self.centre(annotation), self.zooms[annotation])
        return Patch(image, window, label=1.0)

    def negative(self, image: int, generator: np.random.Generator) -> Patch:
        """Draw a patch that is negative as far as the authors' comparison sees, or the last try."""
        zooms = generator.choice(NEGATIVE_ZOOMS, size=TRIES)
        extent = self.index.sizes_hw[image][::-1] * 2.0 ** zooms[:, None]
        centres = generator.integers(1, np.maximum(extent.astype(np.int64), 1), endpoint=True)
        rows = self.index.of_image(image)
        rows = np.arange(rows.start, rows.stop)[self.indexed[rows]]
        boxes, box_zooms = self.index.boxes[rows], self.zooms[rows]
        stored = (boxes[:, :2] + boxes[:, 2:]) / 2 * 2.0 ** box_zooms[:, None]
        away = centres[:, None] - stored
        distance = np.hypot(away[..., 0], away[..., 1])
        reach = _NEAR_STEPS * self.geometry.scale
        alike = np.abs(zooms[:, None] - box_zooms) <= reach
        free = ~((distance < _NEAR_SHIFTS * self.geometry.shift) & alike).any(axis=1)
        chosen = int(free.argmax()) if free.any() else TRIES - 1
        window = self._window(image, centres[chosen] * 2.0 ** -zooms[chosen], zooms[chosen])
        return Patch(image, window, label=-1.0)

    def _window(self, image: int, centre: np.ndarray, zoom: float) -> Window:
        """Return a window of whole pixels around a pixel that is counted from 1."""
        side = self.side(zoom)
        x, y = np.clip(centre, 1, self.index.sizes_hw[image][::-1])
        half = math.floor(side / 2)
        return Window(math.floor(x) - half - 1, math.floor(y) - half - 1, math.floor(side))


def _round(value: float) -> float:
    """Round to a whole number, halves away from zero as C does."""
    return math.copysign(math.floor(abs(value) + 0.5), value)
