"""Weights outside of training: are they there, and how good are they."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from instseg_ext.checkpoint import InstSegCheckpointer, fetch_weights
from instseg_ext.engine.outputs import check_resume, last_checkpoint
from instseg_ext.evaluation import evaluate
from instseg_ext.method import Method

__all__ = ["check_weights", "class_count", "evaluate_checkpoint"]

logger = logging.getLogger(__name__)


def class_count(cfg: CfgNode, method: Method) -> int | None:
    """Return the number of foreground classes, None if the method does not say where it is."""
    if not method.class_count_keys:
        return None
    node = cfg
    for name in method.class_count_keys[0].split("."):
        node = node[name]
    return int(node)


def check_weights(cfg: CfgNode, resume: bool = False) -> None:
    """Check, before anything slow, that the weights a run starts from exist and fit.

    Args:
        cfg: full config.
        resume: the run goes on from the last checkpoint in ``OUTPUT_DIR``, if there is one.

    Raises:
        FileNotFoundError: if the file does not exist or cannot be downloaded.
        ValueError: if the checkpoint to resume from belongs to another model.
    """
    last = last_checkpoint(cfg.OUTPUT_DIR) if resume else None
    if last is not None:
        check_resume(cfg, str(last))
    elif cfg.MODEL.WEIGHTS:
        fetch_weights(cfg.MODEL.WEIGHTS)


def evaluate_checkpoint(
    cfg: CfgNode,
    method: Method,
    *,
    limit: int | None = None,
    reset_classifier: bool = False,
    unsafe: bool = False,
) -> Mapping[str, Any]:
    """Build the model, load ``MODEL.WEIGHTS`` and evaluate it.

    A checkpoint of a training with averaged weights gives the averaged ones.

    Args:
        cfg: full config.
        method: record of the configured method.
        limit: images per data set; None = all.
        reset_classifier: see ``InstSegCheckpointer``.
        unsafe: see ``InstSegCheckpointer``.

    Returns:
        Data set -> task -> metric -> value, in the main process.

    Raises:
        FileNotFoundError: if the weights do not exist.
        ValueError: if they do not fit the model, or there is nothing to evaluate on.
    """
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: evaluating random weights.")
    model = build_model(cfg)
    checkpointer = InstSegCheckpointer(
        model,
        reset_classifier=reset_classifier,
        num_classes=class_count(cfg, method),
        unsafe=unsafe,
    )
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    model.eval()
    return evaluate(cfg, model, method, limit=limit, output_dir=cfg.OUTPUT_DIR)
