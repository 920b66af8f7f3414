"""From the files of proposals to the inputs of a model (``MODEL.LOAD_PROPOSALS``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from instseg_ext.data.proposals import ProposalFile
from instseg_ext.layers.mask_ops import RLEList

__all__ = [
    "ProposalMapper",
    "assign_proposals",
    "check_proposal_files",
    "proposal_file_of",
    "transform_proposals",
]


def check_proposal_files(cfg: CfgNode, split: str) -> None:
    """Make sure that there is a file of proposals for every set, before any long work.

    Args:
        cfg: nothing is asked of it without ``MODEL.LOAD_PROPOSALS``.
        split: ``TRAIN`` or ``TEST``.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if there is not one file for each set.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    sets, files = cfg.DATASETS[split], cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
    if len(sets) != len(files):
        raise ValueError(
            f"MODEL.LOAD_PROPOSALS needs a file for each of the {len(sets)} sets of "
            f"DATASETS.{split}, in their order, but DATASETS.PROPOSAL_FILES_{split} has "
            f"{len(files)}; `instseg propose` writes such files."
        )
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"There is no proposal file {file} (DATASETS.PROPOSAL_FILES_{split}); "
                "`instseg propose` writes such files."
            )


def proposal_file_of(cfg: CfgNode, dataset_name: str) -> str:
    """Return the file that holds the proposals of a test set.

    Raises:
        ValueError: if ``DATASETS`` names no file for it.
    """
    sets, files = list(cfg.DATASETS.TEST), list(cfg.DATASETS.PROPOSAL_FILES_TEST)
    if dataset_name not in sets or len(sets) != len(files):
        raise ValueError(
            f"MODEL.LOAD_PROPOSALS needs a file of proposals for {dataset_name}: name the set in "
            "DATASETS.TEST and the file in the same place of DATASETS.PROPOSAL_FILES_TEST."
        )
    return str(files[sets.index(dataset_name)])


def assign_proposals(
    sets: Sequence[Sequence[dict]],
    files: Sequence[str],
    *,
    split: str = "TRAIN",
    masks: bool = False,
) -> list[dict]:
    """Note in each dictionary the file that holds the proposals of its image.

    Args:
        sets: the data sets, each as detectron2 dictionaries; not modified.
        files: one for each set, in their order.
        split: ``TRAIN`` or ``TEST``, for messages.
        masks: the files must hold masks beside the boxes.

    Returns:
        the images of all sets, with ``proposal_file`` for ``ProposalMapper``.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if there is not one file for each set, or one lacks an image or the masks.
    """
    key = f"DATASETS.PROPOSAL_FILES_{split}"
    if len(sets) != len(files):
        raise ValueError(
            f"MODEL.LOAD_PROPOSALS needs a file for each of the {len(sets)} sets of "
            f"DATASETS.{split}, in their order, but {key} has {len(files)}."
        )
    assigned = []
    for dicts, path in zip(sets, files, strict=True):
        present = ProposalFile(path)
        lacking = [d["image_id"] for d in dicts if d["image_id"] not in present]
        if lacking:
            raise ValueError(
                f"{path} of {key} lacks {len(lacking)} of {len(dicts)} "
                f"images, the first with id {lacking[0]}: it was made for other data."
            )
        if masks and not present.has_masks:
            raise ValueError(
                f"{path} of {key} has boxes only, and the model wants the masks of its proposals: "
                "write the file with a model that predicts masks."
            )
        assigned += [{**d, "proposal_file": str(path)} for d in dicts]
    return assigned


class ProposalMapper:
    """Adds the proposals of each image, in detectron2's form, before another mapper takes it.

    Args:
        mapper: one that carries ``proposal_boxes`` through its augmentations, such as
            ``InstSegDatasetMapper``.
        masks: also add the masks, for ``proposal_rles`` of the result. They stay at the size of
            the image file, whatever the augmentations do, so they are of use at test time.
    """

    def __init__(self, mapper: Callable[[dict], dict | None], *, masks: bool = False) -> None:
        self._mapper, self._masks = mapper, masks
        self._files: dict[str, ProposalFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the files out: a process that is handed the mapper maps them for itself."""
        return {**self.__dict__, "_files": {}}

    def __call__(self, dataset_dict: dict) -> dict | None:
        """Map one image whose dictionary comes from ``assign_proposals``; it is not modified."""
        dataset_dict = dict(dataset_dict)
        path = dataset_dict.pop("proposal_file")
        if path not in self._files:
            self._files[path] = ProposalFile(path)
        image_id = dataset_dict["image_id"]
        boxes, logits = self._files[path][image_id]
        dataset_dict["proposal_boxes"] = boxes.clone().numpy()
        dataset_dict["proposal_objectness_logits"] = logits.clone().numpy()
        dataset_dict["proposal_bbox_mode"] = BoxMode.XYXY_ABS
        if self._masks:
            dataset_dict["proposal_rles"] = self._files[path].masks(image_id)
        return self._mapper(dataset_dict)


def transform_proposals(
    dataset_dict: dict, size_hw: tuple[int, int], transforms: T.TransformList, topk: int
) -> None:
    """Carry the proposals of an image through its augmentations, as detectron2 does.

    Boxes are clipped to the image; of those that are not empty then, the first ``topk`` stay.

    Args:
        dataset_dict: changed in place: ``proposal_boxes``, ``proposal_bbox_mode`` and
            ``proposal_objectness_logits`` become ``proposals`` (``Instances`` with
            ``proposal_boxes`` and ``objectness_logits``). ``proposal_rles``, where there are any,
            keep their size and become an ``RLEList`` of the same proposals.
        size_hw: of the transformed image.
        transforms: what happened to the image.
        topk: number of proposals that stay.
    """
    boxes = BoxMode.convert(
        dataset_dict.pop("proposal_boxes"),
        dataset_dict.pop("proposal_bbox_mode"),
        BoxMode.XYXY_ABS,
    )
    moved = Boxes(transforms.apply_box(boxes))
    moved.clip(size_hw)
    keep = moved.nonempty().nonzero()[:topk, 0]
    logits = dataset_dict.pop("proposal_objectness_logits").astype("float32")
    dataset_dict["proposals"] = Instances(
        tuple(size_hw),
        proposal_boxes=moved[keep],
        objectness_logits=torch.as_tensor(logits)[keep],
    )
    if "proposal_rles" in dataset_dict:
        dataset_dict["proposal_rles"] = RLEList(dataset_dict["proposal_rles"])[keep]
