"""The best evaluation so far, and when to stop looking for a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["BestTracker", "flatten_results", "select_metric"]


class BestTracker:
    """Remembers the highest value of a metric and counts evaluations without a higher one.

    NaN is worse than any number.

    Args:
        patience: evaluations without improvement after which to stop; 0 = never.

    Attributes:
        value: best value so far, -inf before the first.
        iteration: completed iterations at the best value, -1 before the first.
        waited: evaluations since then.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.value = -math.inf
        self.iteration = -1
        self.waited = 0

    def update(self, value: float, iteration: int) -> bool:
        """Take in one evaluation; return whether it is the best so far."""
        if not math.isnan(value) and value > self.value:
            self.value, self.iteration, self.waited = value, iteration, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.waited

    def state_dict(self) -> dict[str, Any]:
        """Return the state to store in a checkpoint."""
        return {"value": self.value, "iteration": self.iteration, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; the patience is the config's."""
        self.value = float(state["value"])
        self.iteration = int(state["iteration"])
        self.waited = int(state["waited"])


def flatten_results(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Name each metric ``task/metric``, with the data set's name in front if there are several.

    Args:
        results: data set -> task -> metric -> value, as evaluation returns it.
    """
    several = len(results) > 1
    return {
        f"{dataset}/{task}/{metric}" if several else f"{task}/{metric}": float(value)
        for dataset, tasks in results.items()
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
    }


def select_metric(results: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> float:
    """Return one metric by name.

    Args:
        results: see ``flatten_results``.
        name: ``task/metric`` of the first data set, or ``dataset/task/metric``.

    Raises:
        ValueError: if there is none of that name; the message lists those there are.
    """
    known: dict[str, float] = {}
    for dataset, tasks in results.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                known.setdefault(f"{task}/{metric}", float(value))
                known[f"{dataset}/{task}/{metric}"] = float(value)
    if name not in known:
        short = [key for key in known if key.count("/") == 1] or sorted(known)
        raise ValueError(
            f"INSTSEG.BEST.METRIC {name!r} is not among the results: {', '.join(short) or 'none'}."
        )
    return known[name]
