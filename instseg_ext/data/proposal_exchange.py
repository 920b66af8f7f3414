"""Proposals in the forms of other programs: detectron2's pickle, COCO's result file."""

from __future__ import annotations

import json
import os
import pickle
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.structures import BoxMode
from pycocotools import mask as coco_mask
from torch import Tensor

from instseg_ext.checkpoint import atomic_write
from instseg_ext.checkpoint.pickles import load_restricted
from instseg_ext.data.proposals import ProposalFile
from instseg_ext.data.segmentation import compress_rle, rle_problem

__all__ = ["read_foreign_proposals", "write_coco_results", "write_detectron2_pickle"]

# Boxes (N, 4) XYXY, logits (N,) and, of some files, N masks.
_Image = tuple[Tensor, Tensor, list[dict[str, Any]] | None]
_BOX_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
# Names in files of Detectron, and detectron2's.
_OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}


def read_foreign_proposals(path: str | os.PathLike[str]) -> dict[str, _Image]:
    """Read proposals that another program wrote; nothing of the file is executed.

    Args:
        path: ``.pkl`` of detectron2 (``ids``, ``boxes``, ``objectness_logits`` and ``bbox_mode``,
            XYXY unless it says XYWH), or ``.json`` of COCO results (``image_id``, ``score``, and
            ``bbox``, XYWH, or ``segmentation``, run lengths, or both).

    Returns:
        By image id, as text, in the order of the file. Scores of results are taken for
        probabilities if all of them are from 0 to 1, else for logits.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another kind of file, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of proposals {path}.")
    readers = {".pkl": _read_pickle, ".json": _read_results}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: proposals are read from .pkl, detectron2's, and .json, COCO results."
        )
    try:
        found = readers[path.suffix](path)
        wrong = [i for i, (boxes, *_) in found.items() if not boxes.isfinite().all()]
        if wrong:
            raise ValueError(f"image {wrong[0]} has boxes that are no numbers")
    except (
        pickle.UnpicklingError,
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        text = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{path} cannot be read as proposals ({text}).") from error
    return found


def _read_pickle(path: Path) -> dict[str, _Image]:
    with open(path, "rb") as file:
        content = load_restricted(file, {("detectron2.structures.boxes", "BoxMode"): BoxMode})
    content = {_OLD_NAMES.get(key, key): value for key, value in content.items()}
    mode = BoxMode(content.get("bbox_mode", BoxMode.XYXY_ABS))
    if mode not in _BOX_MODES:
        raise ValueError(f"boxes of the mode {mode.name} are none of an image's pixels")
    found: dict[str, _Image] = {}
    columns = (content[name] for name in ("ids", "boxes", "objectness_logits"))
    for image_id, boxes, logits in zip(*columns, strict=True):
        array = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        xyxy = BoxMode.convert(torch.from_numpy(array.copy()), mode, BoxMode.XYXY_ABS)
        scores = torch.from_numpy(np.array(logits, dtype=np.float32).reshape(-1))
        if len(scores) != len(xyxy):
            raise ValueError(f"image {image_id} has {len(xyxy)} boxes and {len(scores)} scores")
        found[str(image_id)] = xyxy, scores, None
    return found


def _read_results(path: Path) -> dict[str, _Image]:
    by_image: dict[str, list[dict]] = defaultdict(list)
    for result in json.loads(path.read_bytes()):
        by_image[str(result["image_id"])].append(result)
    scores = [float(r["score"]) for results in by_image.values() for r in results]
    are_probabilities = all(0 <= score <= 1 for score in scores)
    found: dict[str, _Image] = {}
    for image_id, results in by_image.items():
        logits = torch.tensor([float(r["score"]) for r in results], dtype=torch.float64)
        if are_probabilities:
            logits = torch.logit(logits, eps=1e-12)
        masks = [_mask(r["segmentation"], image_id) for r in results if "segmentation" in r]
        if masks and len(masks) < len(results):
            raise ValueError(f"some results of image {image_id} have masks and some have none")
        tight = coco_mask.toBbox(masks) if masks else [None] * len(results)
        boxes = [r.get("bbox", box) for r, box in zip(results, tight, strict=True)]
        if any(box is None for box in boxes):
            raise ValueError(f"a result of image {image_id} has neither bbox nor segmentation")
        xywh = torch.from_numpy(np.asarray(boxes, dtype=np.float64).reshape(-1, 4))
        xyxy = BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        found[image_id] = xyxy.float(), logits.float(), masks or None
    return found


def _mask(rle: Any, image_id: str) -> dict[str, Any]:
    """Return a mask in compressed form, or raise if it is damaged."""
    size = rle.get("size") if isinstance(rle, dict) else None
    problem = rle_problem(rle, tuple(size or ()))
    if problem:
        raise ValueError(f"image {image_id}: {problem}")
    return compress_rle(rle)


def write_detectron2_pickle(
    path: str | os.PathLike[str], proposals: ProposalFile, image_ids: Mapping[str, Any]
) -> None:
    """Write what detectron2's own ``MODEL.LOAD_PROPOSALS`` reads; it has no place for masks.

    Args:
        path: appears when it is complete; an existing file is replaced.
        proposals: of which the boxes and logits are written.
        image_ids: for each id as text the one of the data set.
    """
    found = [proposals[image_id] for image_id in proposals.ids]
    content = {
        "ids": [image_ids[image_id] for image_id in proposals.ids],
        "boxes": [boxes.clone().numpy() for boxes, _ in found],
        "objectness_logits": [logits.clone().numpy() for _, logits in found],
        # As a number: the reader makes it a BoxMode, and the file names no class of detectron2.
        "bbox_mode": BoxMode.XYXY_ABS.value,
    }
    with atomic_write(path) as file:
        pickle.dump(content, file, protocol=4)


def write_coco_results(
    path: str | os.PathLike[str],
    proposals: ProposalFile,
    image_ids: Mapping[str, Any],
    category_id: int,
) -> None:
    """Write a COCO result file, as the authors of DeepMask publish their proposals.

    Args:
        path: appears when it is complete; an existing file is replaced.
        proposals: boxes become XYWH, logits probabilities; masks are written where there are any.
        image_ids: for each id as text the one of the data set.
        category_id: of all results, which the form asks for.
    """
    with atomic_write(path) as file:
        separator = b"["
        for image_id in proposals.ids:
            boxes, logits = proposals[image_id]
            masks = proposals.masks(image_id)
            for row, (box, score) in enumerate(_results(boxes, logits)):
                result = {
                    "image_id": image_ids[image_id],
                    "category_id": category_id,
                    "bbox": box,
                    "score": score,
                }
                if masks is not None:
                    result["segmentation"] = masks[row]
                file.write(separator + json.dumps(result).encode("ascii"))
                separator = b",\n"
        file.write(b"]\n" if separator != b"[" else b"[]\n")


def _results(boxes: Tensor, logits: Tensor) -> zip:
    """Return pairs of an XYWH box and a probability."""
    xywh = boxes.double().clone()
    xywh[:, 2:] -= xywh[:, :2]
    return zip(xywh.tolist(), logits.double().sigmoid().tolist(), strict=True)
