"""``instseg train-alternating``: RPN and detector in turn, in four historical steps."""

from __future__ import annotations

import argparse

from instseg_ext.cli import train

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg train-alternating``."""
    parser = subparsers.add_parser(
        "train-alternating",
        help="train RPN and detector of a two-stage model in turn (historical)",
        description="Train a two-stage model in the four steps of Faster R-CNN's first paper. "
        "--resume leaves out finished steps and goes on inside the interrupted one.",
    )
    train.add_training_arguments(parser)
    parser.add_argument(
        "--iterations",
        type=int,
        nargs=4,
        metavar=("RPN", "DETECTOR", "RPN", "DETECTOR"),
        help="of each step; default: SOLVER.MAX_ITER for each",
    )
    parser.set_defaults(run=run, eval_only=False)


def run(args: argparse.Namespace) -> int:
    """Check what is cheap to check, then train in as many processes as asked for."""
    from instseg_ext import engine

    cfg, _ = train.prepare(args)
    if train.is_first(args):
        engine.check_alternating(cfg, args.iterations, resume=args.resume, overwrite=args.overwrite)
        train.check_inputs(cfg, args)
    train.launch(_worker, cfg, args)
    return 0


def _worker(args: argparse.Namespace) -> None:
    """Train in one process."""
    from instseg_ext import engine

    cfg, method = train.prepare(args)
    engine.setup(cfg, args)
    engine.train_alternating(
        cfg,
        method,
        args.iterations,
        resume=args.resume,
        reset_classifier=args.reset_classifier,
        limit=engine.DRY_RUN_IMAGES if args.dry_run else None,
        unsafe=args.unsafe,
    )
