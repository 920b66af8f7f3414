"""``instseg models``: list the configs one can train."""

from __future__ import annotations

import argparse
import sys

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg models``."""
    parser = subparsers.add_parser("models", help="list the configs")
    parser.add_argument("pattern", nargs="?", default="", help="show only names that contain this")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write one line per config: name, architecture, number of classes, input, schedule."""
    from tabulate import tabulate

    from instseg_ext import zoo
    from instseg_ext.config import config_names

    names = [name for name in config_names() if args.pattern.lower() in name.lower()]
    if not names:
        raise ValueError(f"No config name contains {args.pattern!r}.")
    rows = []
    for name in names:
        cfg = zoo.get_config(name)
        size = (
            "x".join(map(str, cfg.INSTSEG.STRETCH))
            if any(cfg.INSTSEG.STRETCH)
            else str(cfg.INPUT.MIN_SIZE_TEST)
        )
        rows.append(
            (
                name,
                zoo.method_of(cfg).name,
                zoo.class_count(cfg),
                size,
                cfg.SOLVER.IMS_PER_BATCH,
                cfg.SOLVER.MAX_ITER,
                ", ".join(cfg.DATASETS.TRAIN),
            )
        )
    headers = ("config", "method", "classes", "test size", "batch", "iterations", "training set")
    sys.stdout.write(tabulate(rows, headers=headers) + "\n")
    return 0
