"""Alternating training of two-stage models, the four steps of Sec. 3.2 of arXiv:1506.01497."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import Tensor

import instseg_ext
from instseg_ext import data
from instseg_ext.checkpoint import (
    InstSegCheckpointer,
    atomic_write,
    model_shapes,
    read_weights,
    sha256_of,
    shapes_of,
    to_plain,
)
from instseg_ext.engine.alternating_plan import FINAL, STEPS, Step, plan_steps, proposal_files
from instseg_ext.engine.alternating_record import FinishedStep, Record
from instseg_ext.engine.alternating_step import StepTrainer, propose
from instseg_ext.engine.standalone import class_count, evaluate_checkpoint
from instseg_ext.method import Method

__all__ = ["join_weights", "train_alternating"]

logger = logging.getLogger(__name__)

_BACKBONE, _PROPOSALS = "backbone.", "proposal_generator."


def train_alternating(
    cfg: CfgNode,
    method: Method,
    iterations: Sequence[int] | None = None,
    *,
    resume: bool = False,
    reset_classifier: bool = False,
    limit: int | None = None,
    unsafe: bool = False,
) -> Mapping[str, Any]:
    """Train the four steps, join RPN and detector, and evaluate the joined model.

    Every process of a job must call it, after ``check_alternating`` in the main one; ``OUTPUT_DIR``
    must be the same folder for all. Step k works in ``step<k>``; the joined model is written to
    ``OUTPUT_DIR/model_final.pth``.

    Args:
        cfg: of the whole model.
        method: record of the configured method.
        iterations: of each step; None = ``SOLVER.MAX_ITER`` for each.
        resume: leave out finished steps, and go on inside the one that was interrupted.
        reset_classifier: see ``InstSegCheckpointer``; for ``MODEL.WEIGHTS``.
        limit: use only the first images of every data set; None = all.
        unsafe: see ``InstSegCheckpointer``; for ``MODEL.WEIGHTS``.

    Returns:
        As ``evaluate_checkpoint``; empty without test sets or where nothing was left to do.

    Raises:
        ValueError: if ``MODEL.WEIGHTS`` or the keypoint settings do not fit, before any step; if a
            step's file is not what the step wrote, or RPN and detector do not share one backbone.
    """
    record = (Record.load(cfg.OUTPUT_DIR) if resume else None) or Record(Path(cfg.OUTPUT_DIR))
    comm.synchronize()  # all have read before anybody writes
    joined = record.folder / FINAL
    if _is_joined(record):
        logger.info("Nothing to do: all steps are done and joined in %s.", joined)
        return {}
    if record.joined:
        logger.warning("%s is not the joined model any more: joining again.", joined)
    _check_before_training(cfg, method, record, reset_classifier, unsafe)
    options = {"resume": resume, "reset_classifier": reset_classifier, "unsafe": unsafe}
    for step, step_cfg in zip(STEPS, plan_steps(cfg, iterations), strict=True):
        if step.number not in record.steps:
            _run_step(cfg, step_cfg, method, step, record, limit=limit, **options)
        logger.info("%s", record.steps[step.number].report)
    if comm.is_main_process():
        _write_joined(cfg, record, joined)
    comm.synchronize()
    results = _evaluate(cfg, method, joined, limit)
    if comm.is_main_process():
        record.joined = sha256_of(str(joined))
        record.save()
    return results


def _is_joined(record: Record) -> bool:
    """Ask the main process, so that all do the same."""
    return comm.all_gather(comm.is_main_process() and record.is_joined())[0]


def _check_before_training(
    cfg: CfgNode, method: Method, record: Record, reset_classifier: bool, unsafe: bool
) -> None:
    """Raise what a part of the model, or one without test sets, would not say or say too late."""
    build_mapper = method.build_mapper or data.build_mapper
    build_mapper(cfg, True)
    if not cfg.MODEL.WEIGHTS or {1, 2} <= record.steps.keys():
        return
    logger.info("Checking that MODEL.WEIGHTS fit the whole model, of which step 1 builds a part.")
    whole = cfg.clone()
    whole.defrost()
    whole.MODEL.DEVICE = "cpu"
    checkpointer = InstSegCheckpointer(
        build_model(whole),
        reset_classifier=reset_classifier,
        num_classes=class_count(cfg, method),
        unsafe=unsafe,
    )
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])


def _run_step(
    cfg: CfgNode,
    step_cfg: CfgNode,
    method: Method,
    step: Step,
    record: Record,
    *,
    resume: bool,
    reset_classifier: bool,
    limit: int | None,
    unsafe: bool,
) -> None:
    """Train one step, write its proposals and note it in the record, in all processes."""
    logger.info("Step %d of %d: %s.", step.number, len(STEPS), step.title)
    folder, start = Path(step_cfg.OUTPUT_DIR), time.monotonic()
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        record.save()  # from now on the folder is that of an alternating training
        with atomic_write(folder / "config.yaml") as file:
            file.write(step_cfg.dump().encode())
    comm.synchronize()
    trainer = StepTrainer(step_cfg, method, step, train_limit=limit, unsafe=unsafe)
    trainer.resume_or_load(resume=resume, reset_classifier=reset_classifier)
    trainer.train()
    del trainer
    gc.collect()  # trainer and hooks hold each other, and with them the memory of the device
    files, proposals = [folder / FINAL], ""
    if step.proposes:
        paths = proposal_files(cfg, step)
        proposals = f"; {propose(step_cfg, method, paths, limit)}"
        files += paths
    comm.synchronize()
    report = (
        f"Step {step.number} of {len(STEPS)}, {step.title}: {step_cfg.SOLVER.MAX_ITER} iterations"
        f"{_last_losses(folder)}{proposals}; {timedelta(seconds=round(time.monotonic() - start))} "
        f"since start or resumption; {folder / FINAL}."
    )
    if comm.is_main_process():
        record.finish(step, step_cfg.SOLVER.MAX_ITER, files, report)
    else:
        record.steps[step.number] = FinishedStep(step_cfg.SOLVER.MAX_ITER, {}, report)


def _last_losses(folder: Path) -> str:
    metrics = folder / "metrics.json"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    last = json.loads(lines[-1]) if lines else {}
    losses = [f"{k} {v:.3g}" for k, v in last.items() if k.startswith(("loss_", "total_loss"))]
    return f", at their end {', '.join(losses)}" if losses else ""


def join_weights(rpn: Mapping[str, Tensor], detector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one model's weights from those of an RPN and of a detector on the same backbone.

    Args:
        rpn: with the backbone's weights and the RPN's, by name.
        detector: with the backbone's and the heads'.

    Raises:
        ValueError: if the two backbones differ in a single bit.
    """
    backbones = [{k: v for k, v in w.items() if k.startswith(_BACKBONE)} for w in (rpn, detector)]
    names = sorted(backbones[0].keys() | backbones[1].keys())
    different = [n for n in names if not _same_bits(*(b.get(n) for b in backbones))]
    if different:
        raise ValueError(
            f"the RPN of step 3 and the detector of step 4 do not share one backbone: "
            f"{len(different)} of {len(names)} tensors differ, the first {different[0]}. They are "
            "not joined; pass --overwrite to train all steps anew."
        )
    logger.info("RPN and detector share one backbone: %d tensors are equal bit by bit.", len(names))
    return {**detector, **{k: v for k, v in rpn.items() if k.startswith(_PROPOSALS)}}


def _same_bits(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return False
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*bits)


def _write_joined(cfg: CfgNode, record: Record, path: Path) -> None:
    """Write the model of steps 3 and 4 as a checkpoint of the whole model's config."""
    record.verify()
    parts = [record.folder / STEPS[i].folder / FINAL for i in (2, 3)]
    weights = join_weights(*(read_weights(str(part))["model"] for part in parts))
    wanted, found = model_shapes(cfg), shapes_of(weights)
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        raise ValueError(
            f"steps 3 and 4 do not add up to the model of the config: {len(wrong)} tensors are "
            f"missing, too many or of another shape, the first {wrong[0]}."
        )
    metadata = {
        "version": instseg_ext.__version__,
        "class_names": list(cfg.INSTSEG.CLASS_NAMES),
        "datasets": [dict(entry) for entry in cfg.INSTSEG.DATASETS],
        "config": cfg.dump(),
    }
    with atomic_write(path) as file:
        torch.save(to_plain({"model": weights, "instseg_ext": metadata}), file)
    logger.info("The joined model is in %s.", path)


def _evaluate(cfg: CfgNode, method: Method, weights: Path, limit: int | None) -> Mapping[str, Any]:
    if not cfg.DATASETS.TEST:
        logger.info("DATASETS.TEST is empty: nothing is evaluated.")
        return {}
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(weights)
    cfg.freeze()
    return evaluate_checkpoint(cfg, method, limit=limit)
