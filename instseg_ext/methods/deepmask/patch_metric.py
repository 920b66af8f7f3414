"""How well masks and scores of single patches fit: the figure to watch while a model trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from instseg_ext.evaluation import inference_mode
from instseg_ext.evaluation.progress import show_progress
from instseg_ext.methods.deepmask.arch import DeepMask
from instseg_ext.methods.deepmask.losses import enlarge
from instseg_ext.methods.deepmask.mapper import (
    ImageCache,
    PatchCutter,
    geometry_from_config,
    index_from_config,
)
from instseg_ext.methods.deepmask.sampling import WindowSampler

__all__ = ["evaluate_patches", "mask_iou", "summary"]

# The objects of an image come one after the other: it is decoded once.
_CACHE_BYTES = 256 * 2**20
# One set of score patches for all models.
_SEED = 0


def evaluate_patches(
    cfg: CfgNode, model: DeepMask, dicts: Sequence[dict], name: str, *, batch: int = 32
) -> dict[str, Any]:
    """Compare a model's masks and scores with what patches show.

    Masks: of every object that is large enough to train on, in the window in which it is centred
    and has canonical size; a pixel is foreground when its logit is 0 or more. Scores: of as many
    patches, drawn as for training, half of them positive.

    Args:
        cfg: that the model was built from.
        model: its state is restored.
        dicts: of a data set.
        name: of it.
        batch: patches of a forward pass.

    Returns:
        ``objects``, ``left_out`` (annotations that are crowds or too small); ``mask``, see
        ``summary``; for a SharpMask also ``refined_mask``, and under ``refined_minus_mask`` the
        ``mean_iou`` of the differences, paired by object, and ``better``, the percentage of objects
        with a higher IoU; ``score`` with ``accuracy`` and its parts for ``positive`` and
        ``negative`` patches, in percent.

    Raises:
        ValueError: if no object is large enough.
    """
    geometry, index = geometry_from_config(cfg), index_from_config(cfg, dicts, name)
    windows = WindowSampler(index, geometry)
    cutter = PatchCutter(dicts, index, geometry, ImageCache(cfg.INPUT.FORMAT, _CACHE_BYTES))
    objects = np.flatnonzero(index.usable)
    generator = np.random.default_rng(_SEED)
    masks = (cutter(windows.canonical_patch(int(annotation))) for annotation in objects)
    drawn = (windows.score_patch(generator) for _ in itertools.count())
    found = (cutter(patch) for patch in drawn if patch is not None)
    scores = itertools.islice(found, len(objects))

    batches = 2 * -(-len(objects) // batch)
    with inference_mode(model), show_progress(batches, "Compared", name) as advance:
        overlaps = [_overlaps(model, part, advance) for part in _batches(masks, batch)]
        right = [_right(model, part, advance) for part in _batches(scores, batch)]
    ious = {key: np.concatenate([part[key] for part in overlaps]) for key in overlaps[0]}
    figures: dict[str, Any] = {
        "objects": len(objects),
        "left_out": len(index.usable) - len(objects),
        **{key: summary(values) for key, values in ious.items()},
    }
    if "refined_mask" in ious:
        gain = ious["refined_mask"] - ious["mask"]
        figures["refined_minus_mask"] = {
            "mean_iou": 100 * float(gain.mean()),
            "better": 100 * float((gain > 0).mean()),
        }
    return {**figures, "score": _accuracy(np.concatenate(right))}


def mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """Compare masks.

    Args:
        logits: (N, S, S); foreground is 0 or more.
        targets: (N, S, S) bool.

    Returns:
        (N,) float32; 1 where both masks are empty.
    """
    masks = logits >= 0
    union = (masks | targets).flatten(1).sum(dim=1)
    return ((masks & targets).flatten(1).sum(dim=1) / union).nan_to_num(nan=1.0)


def summary(ious: np.ndarray) -> dict[str, float]:
    """Return mean, median and the shares of at least 0.5 and 0.7 of (N,) IoUs, in percent."""
    return {
        "mean_iou": 100 * float(ious.mean()),
        "median_iou": 100 * float(np.median(ious)),
        "at_least_50": 100 * float((ious >= 0.5).mean()),
        "at_least_70": 100 * float((ious >= 0.7).mean()),
    }


def _batches(samples: Iterable[dict], size: int) -> Iterator[list[dict]]:
    samples = iter(samples)
    while part := list(itertools.islice(samples, size)):
        yield part


def _overlaps(model: DeepMask, samples: list[dict], advance: Any) -> dict[str, np.ndarray]:
    """Return the IoUs of a batch of mask patches by head."""
    outputs = model.patch_outputs(samples)
    targets = torch.stack([sample["target"] for sample in samples]).to(model.device)
    logits = {"mask": outputs.mask_logits}
    if outputs.refined_logits is not None:
        logits["refined_mask"] = outputs.refined_logits
    size = targets.shape[-1]
    ious = {key: mask_iou(enlarge(value, size), targets) for key, value in logits.items()}
    advance()
    return {key: value.cpu().numpy() for key, value in ious.items()}


def _right(model: DeepMask, samples: list[dict], advance: Any) -> np.ndarray:
    """Return (n, 2) bool of a batch of score patches: is it positive, is the score right."""
    positive = np.array([sample["label"] > 0 for sample in samples])
    logits = model.patch_outputs(samples).score_logits.cpu().numpy()
    advance()
    return np.stack([positive, (logits > 0) == positive], axis=1)


def _accuracy(right: np.ndarray) -> dict[str, float]:
    """Return percentages of right scores; NaN where there is no patch of a kind."""
    positive, correct = right.T

    def share(of: np.ndarray) -> float:
        return 100 * float(of.mean()) if len(of) else float("nan")

    return {
        "accuracy": share(correct),
        "positive": share(correct[positive]),
        "negative": share(correct[~positive]),
    }
