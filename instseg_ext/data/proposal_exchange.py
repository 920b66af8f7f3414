"""Proposals in the forms that other programs read: detectron2's pickle, COCO's result file."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from typing import Any

from detectron2.structures import BoxMode
from torch import Tensor

from instseg_ext.checkpoint import atomic_write
from instseg_ext.data.proposals import ProposalFile

__all__ = ["write_coco_results", "write_detectron2_pickle"]


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
