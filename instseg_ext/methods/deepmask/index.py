"""Which objects of a training set patches can be drawn from, as arrays that are quick to draw from.

Shapes: N images, A annotations of all of them, in the order of the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_util

from instseg_ext.data.mapper import annotation_boxes
from instseg_ext.structures.rle import segmentation_rle

__all__ = ["PatchIndex", "zoom_steps"]


class PatchIndex:
    """The annotations of a training set, sorted for drawing.

    Attributes:
        sizes_hw: (N, 2) int64, height and width of each image.
        starts: (N + 1,) int64; image i has the annotations ``starts[i]`` to ``starts[i + 1]``.
        images: (A,) int64, the image of each annotation.
        categories: (A,) int64.
        boxes: (A, 4) float64, XYXY in pixels of the image file.
        crowd: (A,) bool.
        usable: (A,) bool: no crowd, and large enough to train on.
        octaves: (A,) float64; magnified by two to the power of this, the longest side of the box is
            ``canonical`` pixels.
    """

    def __init__(
        self, dicts: Sequence[dict], *, canonical: float, min_area: float = 0, min_side: float = 0
    ):
        """Read the annotations once.

        Args:
            dicts: the training set in detectron2's format.
            canonical: longest side of an object of canonical size, in pixels of a patch.
            min_area: usable objects have at least this annotated area in pixels of the image file;
                that of the mask where no area is annotated.
            min_side: the box of usable objects is at least this wide and high.

        Raises:
            ValueError: if the size of an image is not known.
        """
        boxes, entries, counts = [np.zeros((0, 4))], [], []
        self.sizes_hw = np.array([_size(record) for record in dicts], dtype=np.int64).reshape(-1, 2)
        for record in dicts:
            annotations = record.get("annotations") or []
            boxes.append(annotation_boxes(annotations))
            counts.append(len(annotations))
            entries += [_entry(annotation, record) for annotation in annotations]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.images = np.repeat(np.arange(len(counts)), counts)
        self.boxes = np.concatenate(boxes)
        table = np.array(entries, dtype=np.float64).reshape(-1, 4)
        self.categories = table[:, 0].astype(np.int64)
        self.crowd = table[:, 1] > 0
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        large = (table[:, 2] >= min_area) & (sides >= min_side).all(axis=1)
        drawn = table[:, 3] > 0
        self.usable = large & drawn & ~self.crowd
        # A box without extent is no object, but may stand in a file.
        self.octaves = np.log2(canonical / sides.max(axis=1, initial=1e-9))
        by_category = np.flatnonzero(self.usable)
        order = np.argsort(self.categories[by_category], kind="stable")
        self._by_category = by_category[order]
        found, first = np.unique(self.categories[self._by_category], return_index=True)
        self._category_starts = np.append(first, len(self._by_category))
        self.num_categories = len(found)
        self._with_usable = np.unique(self.images[self.usable])

    @property
    def num_images(self) -> int:
        """Images of the set, with and without annotations."""
        return len(self.starts) - 1

    def of_image(self, image: int) -> slice:
        """Return where the annotations of an image stand."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))

    def draw_by_category(self, generator: np.random.Generator) -> int:
        """Draw a category that has a usable annotation, then one of these annotations."""
        category = generator.integers(self.num_categories)
        first, stop = self._category_starts[category : category + 2]
        return int(self._by_category[generator.integers(first, stop)])

    def draw_image_with_object(self, generator: np.random.Generator) -> int:
        """Draw an image with a usable annotation."""
        return int(self._with_usable[generator.integers(len(self._with_usable))])

    def draw_by_zoom(
        self, image: int, zooms: np.ndarray, allowed: np.ndarray, generator: np.random.Generator
    ) -> int:
        """Draw one of the zooms that an image's annotations need, then an annotation that needs it.

        Args:
            image: number of the image.
            zooms: (A,) of all annotations.
            allowed: (A,) bool; at least one of the image's is.
            generator: source of random numbers.
        """
        rows = np.arange(*self.starts[image : image + 2])
        rows = rows[allowed[rows]]
        zoom = generator.choice(np.unique(zooms[rows]))
        return int(generator.choice(rows[zooms[rows] == zoom]))


def zoom_steps(octaves: np.ndarray, step: float) -> np.ndarray:
    """Round magnifications up to whole steps.

    Magnified so, an object of ``octaves`` has its longest side above the canonical size, by at most
    one step. One that has canonical size already is magnified by a step.

    Args:
        octaves: (A,) as in :class:`PatchIndex`.
        step: in octaves; 0 = do not round.

    Returns:
        (A,) float64, multiples of ``step``.
    """
    if step == 0:
        return octaves
    return (np.floor(octaves / step) + 1) * step


def _size(record: dict) -> tuple[int, int]:
    """Return the height and width of an image."""
    if "height" not in record or "width" not in record:
        raise ValueError(
            f"The data set does not say how large image {record.get('file_name', '?')} is: patches "
            "are drawn by sizes, so its dictionary needs 'height' and 'width'."
        )
    return record["height"], record["width"]


def _entry(annotation: dict, record: dict) -> tuple[float, float, float, float]:
    """Return category, whether it is a crowd, area, and whether there is a mask."""
    segmentation = annotation.get("segmentation")
    drawn = segmentation is not None and len(segmentation) > 0
    area = annotation.get("area")
    if area is None:
        area = _area(segmentation, record) if drawn else 0
    return annotation["category_id"], bool(annotation.get("iscrowd", 0)), area, drawn


def _area(segmentation: list | dict | np.ndarray, record: dict) -> float:
    """Count the pixels of a mask."""
    if isinstance(segmentation, np.ndarray):
        return float(np.count_nonzero(segmentation))
    rle = segmentation_rle(segmentation, record["height"], record["width"])
    return 0.0 if rle is None else float(mask_util.area(rle))
