"""``train_net.py`` and ``instseg train``: train, evaluate, resume."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from instseg_ext.cli import common
from instseg_ext.cli.main import run_command

if TYPE_CHECKING:
    from collections.abc import Callable

    from detectron2.config import CfgNode

    from instseg_ext.method import Method

__all__ = [
    "add_parser",
    "add_training_arguments",
    "build_parser",
    "check_inputs",
    "is_first",
    "launch",
    "main",
    "prepare",
    "run",
]


def main(argv: list[str] | None = None) -> int:
    """Run as ``train_net.py``; returns the exit status."""
    return run_command(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of ``train_net.py``."""
    parser = argparse.ArgumentParser(prog="train_net.py", description="Train or evaluate a model.")
    _add_arguments(parser)
    return parser


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg train``."""
    _add_arguments(
        subparsers.add_parser("train", help="train or evaluate a model (the same as train_net.py)")
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop")
    parser.set_defaults(run=run)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command that trains understands."""
    common.add_config_arguments(parser, weights=False)
    add = parser.add_argument
    add("--train-json", metavar="FILE", help="your training annotations (COCO format)")
    add("--train-images", metavar="DIR", help="the folder of your training images")
    add("--val-json", metavar="FILE", help="your validation annotations (COCO format)")
    add("--val-images", metavar="DIR", help="the folder of your validation images")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add(
        "--overwrite",
        action="store_true",
        help="start anew in an OUTPUT_DIR that holds another run's checkpoints",
    )
    add(
        "--dry-run",
        action="store_true",
        help="20 iterations and one evaluation, to see that all works",
    )
    add(
        "--reset-classifier",
        action="store_true",
        help="re-initialise the classifier where the checkpoint has another number of classes",
    )
    add("--skip-check", action="store_true", help="do not check the annotations first")
    add(
        "--num-gpus",
        type=int,
        default=1,
        help="processes on this machine; without CUDA, CPU processes",
    )
    add("--num-machines", type=int, default=1)
    add("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    add(
        "--dist-url",
        default="auto",
        help="tcp://HOST:PORT of machine 0; needed with several machines",
    )


def run(args: argparse.Namespace) -> int:
    """Check what is cheap to check, then train or evaluate in as many processes as asked for."""
    from instseg_ext import engine

    cfg, _ = prepare(args)
    if is_first(args):
        if not args.eval_only:
            engine.check_output_dir(cfg.OUTPUT_DIR, args.resume, args.overwrite, cfg)
        check_inputs(cfg, args)
    launch(_worker, cfg, args)
    return 0


def is_first(args: argparse.Namespace) -> bool:
    """Tell whether this process checks for all: the first one of the first machine."""
    return os.environ.get("RANK", "0") == "0" and args.machine_rank == 0


def launch(
    worker: Callable[[argparse.Namespace], None], cfg: CfgNode, args: argparse.Namespace
) -> None:
    """Call ``worker(args)`` in as many processes as the command line asks for."""
    from instseg_ext import engine

    engine.launch(
        worker,
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device=cfg.MODEL.DEVICE,
        args=(args,),
    )


def prepare(args: argparse.Namespace) -> tuple[CfgNode, Method]:
    """Return the frozen config of a run: own data declared, classes counted, dry run applied.

    Raises:
        FileNotFoundError, KeyError, ValueError: one sentence naming what is wrong.
    """
    from instseg_ext import engine, zoo

    cfg, method, typed = common.typed_config_from_args(args)
    _declare_own_data(cfg, args)
    _follow_classes(cfg, method, typed, args.eval_only)
    if args.dry_run:
        engine.apply_dry_run(cfg, typed)
    cfg.freeze()
    return cfg, zoo.method_of(cfg)


def _declare_own_data(cfg: CfgNode, args: argparse.Namespace) -> None:
    from instseg_ext import data

    for split, key in (("train", "TRAIN"), ("val", "TEST")):
        json_file, images = getattr(args, f"{split}_json"), getattr(args, f"{split}_images")
        if bool(json_file) != bool(images):
            given, missing = ("json", "images") if json_file else ("images", "json")
            raise ValueError(f"--{split}-{given} needs --{split}-{missing} beside it.")
        if json_file:
            name = data.free_name(f"own_{split}", json_file, images)
            data.add_registrations(cfg, [{"NAME": name, "JSON": json_file, "IMAGES": images}])
            cfg.DATASETS[key] = (name,)
    data.register_from_config(cfg)
    if args.train_json and not args.val_json:
        # The configured test set has other classes: evaluating on it would be meaningless.
        cfg.DATASETS.TEST = ()


def _follow_classes(cfg: CfgNode, method: Method, typed: frozenset[str], eval_only: bool) -> None:
    """Take class names and counts from the data.

    They then travel in the dumped config and the checkpoint.
    """
    from instseg_ext import data, zoo
    from instseg_ext.data import foreign

    key = "TEST" if eval_only else "TRAIN"
    names = cfg.DATASETS[key]
    if not names:
        raise ValueError(f"DATASETS.{key} is empty; name a data set or give your own files.")
    for name in (*names, *cfg.DATASETS.TEST):
        foreign.require_packages(name)
    classes = data.dataset_classes(names[0])
    for other in (*names[1:], *(() if eval_only else cfg.DATASETS.TEST)):
        other_classes = data.dataset_classes(other)
        if other_classes != classes:
            raise ValueError(
                f"Data sets {names[0]} and {other} must have the same classes, but have "
                f"{len(classes)} ({_shorten(classes)}) and {len(other_classes)} "
                f"({_shorten(other_classes)})."
            )
    cfg.INSTSEG.CLASS_NAMES = list(classes)
    changed = zoo.set_class_count(cfg, len(classes), typed)
    if changed:
        sys.stderr.write(
            f"{', '.join(changed)} = {len(classes)}, the number of classes of {names[0]}\n"
        )


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def check_inputs(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Check that weights and data are there and, unless told not to, what the data hold.

    Raises:
        FileNotFoundError, ImportError, KeyError, ValueError: one sentence naming what is wrong.
    """
    from instseg_ext import data, engine
    from instseg_ext.data import foreign

    train_sets = () if args.eval_only else cfg.DATASETS.TRAIN
    names = dict.fromkeys((*train_sets, *cfg.DATASETS.TEST))
    for name in names:
        data.require_source(name)  # of every set, before the first takes its time
    for name in names:
        data.ensure_files(name)
        foreign.require_files(name)
    engine.check_weights(cfg, resume=args.resume)
    if args.skip_check:
        return
    for name in names:
        data.cheap_check(name, training=name in train_sets)


def _worker(args: argparse.Namespace) -> None:
    """Train or evaluate in one process.

    The config is made anew because a spawned process starts without registrations.
    """
    from instseg_ext import engine

    cfg, method = prepare(args)
    engine.setup(cfg, args)
    limit = engine.DRY_RUN_IMAGES if args.dry_run else None
    if args.eval_only:
        engine.evaluate_checkpoint(
            cfg, method, limit=limit, reset_classifier=args.reset_classifier, unsafe=args.unsafe
        )
        return
    trainer = engine.Trainer(cfg, method, eval_limit=limit, unsafe=args.unsafe)
    trainer.resume_or_load(resume=args.resume, reset_classifier=args.reset_classifier)
    trainer.train()
