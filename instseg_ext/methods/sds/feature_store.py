"""Features of the regions of training images, one pair of files for each image.

The regions are cut along the borders of the objects, which are the first of them. Files appear when
they are complete; what is there is not made again.

Shapes: R regions of which the first G are objects, D features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg_ext.checkpoint.atomic import atomic_write, remove_leftovers
from instseg_ext.structures.region_proposals import RegionProposals

__all__ = ["FeatureStore", "ImageFeatures"]

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class ImageFeatures:
    """What is known of the regions of an image.

    Attributes:
        features: (R, D) float16; a map of the file, of which rows are read as they are used.
        iou: (R, G) float32.
        classes: (G,) int64.
    """

    features: np.ndarray
    iou: Tensor
    classes: Tensor


class FeatureStore:
    """A folder with the features of a training set."""

    def __init__(self, folder: str | os.PathLike[str], num_images: int) -> None:
        """Open or make the folder.

        Args:
            folder: of the files.
            num_images: of the training set.
        """
        self.folder = Path(folder)
        self.num_images = num_images
        self.folder.mkdir(parents=True, exist_ok=True)

    def claim(self, settings: dict[str, Any]) -> None:
        """Throw away what was made with other settings, such as other weights, and note these."""
        file = self.folder / _SETTINGS
        remove_leftovers(self.folder)
        if file.is_file() and json.loads(file.read_text()) == settings:
            return
        file.unlink(missing_ok=True)
        for pattern in ("*.npy", "*.npz"):
            for old in self.folder.glob(pattern):
                old.unlink()
        with atomic_write(file) as out:
            out.write(json.dumps(settings).encode())

    def has(self, image: int) -> bool:
        """Tell whether the image at this position of the set is complete."""
        return self._features(image).is_file()

    def write(
        self, image: int, regions: RegionProposals, features: Tensor, iou: Tensor, classes: Tensor
    ) -> None:
        """Write one image.

        Args:
            image: position in the set.
            regions: R regions, the objects first.
            features: (R, D), kept as float16.
            iou: (R, G).
            classes: (G,).
        """
        with atomic_write(self._regions(image)) as file:
            regions.to("cpu").save(file)
        with atomic_write(self._overlaps(image)) as file:
            np.savez(file, iou=iou.cpu().numpy(), classes=classes.cpu().numpy())
        # The last one: where it is, the others are.
        with atomic_write(self._features(image)) as file:
            np.save(file, features.cpu().numpy().astype(np.float16), allow_pickle=False)

    def read(self, image: int) -> ImageFeatures:
        """Read one image; its features stay in the file until rows are taken."""
        features = np.load(self._features(image), mmap_mode="r", allow_pickle=False)
        with np.load(self._overlaps(image), allow_pickle=False) as content:
            iou, classes = torch.from_numpy(content["iou"]), torch.from_numpy(content["classes"])
        return ImageFeatures(features, iou, classes)

    def regions(self, image: int) -> RegionProposals:
        """Read the regions of one image."""
        return RegionProposals.load(self._regions(image))

    def __iter__(self) -> Iterator[ImageFeatures]:
        """Read all images in order."""
        return (self.read(image) for image in range(self.num_images))

    def _features(self, image: int) -> Path:
        return self.folder / f"{image:07d}.npy"

    def _overlaps(self, image: int) -> Path:
        return self.folder / f"{image:07d}.iou.npz"

    def _regions(self, image: int) -> Path:
        return self.folder / f"{image:07d}.regions.npz"
