"""What a run does before its model is built: logs, seed, stored config, dry-run settings."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from instseg_ext.checkpoint import atomic_write
from instseg_ext.engine.seeding import choose_seed

__all__ = ["DRY_RUN_IMAGES", "DRY_RUN_ITERATIONS", "apply_dry_run", "setup"]

DRY_RUN_ITERATIONS = 20
# Images per evaluation of a dry run.
DRY_RUN_IMAGES = 16

_LOGGERS = ("fvcore", "detectron2", "instseg_ext")


def setup(cfg: CfgNode, args: argparse.Namespace | None = None) -> None:
    """Set up logging, choose the seed, report the environment and store the config.

    Every process of a job calls it once, after the processes have found each other.

    Args:
        cfg: changed in place, frozen or not: a negative ``SEED`` is replaced by the one of the run
            that is resumed, or by a random one, so that the stored config repeats the run.
        args: the command line. ``resume`` says where the seed comes from; ``eval_only`` leaves
            cuDNN's benchmark mode off and the stored config alone.
    """
    resume = bool(getattr(args, "resume", False))
    eval_only = bool(getattr(args, "eval_only", False))
    folder, rank = cfg.OUTPUT_DIR, comm.get_rank()
    if comm.is_main_process():
        Path(folder).mkdir(parents=True, exist_ok=True)
    comm.synchronize()
    for name in _LOGGERS:
        setup_logger(folder, distributed_rank=rank, name=name)
    logger = logging.getLogger(__name__)
    logger.info("Process %d of %d.", rank, comm.get_world_size())
    if comm.is_main_process():
        # A page long: for bug reports, not for the screen.
        report = Path(folder) / "environment.txt"
        with atomic_write(report) as file:
            file.write(collect_env_info().encode())
        logger.info("Environment described in %s.", report)
        logger.info("Command line: %s", args)

    _settle_seed(cfg, Path(folder) / "config.yaml" if resume else None)
    seed_all_rng(cfg.SEED + rank)
    torch.backends.cudnn.benchmark = bool(cfg.CUDNN_BENCHMARK) and not eval_only
    if comm.is_main_process() and not eval_only:
        with atomic_write(Path(folder) / "config.yaml") as file:
            file.write(cfg.dump().encode())
        logger.info("Config stored in %s.", Path(folder) / "config.yaml")


def _settle_seed(cfg: CfgNode, stored: Path | None) -> None:
    """Write a concrete seed into ``cfg``, the same in all processes."""
    seed = cfg.SEED
    if seed < 0 and stored is not None and stored.is_file():
        seed = int((yaml.safe_load(stored.read_text()) or {}).get("SEED", -1))
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.SEED = choose_seed(seed)
    if frozen:
        cfg.freeze()


def apply_dry_run(cfg: CfgNode, typed_keys: Collection[str], world_size: int | None = None) -> None:
    """Shorten a run: 20 iterations of one image per process, one evaluation at the end.

    The learning rate is scaled down with the batch (linear rule). Evaluation is limited to
    ``DRY_RUN_IMAGES`` images by ``Trainer(eval_limit=...)``. What the user typed stays.

    Args:
        cfg: changed in place; not frozen.
        typed_keys: config keys given on the command line.
        world_size: processes of the job; None = those that have found each other already.
    """
    processes = world_size or comm.get_world_size()
    parts = cfg.INSTSEG.ACCUMULATE if "INSTSEG.ACCUMULATE" in typed_keys else 1
    batch = processes * parts
    iterations = DRY_RUN_ITERATIONS
    if "SOLVER.MAX_ITER" in typed_keys:
        iterations = cfg.SOLVER.MAX_ITER
    wanted = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": (),
        "SOLVER.WARMUP_ITERS": min(cfg.SOLVER.WARMUP_ITERS, iterations),
        "SOLVER.CHECKPOINT_PERIOD": 0,
        "SOLVER.IMS_PER_BATCH": batch,
        "INSTSEG.ACCUMULATE": parts,
        "TEST.EVAL_PERIOD": 0,
        "DATALOADER.NUM_WORKERS": min(cfg.DATALOADER.NUM_WORKERS, 2),
    }
    if "SOLVER.IMS_PER_BATCH" not in typed_keys and cfg.INSTSEG.SCALE_LR_BATCH == 0:
        # With SCALE_LR_BATCH the optimiser scales by itself.
        wanted["SOLVER.BASE_LR"] = cfg.SOLVER.BASE_LR * batch / cfg.SOLVER.IMS_PER_BATCH
        wanted["SOLVER.BASE_LR_END"] = cfg.SOLVER.BASE_LR_END * batch / cfg.SOLVER.IMS_PER_BATCH
    changes = [
        item for key, value in wanted.items() if key not in typed_keys for item in (key, value)
    ]
    cfg.merge_from_list(changes)
