"""Run a model over the test sets: accuracy and speed in one pass, tables and ``results.json``."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from instseg_ext import data
from instseg_ext.evaluation import report
from instseg_ext.evaluation.build import build_evaluator
from instseg_ext.evaluation.progress import show_progress
from instseg_ext.evaluation.timing import STAGES, StageTimer
from instseg_ext.method import Method

__all__ = ["evaluate", "inference_mode", "run_inference"]

logger = logging.getLogger(__name__)


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    method: Method,
    *,
    limit: int | None = None,
    output_dir: str | Path | None = None,
    iteration: int | None = None,
) -> OrderedDict[str, dict[str, dict[str, float]]]:
    """Evaluate ``model`` on every data set of ``DATASETS.TEST``.

    Each data set's detections go to ``<output_dir>/inference/<name>/``, the summary to
    ``<output_dir>/results.json``; an earlier summary moves to
    ``<output_dir>/results/<iteration>.json``. Works in one and in several processes; each of them
    must call it, the main one writes.

    Args:
        cfg: names the data sets and, for the summary, the weights.
        model: in any mode; left in the mode it came in. May be wrapped for distributed training.
        method: the method that ``cfg`` configures.
        limit: judge the first images of each data set only; ``None`` means all.
        output_dir: ``cfg.OUTPUT_DIR`` if ``None``.
        iteration: training iteration the weights belong to, if known.

    Returns:
        ``{data set: {"bbox": {"AP": ...}, "segm": {...}}}`` in percent on the main process, NaN
        where there is nothing to measure against; empty inner dictionaries on other processes.

    Raises:
        FileNotFoundError: if a file of proposals does not exist.
        ValueError: if ``DATASETS.TEST`` is empty, a data set has no known evaluator, or it does not
            hold what the model predicts.
    """
    if len(cfg.DATASETS.TEST) == 0:
        raise ValueError(
            "DATASETS.TEST is empty: name a data set to evaluate on, or pass --val-json and "
            "--val-images."
        )
    data.check_proposal_files(cfg, "TEST")
    folder = Path(cfg.OUTPUT_DIR if output_dir is None else output_dir)
    model = (
        getattr(model, "module", model)
        if isinstance(model, nn.parallel.DistributedDataParallel)
        else model
    )
    timer = StageTimer(next(model.parameters()).device)
    mapper = (
        method.build_mapper(cfg, False) if method.build_mapper else data.build_mapper(cfg, False)
    )
    data.check_annotation_kind(cfg.DATASETS.TEST, mapper)
    results: OrderedDict[str, dict[str, dict[str, float]]] = OrderedDict()
    for name in cfg.DATASETS.TEST:
        evaluator = build_evaluator(
            cfg,
            name,
            method.evaluator_hints(cfg),
            folder / "inference" / name,
            seen_images_only=limit is not None,
        )
        loader = data.build_test_loader(cfg, name, mapper, limit=limit)
        run_inference(model, loader, evaluator, timer, description=name)
        results[name] = evaluator.evaluate() or {}
        _log_scores(name, results[name])
        comm.synchronize()
    if comm.is_main_process():
        _finish(cfg, folder, results, timer.summary(), iteration)
    return results


@contextlib.contextmanager
def inference_mode(model: nn.Module, mask_output: str | None = None) -> Iterator[None]:
    """Put a model into evaluation mode without gradients and restore its state afterwards.

    Args:
        model: changed within the context only.
        mask_output: value of ``model.mask_output`` meanwhile (``bool`` or ``rle``), for models that
            have this switch.
    """
    training, before = model.training, getattr(model, "mask_output", None)
    switch = mask_output is not None and before is not None
    model.eval()
    if switch:
        model.mask_output = mask_output
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        if switch:
            model.mask_output = before


def run_inference(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    evaluator: DatasetEvaluator,
    timer: StageTimer,
    *,
    description: str = "",
) -> None:
    """Feed every batch of ``loader`` to ``model`` and the outputs to ``evaluator``.

    Masks come run-length encoded where both sides can, so that memory does not grow with the image
    size. What the evaluator does is not part of the times.

    Args:
        model: not wrapped; its state is restored.
        loader: has a length.
        evaluator: gets ``process(inputs, outputs)`` per batch.
        timer: adds to its record.
        description: shown beside the progress bar.
    """
    evaluator.reset()
    mask_output = "rle" if getattr(evaluator, "accepts_rle", False) else "bool"
    with (
        show_progress(len(loader), "Evaluated", description) as advance,
        inference_mode(model, mask_output),
        timer.attached(model),
    ):
        timer.start()
        for batch in loader:
            timer.loaded()
            outputs = model(batch)
            timer.finish(len(batch))
            evaluator.process(batch, outputs)
            advance()
            timer.start()


def _log_scores(name: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    if not scores:
        return
    logger.info("%s:\n%s", name, report.metric_table(scores))
    by_class = report.class_table(scores)
    if by_class:
        logger.info("%s by class:\n%s", name, by_class)


def _finish(
    cfg: CfgNode,
    folder: Path,
    results: Mapping[str, Any],
    speed: Mapping[str, Any],
    iteration: int | None,
) -> None:
    logger.info("Speed per batch:\n%s", report.speed_table(speed, STAGES))
    summary = {
        "config": cfg.INSTSEG.CONFIG,
        "weights": cfg.MODEL.WEIGHTS,
        "iteration": iteration,
        "datasets": results,
        "speed": speed,
    }
    report.archive_results(folder)
    report.write_json(folder / report.RESULTS_NAME, report.null_for_nan(summary), indent=2)
    logger.info("Results are in %s.", folder / report.RESULTS_NAME)
