"""Proposals of a model for a data set, written to a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import Tensor, nn

from instseg_ext import data
from instseg_ext.checkpoint import InstSegCheckpointer
from instseg_ext.engine.standalone import class_count
from instseg_ext.evaluation import inference_mode, show_progress
from instseg_ext.method import Method
from instseg_ext.structures.rle import encode_masks

__all__ = ["FORMS", "Found", "import_proposals", "propose_dataset", "write_found"]

logger = logging.getLogger(__name__)

# Image id, boxes (N, 4) in pixels of the image file, logits (N,) and, of some models, N masks.
Found = tuple[str, Tensor, Tensor] | tuple[str, Tensor, Tensor, list[dict[str, Any]] | None]

# What is written: our own file, or one for other programs.
FORMS = ("torch", "detectron2-pickle", "json")


def propose_dataset(
    cfg: CfgNode,
    method: Method,
    dataset_name: str,
    output: Path,
    *,
    form: str = "torch",
    top: int | None = None,
    unsafe: bool = False,
) -> None:
    """Run a model over a data set and write what it finds as proposals, whatever the classes.

    Methods that propose give their own scores; of others the detections are taken, and the logits
    are those of their scores. Masks are written where the model predicts masks and the form has a
    place for them. Every process of the job must call it; the main one writes.

    Args:
        cfg: of the model, with ``MODEL.WEIGHTS``.
        method: record of the configured method.
        dataset_name: registered; all of its images are looked at, as in evaluation.
        output: the file, which appears when it is complete; an existing one is replaced.
        form: one of ``FORMS``.
        top: proposals of each image that are kept, the best; None = all.
        unsafe: see ``InstSegCheckpointer``.

    Raises:
        FileNotFoundError: if weights, annotations or, later, images are missing.
        ValueError: if the weights do not fit the model, or the data set has no image.
    """
    model = build_model(cfg).eval()
    checkpointer = InstSegCheckpointer(model, num_classes=class_count(cfg, method), unsafe=unsafe)
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    mapper = (method.build_mapper or data.build_mapper)(cfg, False)
    data.check_annotation_kind([dataset_name], mapper)
    loader = data.build_test_loader(cfg, dataset_name, mapper)
    with inference_mode(model, "rle"):
        _write(_found(model, loader, dataset_name, top), dataset_name, output, form)


def import_proposals(
    source: Path, dataset_name: str, output: Path, *, form: str = "torch", top: int | None = None
) -> None:
    """Write proposals that another program made for a data set.

    Args:
        source: see ``read_foreign_proposals``. Images that it does not name have no proposal.
        dataset_name: registered.
        output: see ``propose_dataset``, as ``form`` and ``top``.
        form: one of ``FORMS``.
        top: proposals of each image that are kept.

    Raises:
        FileNotFoundError: if the file or the annotations are missing.
        ValueError: if the file cannot be read, or was not made for this data set.
    """
    found = data.read_foreign_proposals(source)
    dicts = DatasetCatalog.get(dataset_name)
    named = [d for d in dicts if str(d["image_id"]) in found]
    if not named:
        raise ValueError(
            f"{source} holds proposals for {len(found)} images, none of which is of "
            f"{dataset_name}: it was made for other data."
        )
    if len(named) < len(dicts):
        logger.warning(
            "%s names %d of the %d images of %s; the others have no proposal.",
            source, len(named), len(dicts), dataset_name,
        )  # fmt: skip
    _write(_imported(found, dicts, top), dataset_name, output, form)


def _imported(
    found: Mapping[str, tuple], dicts: Sequence[Mapping[str, Any]], top: int | None
) -> Iterator[Found]:
    """Yield what a file holds of each image of a data set."""
    for record in dicts:
        image_id = str(record["image_id"])
        boxes, logits, rles = found.get(image_id, (torch.zeros(0, 4), torch.zeros(0), None))
        size = [record["height"], record["width"]]
        wrong = [rle["size"] for rle in rles or () if rle["size"] != size]
        if wrong:
            raise ValueError(
                f"Image {image_id} is {size} pixels (height, width), and its proposals have masks "
                f"of {wrong[0]}: they were made for other data."
            )
        keep = _best(logits, top)
        yield (
            image_id,
            boxes[keep],
            logits[keep],
            None if rles is None else [rles[row] for row in keep.tolist()],
        )


def _best(logits: Tensor, top: int | None) -> Tensor:
    """Return the rows of the best finite logits, best first."""
    order = logits.argsort(descending=True, stable=True)
    return order[logits[order].isfinite()][:top]


def _write(found: Iterator[Found], dataset_name: str, output: Path, form: str) -> None:
    """Write what all processes find in the form that is asked for."""
    file = output if form == "torch" else output.with_name(f".{output.name}.proposals")
    try:
        write_found(file, found)
        if comm.is_main_process():
            _finish(data.ProposalFile(file), dataset_name, output, form)
    finally:
        if file != output and comm.is_main_process():
            file.unlink(missing_ok=True)
    comm.synchronize()


def _finish(proposals: data.ProposalFile, dataset_name: str, output: Path, form: str) -> None:
    """Write the other forms, and say what there is."""
    dicts = DatasetCatalog.get(dataset_name)
    image_ids = {str(d["image_id"]): d["image_id"] for d in dicts}
    if form == "detectron2-pickle":
        data.write_detectron2_pickle(output, proposals, image_ids)
    elif form == "json":
        data.write_coco_results(output, proposals, image_ids, _any_category(dataset_name))
    number = sum(len(proposals[image_id][1]) for image_id in proposals.ids)
    logger.info(
        "Wrote %d proposals%s for %d images of %s to %s.",
        number,
        " with masks" if proposals.has_masks and form != "detectron2-pickle" else "",
        len(proposals.ids),
        dataset_name,
        output,
    )


def _any_category(dataset_name: str) -> int:
    """Return an id of the data set: the form wants one, and proposals have none."""
    known = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
    return min(known) if known else 1


def _found(model: nn.Module, loader: Any, name: str, top: int | None) -> Iterator[Found]:
    """Yield what is found in each image of a data set."""
    with show_progress(len(loader), "Proposed regions for", name) as advance:
        for batch in loader:
            for item, output in zip(batch, model(batch), strict=True):
                yield (str(item["image_id"]), *_proposals(output, top))
            advance()


def _proposals(
    output: Mapping[str, Any], top: int | None
) -> tuple[Tensor, Tensor, list[dict[str, Any]] | None]:
    """Return boxes, logits and masks of the best finds of one image."""
    instances = output["instances"]
    if "proposals" in output:
        boxes = output["proposals"].proposal_boxes.tensor
        logits = output["proposals"].objectness_logits.float()
    else:
        boxes = instances.pred_boxes.tensor
        # In float64, where certain and nearly certain detections still differ.
        logits = torch.logit(instances.scores.double(), eps=1e-12).float()
    keep = _best(logits, top)
    rles = None
    if instances.has("pred_masks_rle"):
        rles = [instances.pred_masks_rle[row] for row in keep.tolist()]
    elif instances.has("pred_masks"):
        rles = encode_masks(instances.pred_masks[keep])
    return boxes[keep].cpu(), logits[keep].cpu(), rles


def write_found(file: Path, found: Iterator[Found]) -> None:
    """Write what all processes find into one file.

    Between processes it passes through files because it may be gigabytes, too much for a message.

    Args:
        file: appears when it is complete.
        found: of this process.
    """
    if comm.get_world_size() == 1:
        data.write_proposals(file, found)
        return
    parts = [file.with_name(f".{file.name}.{rank}") for rank in range(comm.get_world_size())]
    data.write_proposals(parts[comm.get_rank()], found)
    comm.synchronize()
    if comm.is_main_process():
        opened = [data.ProposalFile(part) for part in parts]
        everything = ((i, *part[i], part.masks(i)) for part in opened for i in part.ids)
        data.write_proposals(file, everything)
        for part in parts:
            part.unlink()
    comm.synchronize()
