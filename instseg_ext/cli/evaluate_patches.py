"""``instseg evaluate-patches``: masks and scores of single patches, for models trained on them."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instseg_ext.cli import common

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__all__ = ["add_parser", "run"]

logger = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg evaluate-patches``."""
    parser = subparsers.add_parser(
        "evaluate-patches",
        help="mask IoU and score accuracy on single patches (DeepMask, SharpMask)",
        description=(
            "For every object large enough to train on, compare the predicted mask of the window "
            "in which it is centred with its own; for as many patches, drawn as in training, "
            "compare the sign of the score with their label. A SharpMask is judged with and "
            "without its refinement on the same windows."
        ),
    )
    common.add_config_arguments(parser)
    add = parser.add_argument
    add("--dataset", metavar="NAME", help="a data set (default: those of DATASETS.TEST)")
    add("--batch", type=int, default=32, help="patches per forward pass (default 32)")
    add(
        "--output",
        metavar="FILE",
        help="where the figures go as JSON (default: OUTPUT_DIR/patches.json)",
    )
    add("--overwrite", action="store_true", help="replace that file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    from detectron2.data import DatasetCatalog
    from detectron2.utils.logger import setup_logger

    from instseg_ext import data
    from instseg_ext.data import foreign
    from instseg_ext.engine.predictor import Predictor
    from instseg_ext.evaluation import report, write_json

    setup_logger(name="instseg_ext")
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {args.batch}.")
    cfg, method = common.config_from_args(args)
    if method.evaluate_patches is None:
        raise ValueError(f"{method.name} is not trained on patches: evaluate-patches has no use.")
    output = _output_file(args, cfg)
    names = [args.dataset] if args.dataset else list(cfg.DATASETS.TEST)
    if not names:
        raise ValueError("DATASETS.TEST is empty: name a data set with --dataset.")
    for name in names:
        data.require_source(name)
        data.ensure_files(name)
        foreign.require_files(name)
    model = Predictor(cfg, method, unsafe=args.unsafe).model
    figures: dict[str, Any] = {}
    for name in names:
        dicts = DatasetCatalog.get(name)
        figures[name] = method.evaluate_patches(cfg, model, dicts, name, batch=args.batch)
        logger.info("%s:\n%s", name, _table(figures[name]))
    summary = {
        "config": cfg.INSTSEG.CONFIG,
        "weights": cfg.MODEL.WEIGHTS,
        "datasets": figures,
    }
    write_json(output, report.null_for_nan(summary), indent=2)
    sys.stdout.write(f"{output}: written\n")
    return 0


def _output_file(args: argparse.Namespace, cfg: CfgNode) -> Path:
    """Return where the figures go.

    Raises:
        FileExistsError: if the user has not said that the file may be replaced.
    """
    output = Path(args.output or Path(cfg.OUTPUT_DIR) / "patches.json")
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists; choose another --output or --overwrite.")
    return output


def _table(figures: dict[str, Any]) -> str:
    """Return a table of all figures."""
    from tabulate import tabulate

    rows = []
    for key, value in figures.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(key, name, number) for name, number in parts]
    return tabulate(rows, headers=("", "figure", "value"), floatfmt=".1f")
