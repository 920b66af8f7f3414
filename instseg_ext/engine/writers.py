"""Where training metrics go: console, metrics.json, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    TensorboardXWriter,
    get_event_storage,
)

from instseg_ext.checkpoint import atomic_write

__all__ = ["MetricsWriter", "WandbWriter", "build_writers", "require_wandb"]

WINDOW = 20


class MetricsWriter(EventWriter):
    """Writes one JSON object per iteration, never two for the same one.

    Differs from detectron2's ``JSONWriter`` in what a killed and resumed run needs: on opening,
    lines of iterations that will run again, and a half-written last line, are dropped; values that
    arrive after their iteration's line was written are merged into it; NaN is written as null.

    Args:
        path: appended to.
        start_iteration: first iteration of this run, counted from 0.
        window: iterations over which noisy values are median-smoothed, as in detectron2.
    """

    def __init__(self, path: str, start_iteration: int, window: int = WINDOW) -> None:
        self._window = window
        self._written: dict[str, int] = {}
        lines = _lines_before(Path(path), start_iteration)
        with atomic_write(path) as file:
            file.writelines(lines)
        # Unbuffered: a line reaches the file in one write, so a kill cannot halve it.
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  closed in close()
        self._last = json.loads(lines[-1]) if lines else {}
        self._offset = sum(map(len, lines[:-1]))
        self._end = sum(map(len, lines))

    def write(self) -> None:
        """Write the values that arrived since the last call."""
        fresh: dict[int, dict[str, Any]] = {}
        for key, (value, iteration) in (
            get_event_storage().latest_with_smoothing_hint(self._window).items()
        ):
            if iteration > self._written.get(key, -1):
                fresh.setdefault(iteration, {})[key] = value if math.isfinite(value) else None
                self._written[key] = iteration
        for iteration in sorted(fresh):
            self._put(iteration, fresh[iteration])

    def _put(self, iteration: int, values: dict[str, Any]) -> None:
        if self._last.get("iteration") == iteration:
            values = {**self._last, **values}
        else:
            self._offset = self._end
        self._last = {**values, "iteration": iteration}
        line = (json.dumps(self._last, sort_keys=True) + "\n").encode()
        self._file.seek(self._offset)
        self._file.write(line)
        self._file.truncate()
        self._end = self._offset + len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines_before(path: Path, iteration: int) -> list[bytes]:
    """Return the complete lines of iterations before ``iteration``."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and entry.get("iteration", -1) < iteration:
            kept.append(line)
    return kept


class WandbWriter(EventWriter):
    """Sends scalars to Weights & Biases.

    Args:
        project: name of the project there.
        run_id: the same for a run and its resumed rest.
        folder: where the client keeps its files.
        config: the run's config as a plain dict.
        window: iterations over which noisy values are median-smoothed.
    """

    def __init__(
        self, project: str, run_id: str, folder: str, config: dict[str, Any], window: int = WINDOW
    ) -> None:
        self._window = window
        self._last_write = -1
        self._run = require_wandb().init(
            project=project, id=run_id, dir=folder, config=config, resume="allow"
        )

    def write(self) -> None:
        """Send the values that arrived since the last call."""
        latest = get_event_storage().latest_with_smoothing_hint(self._window)
        fresh = {key: pair for key, pair in latest.items() if pair[1] > self._last_write}
        by_iteration: dict[int, dict[str, float]] = {}
        for key, (value, iteration) in fresh.items():
            by_iteration.setdefault(iteration, {})[key] = value
        for iteration in sorted(by_iteration):
            self._run.log(by_iteration[iteration], step=iteration)
            self._last_write = iteration

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def require_wandb() -> Any:
    """Import wandb.

    Raises:
        ImportError: with the remedy, if it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "INSTSEG.WANDB.ENABLED needs the package wandb: pip install 'instseg_ext[logging]', or "
            "set the key to False."
        ) from error
    return wandb


def build_writers(
    cfg: CfgNode, *, start_iteration: int, max_iteration: int, run_id: str
) -> tuple[list[EventWriter], list[EventWriter]]:
    """Build the writers of the main process.

    Args:
        cfg: full config.
        start_iteration: first iteration of this run; later entries of an earlier run are dropped
            from metrics.json and hidden in TensorBoard.
        max_iteration: where training ends, for the estimated time.
        run_id: identity of the run.

    Returns:
        Those for the console, and those for files and services.
    """
    folder = cfg.OUTPUT_DIR
    purge = {"purge_step": start_iteration} if start_iteration else {}
    files: list[EventWriter] = [
        MetricsWriter(str(Path(folder) / "metrics.json"), start_iteration),
        TensorboardXWriter(folder, WINDOW, **purge),
    ]
    if cfg.INSTSEG.WANDB.ENABLED:
        project = cfg.INSTSEG.WANDB.PROJECT or "instseg_ext"
        files.append(WandbWriter(project, run_id, folder, {"config": cfg.dump()}))
    return [CommonMetricPrinter(max_iteration, WINDOW)], files
