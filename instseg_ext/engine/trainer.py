"""The trainer, assembled from detectron2's parts.

It does not derive from ``DefaultTrainer``: that one wraps models for CUDA only, knows fp16 only,
neither accumulates gradients nor averages weights, and does not resume exactly.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase
from detectron2.engine import hooks as d2_hooks
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

import instseg_ext
from instseg_ext import compat, data
from instseg_ext.checkpoint import InstSegCheckpointer
from instseg_ext.config import resolve_precision
from instseg_ext.engine import hooks, optim
from instseg_ext.engine.distributed import create_ddp_model, unwrap
from instseg_ext.engine.ema import EmaHook, ModelEma
from instseg_ext.engine.losses import StepLosses
from instseg_ext.engine.outputs import last_checkpoint
from instseg_ext.engine.pictures import PicturesHook
from instseg_ext.engine.seeding import choose_seed, seed_step
from instseg_ext.engine.standalone import check_weights, class_count
from instseg_ext.engine.writers import require_wandb
from instseg_ext.evaluation import evaluate
from instseg_ext.method import Method

__all__ = ["WRITE_PERIOD", "Trainer"]

logger = logging.getLogger(__name__)

# Iterations between two lines on the console and in metrics.json, as in detectron2.
WRITE_PERIOD = 20
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer(TrainerBase):
    """Trains the model of a config.

    One iteration takes ``SOLVER.IMS_PER_BATCH`` images: each process ``INSTSEG.ACCUMULATE``
    micro-batches. The random numbers of an iteration depend on (seed, iteration, process) alone,
    those of the loader on (seed, position in its stream), and the checkpoint holds everything else:
    a run that is killed and resumed ends, on a CPU, with the bits of an uninterrupted one.

    Args:
        cfg: full config; copied.
        method: record of the configured method.
        eval_limit: images per evaluation, for dry runs; None = all.
        train_limit: use only the first images of the training set; None = all.
        unsafe: see ``InstSegCheckpointer``.

    Attributes:
        cfg: the copy, with the seed in use.
        model: possibly wrapped by DDP.
        ema: averaged weights, or None.
        results: of the last evaluation, data set -> task -> metric -> value; empty before it.
        evaluated: completed iterations at the last evaluation.
        stop_reason: why training stopped early; "" if it did not.
        seed: the seed in use.
        last_batch: the latest micro-batch.

    Raises:
        ValueError: if a setting is impossible; the message names the key.
        ImportError: if a writer is asked for whose package is missing.
    """

    def __init__(
        self,
        cfg: CfgNode,
        method: Method,
        *,
        eval_limit: int | None = None,
        train_limit: int | None = None,
        unsafe: bool = False,
    ) -> None:
        super().__init__()
        _check_settings(cfg)
        self.cfg = cfg.clone()
        self.method = method
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.results: Mapping[str, Any] = {}
        self.evaluated = 0
        self.stop_reason = ""
        self.last_batch: list[dict] = []
        self.run_id = uuid.uuid4().hex
        self._eval_limit, self._train_limit = eval_limit, train_limit
        self._set_seed(choose_seed(cfg.SEED))

        # Random initial weights follow from the seed, too, whatever was drawn before.
        seed_step(self.seed, 0, rank=0)
        model = self.build_model()
        self.optimizer = optim.build_optimizer(self.cfg, model)
        self.scheduler = optim.build_scheduler(self.cfg, self.optimizer)
        logger.info("%s", optim.effective_lr_report(self.cfg, model))
        optim.warn_tiny_batch_norm(self.cfg, model)
        self._precision = resolve_precision(self.cfg)
        self._device_type = next(model.parameters()).device.type
        self.grad_scaler = compat.grad_scaler(self._device_type, self._precision == "fp16")
        self.model = create_ddp_model(model)
        # After DDP has given all processes the weights of the first.
        average = self.cfg.INSTSEG.EMA
        self.ema = ModelEma(model, average.DECAY, average.WARMUP) if average.ENABLED else None
        self.checkpointer = InstSegCheckpointer(
            model,
            self.cfg.OUTPUT_DIR,
            metadata=self._metadata(),
            averaged=self.ema,
            num_classes=class_count(self.cfg, method),
            unsafe=unsafe,
            **self._checkpointables(),
        )
        self.register_hooks(self._build_hooks())

    # --- set-up ----------------------------------------------------------------------------------

    def _checkpointables(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"trainer": self, "optimizer": self.optimizer}
        if self.ema is not None:
            parts["ema"] = self.ema
        if self.grad_scaler.is_enabled():
            parts["grad_scaler"] = self.grad_scaler
        return parts

    def _build_hooks(self) -> list[HookBase | None]:
        """Return the hooks in the order in which they act on a step.

        The rate and the average come first, because a checkpoint must hold them as the next
        iteration needs them.
        """
        node = self.cfg.INSTSEG
        write = hooks.WritersHook(self.cfg, WRITE_PERIOD)
        checkpoints = hooks.CheckpointHook(
            self.cfg.SOLVER.CHECKPOINT_PERIOD, node.KEEP_CHECKPOINTS, write.flush
        )
        return [
            d2_hooks.IterationTimer(),
            d2_hooks.LRScheduler(),
            EmaHook(self.ema) if self.ema is not None else None,
            PicturesHook(self.cfg.VIS_PERIOD, self.cfg.INPUT.FORMAT, node.CLASS_NAMES),
            hooks.PeakMemoryHook(WRITE_PERIOD),
            checkpoints,
            hooks.EvaluationHook(
                self.cfg.TEST.EVAL_PERIOD,
                self._evaluate,
                metric=node.BEST.METRIC,
                patience=node.BEST.PATIENCE,
                checkpoints=checkpoints,
            ),
            write,
        ]

    def _set_seed(self, seed: int) -> None:
        self.seed = seed
        frozen = self.cfg.is_frozen()
        self.cfg.defrost()
        self.cfg.SEED = seed
        if frozen:
            self.cfg.freeze()

    def _metadata(self) -> dict[str, Any]:
        return {
            "version": instseg_ext.__version__,
            "class_names": list(self.cfg.INSTSEG.CLASS_NAMES),
            "datasets": [dict(entry) for entry in self.cfg.INSTSEG.DATASETS],
            "config": self.cfg.dump(),
        }

    def build_model(self) -> nn.Module:
        """Build the model, in training mode; a subclass may train a part of it."""
        return build_model(self.cfg).train()

    def build_train_loader(self) -> Iterable[list[dict]]:
        """Build the loader of micro-batches, starting at ``start_iter``."""
        build = self.method.build_mapper or data.build_mapper
        return data.build_train_loader(
            self.cfg,
            build(self.cfg, True),
            start_iteration=self.start_iter,
            seed=self.seed,
            limit=self._train_limit,
            build_source=self.method.build_source,
        )

    # --- state -----------------------------------------------------------------------------------

    def resume_or_load(self, resume: bool = True, *, reset_classifier: bool = False) -> None:
        """Load ``MODEL.WEIGHTS``, or go on from the last checkpoint in ``OUTPUT_DIR``.

        Args:
            resume: look for a checkpoint; without one, start from ``MODEL.WEIGHTS``.
            reset_classifier: see ``InstSegCheckpointer``.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it does not fit the model or belongs to another one.
        """
        check_weights(self.cfg, resume)
        last = last_checkpoint(self.cfg.OUTPUT_DIR) if resume else None
        self.checkpointer.reset_classifier = reset_classifier
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=last is not None)
        if last is not None:
            self.start_iter = self.iter + 1
            logger.info("Going on after %d iterations from %s.", self.start_iter, last)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of loop and hooks (the learning rate's among them)."""
        return {
            **super().state_dict(),
            "seed": self.seed,
            "run_id": self.run_id,
            "stop_reason": self.stop_reason,
            "evaluated": self.evaluated,
            "results": self.results,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict)
        if state_dict["seed"] != self.seed:
            logger.info("Going on with the seed of the checkpoint, %d.", state_dict["seed"])
            self._set_seed(int(state_dict["seed"]))
            self.checkpointer.metadata = self._metadata()
        self.run_id = state_dict["run_id"]
        self.stop_reason = state_dict["stop_reason"]
        self.evaluated = int(state_dict["evaluated"])
        self.results = state_dict["results"]

    # --- training --------------------------------------------------------------------------------

    def train(self) -> Mapping[str, Any]:
        """Train from ``start_iter`` to ``SOLVER.MAX_ITER``, or until early stop.

        Returns:
            Results of the last evaluation, in the main process.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        if self.stop_reason:
            logger.info("Nothing to do: training had stopped early, %s.", self.stop_reason)
            return self.results
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage:
            try:
                self.before_train()
                self._loop()
            finally:
                self._batches = None  # ends the loader's workers
                self.after_train()
        return self.results

    def _loop(self) -> None:
        if self.start_iter >= self.max_iter or self.stop_reason:
            logger.info("Nothing to train: %d iterations are done.", self.start_iter)
            return
        self._batches: Iterator[list[dict]] | None = iter(self.build_train_loader())
        for iteration in range(self.start_iter, self.max_iter):
            self.iter = iteration
            self.before_step()
            self.run_step()
            self.after_step()
            if self.stop_reason:
                done = self.iter + 1
                logger.info("Stopping early after %d iterations: %s.", done, self.stop_reason)
                break
        self.iter += 1

    def run_step(self) -> None:
        """Run one iteration: all micro-batches, then one optimiser step."""
        seed_step(self.seed, self.iter, comm.get_rank())
        self.optimizer.zero_grad(set_to_none=True)
        losses = StepLosses()
        parts = self.cfg.INSTSEG.ACCUMULATE
        data_time = 0.0
        for part in range(parts):
            start = time.perf_counter()
            batch = self.last_batch = next(self._batches)
            data_time += time.perf_counter() - start
            with self._gradients_stay_local(part < parts - 1):
                with self._forward_precision():
                    terms = self.model(batch)
                total = losses.add(terms, batch)
                self.grad_scaler.scale(total / parts).backward()
        self.after_backward()
        # Before the step: a non-finite loss must not reach the weights.
        means = losses.means(self.iter)
        self.storage.put_scalars(total_loss=sum(means.values()), **means, data_time=data_time)
        self._clip_gradients()
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _gradients_stay_local(self, local: bool) -> AbstractContextManager:
        """Return a context in which DDP does not exchange gradients, if ``local``."""
        is_wrapped = unwrap(self.model) is not self.model
        return self.model.no_sync() if local and is_wrapped else contextlib.nullcontext()

    def _forward_precision(self) -> AbstractContextManager:
        """Return the autocast context for models that do not open their own in ``forward``."""
        if self._precision == "fp32" or hasattr(unwrap(self.model), "precision"):
            return contextlib.nullcontext()
        return compat.autocast(self._device_type, _DTYPES[self._precision])

    def _clip_gradients(self) -> None:
        limit = self.cfg.INSTSEG.CLIP_GRAD_NORM
        if limit <= 0:
            return
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if (self.iter + 1) % WRITE_PERIOD == 0:  # reading it synchronises the device
            self.storage.put_scalar("grad_norm", norm.item(), smoothing_hint=False)

    # --- evaluation ------------------------------------------------------------------------------

    def _evaluate(self, iteration: int) -> Mapping[str, Any]:
        """Evaluate the averaged weights if there are any, else the trained ones."""
        weights = contextlib.nullcontext() if self.ema is None else self.ema.applied()
        model = unwrap(self.model)
        with weights:
            results = self.test(
                self.cfg, model, self.method, limit=self._eval_limit, iteration=iteration
            )
        model.train()
        comm.synchronize()
        return results

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        method: Method,
        *,
        limit: int | None = None,
        iteration: int | None = None,
    ) -> Mapping[str, Any]:
        """Evaluate ``model`` on ``DATASETS.TEST``.

        Args:
            cfg: full config.
            model: not wrapped by DDP, with its weights loaded.
            method: record of the configured method.
            limit: images per data set; None = all.
            iteration: completed training iterations, for the names of result files.

        Returns:
            Data set -> task -> metric -> value in the main process; empty without test sets.
        """
        if not cfg.DATASETS.TEST:
            logger.info("DATASETS.TEST is empty: nothing is evaluated.")
            return {}
        return evaluate(
            cfg, model, method, limit=limit, output_dir=cfg.OUTPUT_DIR, iteration=iteration
        )


def _check_settings(cfg: CfgNode) -> None:
    """Raise on settings that would fail, or be ignored, only after hours.

    Raises:
        FileNotFoundError: if a file of proposals does not exist.
        ValueError: naming the key.
        ImportError: if wandb is asked for and missing.
    """
    if cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER must be at least 1, not {cfg.SOLVER.MAX_ITER}.")
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            "TEST.PRECISE_BN.ENABLED is not supported by this trainer: set it to False and use "
            "SyncBN, GN or FrozenBN."
        )
    if cfg.INSTSEG.BEST.METRIC and not cfg.DATASETS.TEST:
        raise ValueError("INSTSEG.BEST.METRIC needs a test set: name one in DATASETS.TEST.")
    for split in ("TRAIN", "TEST"):
        data.check_proposal_files(cfg, split)
    if cfg.INSTSEG.WANDB.ENABLED and comm.is_main_process():
        require_wandb()
