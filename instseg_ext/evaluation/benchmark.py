"""Speed of a model on prepared input, beside its own floor.

The floor is what the network alone costs: backbone, neck, towers and predictors in the same memory
format and precision, without targets, suppression, warping or mask resizing. Both are measured in
turn within one run, so that a busy machine slows both.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from instseg_ext.evaluation.runner import inference_mode
from instseg_ext.evaluation.timing import StageTimer

__all__ = ["build_floor", "measure_speed", "synthetic_batch"]

logger = logging.getLogger(__name__)


def synthetic_batch(size_hw: tuple[int, int], batch: int, seed: int = 0) -> list[dict[str, Any]]:
    """Make ``batch`` model inputs of noise.

    Args:
        size_hw: (height, width) of the network input.
        batch: number of images.
        seed: equal seeds give equal images.

    Returns:
        Dictionaries with ``image`` ((3, H, W) float32, 0 to 255), ``height`` and ``width``.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = size_hw
    return [
        {
            "image": torch.randint(0, 256, (3, height, width), generator=generator).float(),
            "height": height,
            "width": width,
        }
        for _ in range(batch)
    ]


def build_floor(model: nn.Module, batch: Sequence[Mapping[str, Any]]) -> Callable[[], None]:
    """Make a function that runs the network parts of ``model`` once, on inputs fixed now.

    Dense models: ``backbone`` and ``head``, on one batch or on what the model's ``network_inputs``
    gives, if it has that. Two-stage models: one ordinary run records what the
    backbone, the RPN's head and the ROI heads' parts are given, and these are run on that. Likewise
    the backbone and ``sem_seg_head`` of models of label maps.

    Args:
        model: in evaluation mode.
        batch: as the model takes it.

    Returns:
        A function without arguments; call it without gradients, under ``model_precision(model)``.
    """
    if hasattr(model, "head"):
        if hasattr(model, "network_inputs"):
            tensors = model.network_inputs(batch)
        else:
            tensors = [model.preprocess_image(batch).tensor]

        def run_dense() -> None:
            for tensor in tensors:
                model.head(model.backbone(tensor))

        return run_dense
    parts = _network_parts(model)
    recorded = _record(model, parts, batch)

    def run() -> None:
        for part, arguments in recorded:
            part(*arguments)

    return run


def model_precision(model: nn.Module) -> contextlib.AbstractContextManager:
    """Give the autocast context the model uses inside ``forward``, if it has one."""
    precision = getattr(model, "precision", None)
    return precision() if callable(precision) else contextlib.nullcontext()


def _network_parts(model: nn.Module) -> list[nn.Module]:
    parts = [model.backbone]
    proposals = getattr(model, "proposal_generator", None)
    if proposals is not None:
        parts.append(getattr(proposals, "rpn_head", proposals))
    for name, child in getattr(model, "roi_heads", nn.Module()).named_children():
        if "pooler" not in name and any(True for _ in child.parameters()):
            parts += list(child) if isinstance(child, nn.ModuleList) else [child]
    label_head = getattr(model, "sem_seg_head", None)
    return parts if label_head is None else [*parts, label_head]


def _record(
    model: nn.Module, parts: Sequence[nn.Module], batch: Sequence[Mapping[str, Any]]
) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Run the model once and note each call of a part as (function, arguments)."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # A mask head's own forward ends in per-class selection; its layers are the network.
        layers = getattr(module, "layers", None)
        calls.append((layers, arguments[:1]) if callable(layers) else (module, arguments))

    handles = [part.register_forward_pre_hook(note) for part in parts]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def measure_speed(
    model: nn.Module,
    batch: Sequence[Mapping[str, Any]],
    *,
    repeat: int = 20,
    warmup: int = 3,
    floor: bool = True,
) -> dict[str, Any]:
    """Time ``model(batch)`` and its floor in turn.

    Args:
        model: its state is restored afterwards.
        batch: as the model takes it; loading and resizing are therefore not in the times.
        repeat: timed runs of each.
        warmup: runs before them.
        floor: measure the floor too.

    Returns:
        What ``StageTimer.summary`` gives, and ``best_ms`` of the total, ``batch``, ``input_hw``,
        ``parameters``, ``detections`` per image (0 for label maps), and if asked for ``floor_ms``
        (``median``, ``best``) and ``ratio_to_floor`` (medians).
    """
    timer = StageTimer(next(model.parameters()).device, warmup)
    floor_ms: list[float] = []
    with inference_mode(model, "rle"):
        with model_precision(model):
            run_floor = build_floor(model, batch) if floor else None
        for _ in range(warmup + repeat):
            with timer.attached(model):
                timer.start()
                timer.loaded()
                outputs = model(batch)
                timer.finish(len(batch))
            if run_floor is not None:
                floor_ms.append(_floor_time(model, run_floor, timer))
    result = timer.summary()
    result["best_ms"] = min(timer.milliseconds("total"))
    result["batch"] = len(batch)
    result["input_hw"] = list(batch[0]["image"].shape[-2:])
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["detections"] = float(np.mean([len(output.get("instances", ())) for output in outputs]))
    if floor_ms:
        kept = floor_ms[warmup:]
        result["floor_ms"] = {"median": float(np.median(kept)), "best": min(kept)}
        result["ratio_to_floor"] = result["median_ms"]["total"] / result["floor_ms"]["median"]
    return result


def _floor_time(model: nn.Module, run: Callable[[], None], timer: StageTimer) -> float:
    with model_precision(model):
        began = timer.now()
        run()
        return (timer.now() - began) * 1e3
