"""Regions proposed beforehand (``MODEL.LOAD_PROPOSALS``): the file of boxes, scores and masks.

detectron2 keeps proposals in pickles, and a pickle can run code when it is read. Ours is a torch
file of tensors and strings. It is read with ``weights_only`` and mapped into memory, so that the
loader's processes share one copy: for COCO that copy has gigabytes.
"""

from __future__ import annotations

import itertools
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instseg_ext.checkpoint import atomic_write
from instseg_ext.data.segmentation import rle_problem

__all__ = ["ProposalFile", "write_proposals"]

# The second one is the first one and masks.
_BOXES, _MASKS = "instseg_ext proposals 1", "instseg_ext proposals 2"
# Name, type and dimensions of each tensor of a file.
_BOX_TENSORS = (
    ("starts", torch.int64, 1),
    ("boxes", torch.float32, 2),
    ("objectness_logits", torch.float32, 1),
)
_MASK_TENSORS = (
    ("image_sizes", torch.int64, 2),
    ("mask_starts", torch.int64, 1),
    ("mask_counts", torch.uint8, 1),
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


def write_proposals(path: str | os.PathLike[str], proposals: Iterable[tuple]) -> None:
    """Write the proposals of a data set's images.

    All of them are held in memory until the file is complete.

    Args:
        path: appears when it is complete; an existing file is replaced.
        proposals: per image its id, as text; boxes (N, 4), XYXY in pixels of the image file; the
            logits (N,) of how likely each holds an object; and, for all images or for none, the
            list of N masks as compressed COCO RLE of the image's size. N may be 0.

    Raises:
        ValueError: if an image's masks are not as many as its boxes or differ in size, or only some
            of the images have masks.
    """
    ids: list[str] = []
    boxes: list[Tensor] = []
    logits: list[Tensor] = []
    masks = _MaskParts()
    for image_id, image_boxes, image_logits, *rest in proposals:
        order = image_logits.argsort(descending=True, stable=True)
        ids.append(str(image_id))
        boxes.append(image_boxes[order].float().cpu())
        logits.append(image_logits[order].float().cpu())
        masks.add(ids[-1], rest[0] if rest else None, order.tolist())
    counts = torch.tensor([0, *map(len, boxes)], dtype=torch.int64)
    masks.check(ids, counts[1:].tolist())
    content = {
        "format": _MASKS if masks.present else _BOXES,
        "ids": ids,
        "starts": counts.cumsum(0),
        "boxes": _moved_together(boxes, 4),
        "objectness_logits": _moved_together(logits),
        **(masks.tensors() if masks.present else {}),
    }
    with atomic_write(path) as file:
        torch.save(content, file)


class _MaskParts:
    """The masks of a file that is being written: their characters, one after another.

    Attributes:
        present: a mask was given.
    """

    def __init__(self) -> None:
        self.present = False
        self._sizes: list[tuple[int, int]] = []
        self._numbers: list[int | None] = []  # None: no list of masks was given
        self._lengths: list[int] = [0]
        self._counts = bytearray()

    def add(
        self, image_id: str, rles: Sequence[Mapping[str, Any]] | None, order: Sequence[int]
    ) -> None:
        """Take the masks of one image in the given order."""
        self._numbers.append(None if rles is None else len(rles))
        sizes = {tuple(map(int, rle["size"])) for rle in rles or ()}
        if len(sizes) > 1:
            raise ValueError(f"Image {image_id}: masks of different sizes, {sorted(sizes)}.")
        self._sizes.append(sizes.pop() if sizes else (0, 0))
        if rles is None or len(rles) != len(order):
            return  # `check` words it
        self.present |= len(rles) > 0
        for row in order:
            counts = rles[row]["counts"]
            counts = counts if isinstance(counts, bytes) else counts.encode("ascii")
            self._lengths.append(len(counts))
            self._counts += counts

    def check(self, ids: Sequence[str], boxes: Sequence[int]) -> None:
        """Raise unless every image, or none, has as many masks as boxes."""
        given = any(number is not None for number in self._numbers)
        for image_id, number, expected in zip(ids, self._numbers, boxes, strict=True):
            if given and (number or 0) != expected:
                raise ValueError(
                    f"Image {image_id} has {expected} proposals and {number or 'no'} masks; give "
                    "the masks of all proposals, or none at all."
                )

    def tensors(self) -> dict[str, Tensor]:
        """Return what goes into the file."""
        return {
            "image_sizes": torch.tensor(self._sizes, dtype=torch.int64),
            "mask_starts": torch.tensor(self._lengths, dtype=torch.int64).cumsum(0),
            "mask_counts": torch.frombuffer(self._counts, dtype=torch.uint8),
        }


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
        self._path, self._content = Path(path), content

    @property
    def has_masks(self) -> bool:
        """Tell whether the file holds masks beside the boxes."""
        return self._content["format"] == _MASKS

    def __contains__(self, image_id: object) -> bool:
        return str(image_id) in self._rows

    def __getitem__(self, image_id: int | str) -> tuple[Tensor, Tensor]:
        """Return boxes (N, 4) and logits (N,) of an image, float32, best first."""
        part = self._part(image_id)
        return self._boxes[part], self._logits[part]

    def masks(self, image_id: int | str) -> list[dict[str, Any]] | None:
        """Return the masks of an image in the order of its boxes, None if the file has none.

        Returns:
            COCO RLE, ``{"size": [H, W], "counts": str}`` at the size of the image file.

        Raises:
            ValueError: if one is damaged; pycocotools could not be trusted with it.
        """
        if not self.has_masks:
            return None
        part = self._part(image_id)
        size = self._content["image_sizes"][self._rows[str(image_id)]].tolist()
        starts = self._content["mask_starts"][part.start : part.stop + 1].tolist()
        rles = []
        for start, end in itertools.pairwise(starts):
            rle = {
                "size": size,
                "counts": self._content["mask_counts"][start:end].numpy().tobytes(),
            }
            problem = rle_problem(rle, size)
            if problem:
                raise ValueError(f"{self._path}, image {image_id}: damaged mask, {problem}.")
            rles.append({"size": list(size), "counts": rle["counts"].decode("ascii")})
        return rles

    def _part(self, image_id: int | str) -> slice:
        row = self._rows[str(image_id)]
        return slice(self._starts[row], self._starts[row + 1])


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
        if content.get("format") not in (_BOXES, _MASKS):
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
    with_masks = content["format"] == _MASKS
    for name, dtype, dimensions in _BOX_TENSORS + (_MASK_TENSORS if with_masks else ()):
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
    if with_masks:
        sizes, mask_starts = content["image_sizes"], content["mask_starts"]
        fits = (
            fits
            and tuple(sizes.shape) == (len(ids), 2)
            and len(mask_starts) == len(boxes) + 1
            and int(mask_starts[0]) == 0
            and int(mask_starts[-1]) == len(content["mask_counts"])
            and bool((mask_starts.diff() >= 0).all())
        )
    if not fits:
        raise ValueError("its parts have lengths that do not fit each other")
