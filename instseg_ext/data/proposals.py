"""Boxes proposed beforehand (``MODEL.LOAD_PROPOSALS``): their file, and their way to the mapper.

detectron2 keeps proposals in pickles, and a pickle can run code when it is read. Ours is a torch
file of tensors and strings. It is read with ``weights_only`` and mapped into memory, so that the
loader's processes share one copy: for COCO that copy has gigabytes.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import BoxMode
from torch import Tensor

from instseg_ext.checkpoint import atomic_write

__all__ = ["ProposalFile", "ProposalMapper", "assign_proposals", "write_proposals"]

_FORMAT = "instseg_ext proposals 1"
# Name, type and dimensions of each tensor of a file.
_TENSORS = (
    ("starts", torch.int64, 1),
    ("boxes", torch.float32, 2),
    ("objectness_logits", torch.float32, 1),
)
# What damaged or foreign content raises in torch and zipfile.
_READ_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


def write_proposals(
    path: str | os.PathLike[str], proposals: Iterable[tuple[str, Tensor, Tensor]]
) -> None:
    """Write the proposals of a data set's images.

    All of them are held in memory until the file is complete.

    Args:
        path: appears when it is complete; an existing file is replaced.
        proposals: per image its id, as text; boxes (N, 4), XYXY in pixels of the image file; and
            the logits (N,) of how likely each holds an object. N may be 0.
    """
    ids: list[str] = []
    boxes: list[Tensor] = []
    logits: list[Tensor] = []
    for image_id, image_boxes, image_logits in proposals:
        order = image_logits.argsort(descending=True, stable=True)
        ids.append(str(image_id))
        boxes.append(image_boxes[order].float().cpu())
        logits.append(image_logits[order].float().cpu())
    counts = torch.tensor([0, *map(len, boxes)], dtype=torch.int64)
    content = {
        "format": _FORMAT,
        "ids": ids,
        "starts": counts.cumsum(0),
        "boxes": _moved_together(boxes, 4),
        "objectness_logits": _moved_together(logits),
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def _moved_together(parts: list[Tensor], *row: int) -> Tensor:
    """Return the parts as one tensor (N, *row), float32, and leave an empty list behind.

    Each part goes as soon as it is copied: together they may have gigabytes.
    """
    end = sum(map(len, parts))
    whole = torch.empty(end, *row)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


class ProposalFile:
    """The proposals of a data set's images, read from the disk as they are asked for.

    Args:
        path: written by ``write_proposals``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another kind of file, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        content = _read(Path(path))
        self.ids: list[str] = content["ids"]
        self._rows = {image_id: row for row, image_id in enumerate(self.ids)}
        self._starts: list[int] = content["starts"].tolist()
        self._boxes, self._logits = content["boxes"], content["objectness_logits"]

    def __contains__(self, image_id: object) -> bool:
        return str(image_id) in self._rows

    def __getitem__(self, image_id: int | str) -> tuple[Tensor, Tensor]:
        """Return boxes (N, 4) and logits (N,) of an image, float32, best first."""
        row = self._rows[str(image_id)]
        part = slice(self._starts[row], self._starts[row + 1])
        return self._boxes[part], self._logits[part]


def assign_proposals(sets: Sequence[Sequence[dict]], files: Sequence[str]) -> list[dict]:
    """Note in each dictionary the file that holds the proposals of its image.

    Args:
        sets: the training sets, each as detectron2 dictionaries; not modified.
        files: one for each set, in their order.

    Returns:
        the images of all sets, with ``proposal_file`` for ``ProposalMapper``.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if there is not one file for each set, or one lacks an image.
    """
    if len(sets) != len(files):
        raise ValueError(
            f"MODEL.LOAD_PROPOSALS needs a file for each of the {len(sets)} sets of "
            f"DATASETS.TRAIN, in their order, but DATASETS.PROPOSAL_FILES_TRAIN has {len(files)}."
        )
    assigned = []
    for dicts, path in zip(sets, files, strict=True):
        present = ProposalFile(path)
        lacking = [d["image_id"] for d in dicts if d["image_id"] not in present]
        if lacking:
            raise ValueError(
                f"{path} of DATASETS.PROPOSAL_FILES_TRAIN lacks {len(lacking)} of {len(dicts)} "
                f"images, the first with id {lacking[0]}: it was made for other data."
            )
        assigned += [{**d, "proposal_file": str(path)} for d in dicts]
    return assigned


class ProposalMapper:
    """Adds the proposals of each image, in detectron2's form, before another mapper takes it.

    Args:
        mapper: one that carries ``proposal_boxes`` through its augmentations, such as
            ``InstSegDatasetMapper``.
    """

    def __init__(self, mapper: Callable[[dict], dict | None]) -> None:
        self._mapper = mapper
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
        boxes, logits = self._files[path][dataset_dict["image_id"]]
        dataset_dict["proposal_boxes"] = boxes.clone().numpy()
        dataset_dict["proposal_objectness_logits"] = logits.clone().numpy()
        dataset_dict["proposal_bbox_mode"] = BoxMode.XYXY_ABS
        return self._mapper(dataset_dict)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no proposal file {path}.")
    try:
        # Anything but a zip archive torch would take for an old-style pickle.
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no torch archive")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if content.get("format") != _FORMAT:
            raise ValueError(f"its format is {content.get('format')!r}")
        _check(content)
    except _READ_ERRORS as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{path} is no proposal file of ours ({reason}); write one with "
            "instseg_ext.data.write_proposals. detectron2's own, which are pickles, are not read."
        ) from error
    return content


def _check(content: dict[str, Any]) -> None:
    """Raise unless the parts of a file are what they should be and fit each other."""
    ids = content["ids"]
    if not (isinstance(ids, list) and all(isinstance(image_id, str) for image_id in ids)):
        raise ValueError("its ids are no texts")
    for name, dtype, dimensions in _TENSORS:
        tensor = content[name]
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.dim()) != (dtype, dimensions):
            raise ValueError(f"its {name} are no {dtype} tensor of {dimensions} dimensions")
    starts, boxes, logits = content["starts"], content["boxes"], content["objectness_logits"]
    fits = (
        len(starts) == len(ids) + 1
        and int(starts[0]) == 0
        and int(starts[-1]) == len(boxes) == len(logits)
        and bool((starts.diff() >= 0).all())
        and boxes.shape[1:] == (4,)
    )
    if not fits:
        raise ValueError("its parts have lengths that do not fit each other")
