"""The shared mapper with the region proposals that were made of the image files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from instseg_ext.data import build_mapper
from instseg_ext.methods.sds.region_files import read_regions

__all__ = ["RegionMapper", "build_sds_mapper"]


class RegionMapper:
    """Adds ``region_proposals`` to what another mapper makes of an image."""

    def __init__(self, mapper: Callable[[dict], dict | None], folder: str) -> None:
        """Keep the mapper, which leaves the image as it is, and the folder of the regions."""
        self.mapper = mapper
        self.folder = folder

    def __call__(self, dataset_dict: dict) -> dict[str, Any] | None:
        """Map one image.

        Raises:
            FileNotFoundError: if there are no regions of it.
            ValueError: if they are of an image of another size.
        """
        sample = self.mapper(dataset_dict)
        if sample is not None:
            size_hw = tuple(sample["image"].shape[1:])
            sample["region_proposals"] = read_regions(self.folder, sample["image_id"], size_hw)
        return sample


def build_sds_mapper(cfg: CfgNode, is_train: bool) -> Callable[[dict], dict | None]:
    """Build the mapper.

    Without a folder of regions it is the shared one, and the model segments what it is given.

    Raises:
        FileNotFoundError: if a folder is named that is not there.
        ValueError: if there is a folder and the images would not stay as they are.
    """
    mapper = build_mapper(cfg, is_train)
    key = "REGIONS_TRAIN" if is_train else "REGIONS_TEST"
    folder = cfg.MODEL.SDS[key]
    if not folder:
        return mapper
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder} (MODEL.SDS.{key}); `instseg propose-regions` makes one."
        )
    _check_unmoved(cfg, is_train)
    return RegionMapper(mapper, folder)


def _check_unmoved(cfg: CfgNode, is_train: bool) -> None:
    """Refuse settings that resize or move images: their regions would stay where they were."""
    moved = {"INPUT.MIN_SIZE_TEST": (cfg.INPUT.MIN_SIZE_TEST > 0, "0")}
    if is_train:
        extra = cfg.INSTSEG.AUGMENTATIONS
        moved = {
            "INPUT.MIN_SIZE_TRAIN": (any(cfg.INPUT.MIN_SIZE_TRAIN), "(0,)"),
            "INPUT.RANDOM_FLIP": (cfg.INPUT.RANDOM_FLIP != "none", "none"),
            "INPUT.CROP.ENABLED": (cfg.INPUT.CROP.ENABLED, "False"),
            "INSTSEG.AUGMENTATIONS.VERTICAL_FLIP": (extra.VERTICAL_FLIP, "False"),
            "INSTSEG.AUGMENTATIONS.ROTATE90": (extra.ROTATE90, "False"),
            "INSTSEG.STRETCH": (any(cfg.INSTSEG.STRETCH), "[0, 0]"),
        }
    for key, (wrong, wanted) in moved.items():
        if wrong:
            raise ValueError(
                f"{key} must be {wanted}: regions are made of the image files as they are. SDS "
                "mirrors and resizes the windows around them instead."
            )
