"""Where the regions of an image come from; each source can be handed to another process."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from instseg_ext.data import ProposalFile
from instseg_ext.data.mapper import read_image
from instseg_ext.data.segmentation import as_rle, clean_segmentation
from instseg_ext.methods.sds.segmentation import propose_regions, regions_of_boxes
from instseg_ext.structures.region_proposals import RegionProposals

__all__ = ["McgFolder", "Proposals", "Results", "Segmentation", "region_source"]


def region_source(path: Path | None, source: str, max_regions: int, seed: int) -> Any:
    """Choose a source.

    Args:
        path: a folder of MCG's ``.mat`` files, a COCO result file (``.json``), or a proposal file
            of this package; None segments the images.
        source: see ``propose_regions``.
        max_regions: most regions of an image, from the best.
        seed: see ``propose_regions``.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it holds something else.
    """
    if path is None:
        return Segmentation(max_regions, seed, source)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path} to make regions of.")
    if path.is_dir():
        return McgFolder(path, max_regions)
    if path.suffix == ".json":
        return Results(path, max_regions)
    return Proposals(path, max_regions)


class Segmentation:
    """Segments the image file."""

    def __init__(self, max_regions: int, seed: int, source: str) -> None:
        self._options = (max_regions, seed, source)

    def __call__(self, record: Mapping[str, Any]) -> RegionProposals:
        """Make the regions of one image."""
        return propose_regions(read_image(dict(record), "RGB"), *self._options)


class McgFolder:
    """Reads the candidates of MCG: ``NAME.mat`` for the image ``NAME.jpg``."""

    def __init__(self, folder: Path, max_regions: int) -> None:
        self._folder, self._max_regions = folder, max_regions

    def __call__(self, record: Mapping[str, Any]) -> RegionProposals:
        """Make the regions of one image."""
        name = Path(record["file_name"]).stem
        return RegionProposals.from_mcg_mat(self._folder / f"{name}.mat", self._max_regions)


class Proposals:
    """Takes the masks of a proposal file; of boxes without masks it makes crude regions."""

    def __init__(self, path: Path, max_regions: int) -> None:
        self._path, self._max_regions = path, max_regions
        self._file: ProposalFile | None = ProposalFile(path)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the file out: a process that is handed the source maps it for itself."""
        return {**self.__dict__, "_file": None}

    def __call__(self, record: Mapping[str, Any]) -> RegionProposals:
        """Make the regions of one image."""
        if self._file is None:
            self._file = ProposalFile(self._path)
        image_id = record["image_id"]
        if image_id not in self._file:
            raise ValueError(f"{self._path} lacks image {image_id}: it was made for other data.")
        boxes, logits = self._file[image_id]
        masks, scores = self._file.masks(image_id), logits.sigmoid()
        if masks is None:
            image = read_image(dict(record), "RGB")
            return regions_of_boxes(image, boxes.numpy(), scores.numpy(), self._max_regions)
        size_hw = (record["height"], record["width"])
        top = self._max_regions
        return RegionProposals.from_masks(masks[:top], scores[:top], size_hw)


class Results:
    """Takes the masks of a COCO result file, of any classes, best first."""

    def __init__(self, path: Path, max_regions: int) -> None:
        self._path, self._max_regions = path, max_regions
        self._results: dict[str, list[dict[str, Any]]] = defaultdict(list)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for result in content:
                self._results[str(result["image_id"])].append(
                    {"score": float(result["score"]), "segmentation": result["segmentation"]}
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no COCO result file: a list of results with image_id, score and "
                f"segmentation ({type(error).__name__}: {error})."
            ) from error

    def __call__(self, record: Mapping[str, Any]) -> RegionProposals:
        """Make the regions of one image; it may have none."""
        size_hw = (record["height"], record["width"])
        found = self._results.get(str(record["image_id"]), [])
        best = sorted(found, key=lambda result: -result["score"])[: self._max_regions]
        scores = np.array([result["score"] for result in best], dtype=np.float32)
        rles = [self._rle(result["segmentation"], size_hw, record) for result in best]
        return RegionProposals.from_masks(rles, torch.from_numpy(scores), size_hw)

    def _rle(self, segmentation: object, size_hw: tuple[int, int], record: Mapping) -> dict:
        """Check a mask and bring it into run lengths."""
        clean, problems = clean_segmentation(segmentation, size_hw)
        if clean is None:
            raise ValueError(f"{self._path}, image {record['image_id']}: bad mask, {problems[0]}.")
        return as_rle(clean, size_hw)
