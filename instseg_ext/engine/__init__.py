"""Training: trainer, hooks, process launch, set-up of a run."""

from instseg_ext.engine.alternating import train_alternating
from instseg_ext.engine.alternating_record import check_alternating
from instseg_ext.engine.defaults import DRY_RUN_IMAGES, DRY_RUN_ITERATIONS, apply_dry_run, setup
from instseg_ext.engine.distributed import create_ddp_model
from instseg_ext.engine.ema import ModelEma
from instseg_ext.engine.launch import launch
from instseg_ext.engine.optim import build_optimizer, effective_lr_report, effective_rate
from instseg_ext.engine.outputs import check_output_dir, check_resume
from instseg_ext.engine.proposing import import_proposals, propose_dataset
from instseg_ext.engine.standalone import check_weights, evaluate_checkpoint
from instseg_ext.engine.trainer import Trainer

__all__ = [
    "DRY_RUN_IMAGES",
    "DRY_RUN_ITERATIONS",
    "ModelEma",
    "Trainer",
    "apply_dry_run",
    "build_optimizer",
    "check_alternating",
    "check_output_dir",
    "check_resume",
    "check_weights",
    "create_ddp_model",
    "effective_lr_report",
    "effective_rate",
    "evaluate_checkpoint",
    "import_proposals",
    "launch",
    "propose_dataset",
    "setup",
    "train_alternating",
]
