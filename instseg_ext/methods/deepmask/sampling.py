"""Where patches are cut: windows around objects, and windows around nothing.

Sizes and distances in pixels of the patch, where objects have canonical size, unless said otherwise
(arXiv:1506.06204, section 3.3, with the numbers of the authors' code for the second paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from instseg_ext.methods.deepmask.index import PatchIndex, zoom_steps
from instseg_ext.methods.deepmask.patches import Window

__all__ = ["Geometry", "Patch", "WindowSampler"]

# Magnifications of negative windows, in octaves.
NEGATIVE_ZOOMS = np.arange(-12, 9) / 4
# Windows that are tried for a negative patch, and how many of them together.
TRIES = 100
_AT_ONCE = 10
# A window has at least this side in the image file, however small its object.
LEAST_SIDE = 10.0


class Patch(NamedTuple):
    """What a training patch is made of.

    Attributes:
        image: number of the image.
        window: what the network sees, in pixels of the image file.
        annotation: number of the object whose mask is to be predicted; -1 for a score patch.
        target: the part of the window that the mask is to be predicted for; None for a score patch.
        label: 1.0 or -1.0 for a score patch, 0.0 for the others.
    """

    image: int
    window: Window
    annotation: int = -1
    target: Window | None = None
    label: float = 0.0


@dataclass(frozen=True)
class Geometry:
    """Sizes and distances.

    Attributes:
        patch: side of what the network sees.
        window: side of what it predicts the mask of, in the middle of the patch.
        canonical: longest side of an object of canonical size.
        gt_size: side of the masks that training compares with.
        shift: largest distance between the centres of object and mask patch, in x and in y.
        scale: largest deviation from canonical size in mask patches, in octaves; also the step of
            the magnifications of positive patches.
        neg_shift: objects in negative patches are at least this far from the centre ...
        neg_octaves: ... or this far from canonical size.
    """

    patch: int
    window: int
    canonical: int
    gt_size: int
    shift: float
    scale: float
    neg_shift: float
    neg_octaves: float


class WindowSampler:
    """Draws the windows of patches.

    Both heads see usable objects only as positive examples. A negative window keeps away from all
    objects, however small, and its centre does not lie in the box of a crowd, in which there may be
    an object anywhere.
    """

    def __init__(self, index: PatchIndex, geometry: Geometry):
        """Keep index and geometry.

        Args:
            index: of the training set.
            geometry: sizes and distances.
        """
        self.index, self.geometry = index, geometry
        self.zooms = zoom_steps(index.octaves, geometry.scale)

    def mask_patch(self, generator: np.random.Generator) -> Patch:
        """Draw a patch around an object of a category drawn first, shifted and scaled a little."""
        geometry = self.geometry
        annotation = self.index.draw_by_category(generator)
        jitter = generator.uniform(-geometry.scale, geometry.scale)
        unit = 2.0 ** (jitter - self.index.octaves[annotation])
        shift = generator.uniform(-geometry.shift, geometry.shift, size=2) * unit
        x, y = self.centre(annotation) + shift
        window = Window.around(x, y, geometry.patch * unit)
        return Patch(
            int(self.index.images[annotation]),
            window,
            annotation,
            window.inner(geometry.window * unit),
        )

    def canonical_patch(self, annotation: int) -> Patch:
        """Return the patch in which an object is centred and has canonical size."""
        geometry, unit = self.geometry, 2.0 ** -self.index.octaves[annotation]
        window = Window.around(*self.centre(annotation), geometry.patch * unit)
        target = window.inner(geometry.window * unit)
        return Patch(int(self.index.images[annotation]), window, annotation, target)

    def score_patch(self, generator: np.random.Generator) -> Patch | None:
        """Draw a positive or, with the same probability, a negative patch.

        Returns:
            None if no negative window was found in the image that was drawn.
        """
        if generator.random() < 0.5:
            image = self.index.draw_image_with_object(generator)
            return self.positive(image, generator)
        return self.negative(int(generator.integers(self.index.num_images)), generator)

    def positive(self, image: int, generator: np.random.Generator) -> Patch:
        """Draw a patch in the middle of which is an object of an image, at canonical size."""
        annotation = self.index.draw_by_zoom(image, self.zooms, self.index.usable, generator)
        side = self.side(self.zooms[annotation])
        return Patch(image, Window.around(*self.centre(annotation), side), label=1.0)

    def negative(self, image: int, generator: np.random.Generator) -> Patch | None:
        """Draw a patch in the middle of which is no object of canonical size."""
        for _ in range(TRIES // _AT_ONCE):
            zooms = NEGATIVE_ZOOMS[generator.integers(len(NEGATIVE_ZOOMS), size=_AT_ONCE)]
            centres = generator.random((_AT_ONCE, 2)) * self.index.sizes_hw[image][::-1]
            free = self.is_negative(image, centres, zooms)
            if free.any():
                chosen = int(free.argmax())
                window = Window.around(*centres[chosen], self.side(zooms[chosen]))
                return Patch(image, window, label=-1.0)
        return None

    def is_negative(self, image: int, centres: np.ndarray, zooms: np.ndarray) -> np.ndarray:
        """Tell in which windows no object is near the centre and near canonical size.

        Args:
            image: number of the image.
            centres: (T, 2) x and y in pixels of the image file.
            zooms: (T,) magnifications in octaves.

        Returns:
            (T,) bool.
        """
        rows = self.index.of_image(image)
        boxes, crowd = self.index.boxes[rows], self.index.crowd[rows]
        objects, octaves = boxes[~crowd], self.index.octaves[rows][~crowd]
        away = centres[:, None] - (objects[:, :2] + objects[:, 2:]) / 2
        distance = np.hypot(away[..., 0], away[..., 1]) * 2.0 ** zooms[:, None]
        near = distance < self.geometry.neg_shift
        alike = np.abs(zooms[:, None] - octaves) < self.geometry.neg_octaves
        inside = (centres[:, None] >= boxes[crowd][:, :2]) & (
            centres[:, None] < boxes[crowd][:, 2:]
        )
        return ~((near & alike).any(axis=1) | inside.all(axis=2).any(axis=1))

    def centre(self, annotation: int) -> np.ndarray:
        """Return x and y of the centre of a box, in pixels of the image file."""
        box = self.index.boxes[annotation]
        return (box[:2] + box[2:]) / 2

    def side(self, zoom: float) -> float:
        """Return the side of a patch in pixels of the image file."""
        return max(self.geometry.patch * 2.0**-zoom, LEAST_SIDE)
