"""Hooks of the trainer: checkpoints, evaluation with best weights and early stop, metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from instseg_ext.engine.best import BestTracker, flatten_results, select_metric
from instseg_ext.engine.outputs import periodic_checkpoints
from instseg_ext.engine.writers import MetricsWriter, build_writers

__all__ = ["CheckpointHook", "EvaluationHook", "PeakMemoryHook", "WritersHook"]

logger = logging.getLogger(__name__)


class CheckpointHook(HookBase):
    """Saves every ``period`` iterations, and ``model_final`` after the last one.

    It runs before the evaluation of the same iteration, so that a failing evaluation costs no
    training; what the evaluation decides is added by ``refresh``.

    Args:
        period: iterations; <= 0 saves at the end only.
        keep: periodic checkpoints kept, 0 = all.
        before_save: called before each save.
    """

    def __init__(self, period: int, keep: int, before_save: Callable[[], None]) -> None:
        if keep < 0:
            raise ValueError(f"INSTSEG.KEEP_CHECKPOINTS must not be negative, but is {keep}.")
        self._period = period
        self._keep = keep
        self._before_save = before_save
        self._saved: tuple[int, str] | None = None

    def after_step(self) -> None:
        """Save if it is time."""
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.save("model_final")
        elif self._period > 0 and done % self._period == 0:
            self.save(f"model_{self.trainer.iter:07d}")
            self._prune()

    def save(self, name: str) -> None:
        """Save the complete state under ``name`` and resume from there."""
        self._before_save()
        self.trainer.checkpointer.save(name, iteration=self.trainer.iter)
        self._saved = (self.trainer.iter, name)

    def refresh(self) -> None:
        """Save again what was saved in this iteration, after the state has changed."""
        if self._saved is not None and self._saved[0] == self.trainer.iter:
            self.save(self._saved[1])

    def _prune(self) -> None:
        if not self._keep or not comm.is_main_process():
            return
        for path in periodic_checkpoints(self.trainer.checkpointer.save_dir)[: -self._keep]:
            logger.info("Deleting %s (INSTSEG.KEEP_CHECKPOINTS %d).", path.name, self._keep)
            path.unlink(missing_ok=True)


class EvaluationHook(HookBase):
    """Evaluates periodically and at the end, keeps the best weights, stops when nothing improves.

    The evaluation of an iteration that was due when a run was killed is made up for when it
    resumes.

    Args:
        period: iterations; 0 evaluates at the end only.
        evaluate: takes the number of completed iterations; returns data set -> task -> metric ->
            value in the main process, anything in the others.
        metric: what "best" means (higher is better), see ``select_metric``; "" = do not care.
        patience: evaluations without improvement before stopping, 0 = never.
        checkpoints: the hook that saves; it must be registered before this one.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[int], Mapping[str, Any]],
        *,
        metric: str,
        patience: int,
        checkpoints: CheckpointHook,
    ) -> None:
        if patience and not metric:
            raise ValueError(
                "INSTSEG.BEST.PATIENCE stops training by a metric: set INSTSEG.BEST.METRIC, such "
                "as segm/AP."
            )
        self._period = period
        self._evaluate = evaluate
        self._metric = metric
        self._checkpoints = checkpoints
        self.best = BestTracker(patience)

    def before_train(self) -> None:
        """Make up for an evaluation that the killed run did not finish."""
        done = self.trainer.start_iter
        if (
            done
            and self._due(done)
            and self.trainer.evaluated != done
            and not self.trainer.stop_reason
        ):
            self.trainer.iter = self.trainer.storage.iter = done - 1
            self._run(done)
            self.trainer.iter = self.trainer.storage.iter = done

    def after_step(self) -> None:
        """Evaluate if it is time."""
        if self._due(self.trainer.iter + 1):
            self._run(self.trainer.iter + 1)

    def _due(self, done: int) -> bool:
        return done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0)

    def _run(self, done: int) -> None:
        results = self._evaluate(done)
        # Only the main process has results; all must come to the same decision.
        results = comm.all_gather(results if comm.is_main_process() else None)[0] or {}
        self.trainer.evaluated = done
        self.trainer.results = results
        self.trainer.storage.put_scalars(**flatten_results(results), smoothing_hint=False)
        if self._metric and results:
            self._compare(select_metric(results, self._metric), done)
        self._checkpoints.refresh()

    def _compare(self, value: float, done: int) -> None:
        best = self.best
        if best.update(value, done):
            self.trainer.checkpointer.save_weights(
                "model_best", iteration=done - 1, metric=self._metric, value=value
            )
            logger.info("Best %s so far: %.4f; saved model_best.pth.", self._metric, value)
            return
        logger.info(
            "%s is %.4f; the best is %.4f, after %d iterations.",
            self._metric,
            value,
            best.value,
            best.iteration,
        )
        if best.exhausted and done < self.trainer.max_iter:
            self.trainer.stop_reason = (
                f"{self._metric} has not risen above {best.value:.4f} in {best.waited} evaluations"
            )
            self._checkpoints.save("model_final")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"best": self.best.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.best.load_state_dict(state["best"])


class WritersHook(HookBase):
    """Opens the writers of the main process and calls them periodically and after evaluations.

    It is registered last, so that what other hooks measure is written in the same iteration.

    Args:
        cfg: full config.
        period: iterations between two writes.
    """

    def __init__(self, cfg: CfgNode, period: int) -> None:
        self._cfg = cfg
        self._period = period
        self._console: list[EventWriter] = []
        self._files: list[EventWriter] = []

    def before_train(self) -> None:
        """Open the files; entries of iterations that will run again are dropped."""
        if not comm.is_main_process():
            return
        self._console, self._files = build_writers(
            self._cfg,
            start_iteration=self.trainer.start_iter,
            max_iteration=self.trainer.max_iter,
            run_id=self.trainer.run_id,
        )
        # An evaluation made up for by an earlier hook.
        self._write(self._files)

    def after_step(self) -> None:
        """Write if it is time."""
        if self._due():
            self._write(self._console)
            self._write(self._files)
        elif self.trainer.evaluated == self.trainer.iter + 1:
            self._write(self._files)

    def flush(self) -> None:
        """Write to metrics.json, if this iteration's line is due, before a checkpoint is saved.

        A run that is killed right after saving, and resumes there, has all lines up to it then.
        """
        if self._due():
            self._write([w for w in self._files if isinstance(w, MetricsWriter)])

    def after_train(self) -> None:
        """Write what is left and close."""
        self._write(self._console)
        self._write(self._files)
        for writer in [*self._console, *self._files]:
            writer.close()

    def _due(self) -> bool:
        done = self.trainer.iter + 1
        return done % self._period == 0 or done == self.trainer.max_iter

    @staticmethod
    def _write(writers: list[EventWriter]) -> None:
        for writer in writers:
            writer.write()


class PeakMemoryHook(HookBase):
    """Puts the peak memory of the CUDA device, in MiB, beside the other metrics."""

    def __init__(self, period: int) -> None:
        self._period = period

    def after_step(self) -> None:
        """Measure if it is time."""
        if torch.cuda.is_available() and (self.trainer.iter + 1) % self._period == 0:
            peak = torch.cuda.max_memory_allocated() / 2**20
            self.trainer.storage.put_scalar("peak_memory_mb", peak, smoothing_hint=False)
