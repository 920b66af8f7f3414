"""Time of the stages of inference, measured from outside the model through module hooks."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["STAGES", "StageTimer", "stage_modules"]

STAGES = ("data", "backbone", "head", "post", "total")
_MIB = 2**20


def stage_modules(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Find the modules whose run time makes up the stages ``backbone`` and ``head``.

    Dense models have ``head``; two-stage ones a proposal generator and ROI heads, which are counted
    together; models of label maps ``sem_seg_head``. A model without such members has an empty list
    there, and its time is in ``post``.
    """
    head = [model.head] if hasattr(model, "head") else []
    if not head:
        names = ("proposal_generator", "roi_heads", "sem_seg_head")
        head = [getattr(model, name, None) for name in names]
    modules = {"backbone": [getattr(model, "backbone", None)], "head": head}
    return {
        stage: [m for m in found if isinstance(m, nn.Module)] for stage, found in modules.items()
    }


class StageTimer:
    """Collect wall-clock times per batch.

    ``data`` is what passes before the backbone starts: waiting for the loader, and the model's own
    normalisation and batching. ``backbone`` and ``head`` are those modules, ``post`` is everything
    after the head (suppression, masks at the original size, encoding), ``total`` is all of it. The
    device is synchronised at every boundary, so that asynchronous work is charged to the stage that
    ordered it.

    Use::

        timer = StageTimer(device)
        with timer.attached(model):
            timer.start()
            for batch in loader:
                timer.loaded()
                model(batch)
                timer.finish(len(batch))
                ...                       # not measured
                timer.start()
    """

    def __init__(self, device: torch.device | str, warmup: int = 3) -> None:
        """Prepare an empty record.

        Args:
            device: where the model runs.
            warmup: batches at the beginning that are left out, as far as others follow.
        """
        self.device = torch.device(device)
        self.warmup = warmup
        self._rows: list[dict[str, float]] = []
        self._images: list[int] = []
        self._module_seconds: dict[str, float] = {}
        self._began = self._data_end = self._head_end = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> float:
        """Wait for the device and return the clock, in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[StageTimer]:
        """Hook into the stage modules of ``model`` for the time of the context."""
        handles = []
        try:
            for stage, modules in stage_modules(model).items():
                for module in modules:
                    handles += self._hook(stage, module)
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, stage: str, module: nn.Module) -> list[Any]:
        entered: list[float] = []

        def before(_module: nn.Module, _args: tuple) -> None:
            entered.append(self.now())
            if self._data_end is None:
                self._data_end = entered[-1]

        def after(_module: nn.Module, _args: tuple, _output: Any) -> None:
            left = self.now()
            self._module_seconds[stage] = (
                self._module_seconds.get(stage, 0.0) + left - entered.pop()
            )

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def start(self) -> None:
        """Begin a batch: the next thing is to wait for data."""
        self._module_seconds = {}
        self._data_end = None
        self._began = self.now()
        self._loaded = self._began

    def loaded(self) -> None:
        """Note that the batch has arrived."""
        self._loaded = self.now()

    def finish(self, images: int) -> None:
        """End a batch of ``images`` images."""
        end = self.now()
        backbone = self._module_seconds.get("backbone", 0.0)
        head = self._module_seconds.get("head", 0.0)
        data_end = self._loaded if self._data_end is None else self._data_end
        total = end - self._began
        row = {"data": data_end - self._began, "backbone": backbone, "head": head, "total": total}
        row["post"] = max(0.0, total - row["data"] - backbone - head)
        self._rows.append(row)
        self._images.append(images)

    def milliseconds(self, stage: str) -> list[float]:
        """Give the times of one stage by batch, warm-up left out as far as others follow."""
        skip = min(self.warmup, max(len(self._rows) - 1, 0))
        return [row[stage] * 1e3 for row in self._rows[skip:]]

    def summary(self) -> dict[str, Any]:
        """Summarise what was measured, as ``results.json`` holds it.

        Returns:
            ``median_ms`` and ``p95_ms`` by stage (per batch), ``images_per_s`` (images over
            wall-clock time, loading included, this process alone), ``peak_memory_mb`` (CUDA:
            allocated by torch; else resident size of the process), ``device``, ``threads``. NaN
            where nothing was measured.
        """
        columns = {stage: self.milliseconds(stage) for stage in STAGES}
        images = self._images[len(self._images) - len(columns["total"]) :]
        seconds = sum(columns["total"]) / 1e3
        return {
            "median_ms": {stage: _percentile(values, 50) for stage, values in columns.items()},
            "p95_ms": {stage: _percentile(values, 95) for stage, values in columns.items()},
            "images_per_s": sum(images) / seconds if seconds else float("nan"),
            "peak_memory_mb": self._peak_memory(),
            "device": _device_name(self.device),
            "threads": torch.get_num_threads(),
        }

    def _peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / _MIB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (_MIB if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
