"""``instseg benchmark``: how fast a model is, by stage and against its own network."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instseg_ext.cli import common

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from instseg_ext.engine.predictor import Predictor

__all__ = ["add_parser", "run"]

logger = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg benchmark``."""
    parser = subparsers.add_parser("benchmark", help="speed of a model, by stage")
    common.add_config_arguments(parser)
    add = parser.add_argument
    add("--input", metavar="FILE", help="a picture to run on, instead of noise")
    add(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="size of the noise in pixels (default: the size the config tests at)",
    )
    add("--batch", type=int, default=1, help="images per forward pass (default 1)")
    add("--repeat", type=int, default=20, help="timed runs (default 20)")
    add("--warmup", type=int, default=3, help="runs before them (default 3)")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    add("--no-floor", action="store_true", help="leave out the network alone")
    add("--output", metavar="FILE", help="write the figures as JSON")
    add("--overwrite", action="store_true", help="replace that file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    import torch
    from detectron2.utils.logger import setup_logger

    from instseg_ext.engine.predictor import Predictor
    from instseg_ext.evaluation import STAGES, report, write_json
    from instseg_ext.evaluation.benchmark import measure_speed

    setup_logger(name="instseg_ext")
    _check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    cfg, method = common.config_from_args(args)
    predictor = Predictor(cfg, method, unsafe=args.unsafe)
    figures = measure_speed(
        predictor.model,
        _batch(args, cfg, predictor),
        repeat=args.repeat,
        warmup=args.warmup,
        floor=not args.no_floor,
    )
    figures |= {
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS,
        "precision": cfg.INSTSEG.PRECISION,
        "memory_format": cfg.INSTSEG.MEMORY_FORMAT,
    }
    logger.info(
        "Batch of %d, %s x %s, %.1f M parameters, %s, %s, %.1f detections per image:\n%s",
        figures["batch"],
        *figures["input_hw"],
        figures["parameters"] / 1e6,
        figures["precision"],
        figures["memory_format"],
        figures["detections"],
        report.speed_table(figures, STAGES),
    )
    if "floor_ms" in figures:
        logger.info(
            "End to end %.1f ms (best %.1f), network alone %.1f ms (best %.1f): ratio %.2f.",
            figures["median_ms"]["total"],
            figures["best_ms"],
            figures["floor_ms"]["median"],
            figures["floor_ms"]["best"],
            figures["ratio_to_floor"],
        )
    if args.output:
        write_json(args.output, report.null_for_nan(figures), indent=2)
    return 0


def _check(args: argparse.Namespace) -> None:
    for flag, least in (("batch", 1), ("repeat", 1), ("warmup", 0), ("threads", 0)):
        if getattr(args, flag) < least:
            raise ValueError(f"--{flag} must be at least {least}, not {getattr(args, flag)}.")
    if args.size and min(args.size) < 1:
        raise ValueError(f"--size must be positive, not {args.size[0]} {args.size[1]}.")
    if args.output and Path(args.output).exists() and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; choose another --output or --overwrite.")


def _batch(args: argparse.Namespace, cfg: CfgNode, predictor: Predictor) -> list[dict[str, Any]]:
    from instseg_ext.engine.media import read_picture
    from instseg_ext.evaluation.benchmark import synthetic_batch

    if args.input:
        image = predictor.to_input(read_picture(args.input))
        return [dict(image) for _ in range(args.batch)]
    return synthetic_batch(tuple(args.size or _test_size(cfg)), args.batch)


def _test_size(cfg: CfgNode) -> tuple[int, int]:
    """Give the (height, width) of a landscape picture as the config tests it."""
    if any(cfg.INSTSEG.STRETCH):
        return tuple(cfg.INSTSEG.STRETCH)
    side = cfg.INPUT.MIN_SIZE_TEST
    return (side, min(cfg.INPUT.MAX_SIZE_TEST, round(side * 4 / 3))) if side else (480, 640)
