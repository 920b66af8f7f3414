"""Result files and tables of an evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

__all__ = [
    "archive_results",
    "class_table",
    "metric_table",
    "null_for_nan",
    "speed_table",
    "write_json",
]

RESULTS_NAME = "results.json"
# Of each class. Evaluators of label maps give further metrics of each, which are in the file only.
_CLASS_PREFIXES = ("AP-", "IoU-")


def null_for_nan(value: Any) -> Any:
    """Copy nested data with plain Python numbers; NaN and infinities become ``None``."""
    if isinstance(value, Mapping):
        return {str(key): null_for_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_for_nan(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any, *, indent: int | None = None) -> None:
    """Write a JSON file so that readers see the old or the new content, never a part.

    Args:
        path: target; missing folders are made.
        value: what to write; NaN is refused.
        indent: spaces per level; ``None`` writes one line.

    Raises:
        ValueError: if ``value`` holds NaN or an infinity, which JSON does not know.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=indent, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def archive_results(output_dir: str | Path) -> Path | None:
    """Move an earlier ``results.json`` to ``results/<iteration>.json``, ``eval`` if it has none.

    Returns:
        The new place, or ``None`` when there was nothing to move. An occupied name gets a number.
    """
    current = Path(output_dir) / RESULTS_NAME
    if not current.is_file():
        return None
    try:
        iteration = json.loads(current.read_text(encoding="utf-8")).get("iteration")
    except (json.JSONDecodeError, AttributeError):
        iteration = None
    stem = "eval" if iteration is None else str(iteration)
    folder = Path(output_dir) / "results"
    folder.mkdir(exist_ok=True)
    target, number = folder / f"{stem}.json", 1
    while target.exists():
        number += 1
        target = folder / f"{stem}_{number}.json"
    os.replace(current, target)
    return target


def _cell(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def metric_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Lay out one row per task and one column per metric, without the per-class values.

    Tasks that have no metric in common with those before get a table of their own below.
    """
    tables: list[dict[str, dict[str, float]]] = []
    for task, metrics in scores.items():
        plain = {name: value for name, value in metrics.items() if "-" not in name}
        if not tables or not any(plain.keys() & other for other in tables[-1].values()):
            tables.append({})
        tables[-1][task] = plain
    return "\n\n".join(_metric_table(table) for table in tables)


def _metric_table(table: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(name for metrics in table.values() for name in metrics))
    rows = [
        [task, *(_cell(metrics.get(name)) for name in columns)] for task, metrics in table.items()
    ]
    return tabulate(rows, headers=["task", *columns], tablefmt="github", disable_numparse=True)


def class_table(scores: Mapping[str, Mapping[str, float]], columns: int = 3) -> str:
    """Lay out AP or IoU by class, one value per task, ``columns`` classes side by side.

    It may be empty.
    """
    by_task = {
        task: {k.partition("-")[2]: v for k, v in metrics.items() if k.startswith(_CLASS_PREFIXES)}
        for task, metrics in scores.items()
    }
    tasks = [task for task, values in by_task.items() if values]
    names = list(dict.fromkeys(name for task in tasks for name in by_task[task]))
    if not names:
        return ""
    cells = [[name, *(_cell(by_task[task].get(name)) for task in tasks)] for name in names]
    columns = min(columns, len(cells))
    depth = math.ceil(len(cells) / columns)
    blank = [""] * (len(tasks) + 1)
    rows = [
        [
            text
            for c in range(columns)
            for text in (cells[r + c * depth] if r + c * depth < len(cells) else blank)
        ]
        for r in range(depth)
    ]
    return tabulate(
        rows, headers=["class", *tasks] * columns, tablefmt="github", disable_numparse=True
    )


def speed_table(speed: Mapping[str, Any], stages: Sequence[str]) -> str:
    """Lay out milliseconds by stage, with throughput and memory below."""
    rows = [
        [label, *(_cell(speed[key][stage]) for stage in stages)]
        for label, key in (("median ms", "median_ms"), ("p95 ms", "p95_ms"))
    ]
    table = tabulate(rows, headers=["", *stages], tablefmt="github", disable_numparse=True)
    return (
        f"{table}\n{_cell(speed['images_per_s'])} images/s, peak memory "
        f"{_cell(speed['peak_memory_mb'])} MB, "
        f"{speed['device']}, {speed['threads']} threads"
    )
