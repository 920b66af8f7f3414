"""``instseg check-model``: is a model used as it was trained, told from pictures without labels.

What can be told depends on the method, which brings its checks along (``Method.checks``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from instseg_ext.cli import common

if TYPE_CHECKING:
    import numpy as np

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg check-model``."""
    parser = subparsers.add_parser(
        "check-model",
        help="test a model on pictures without labels",
        description=(
            "Run the checks that a model's method has on pictures that need no labels. PolarMask: "
            "whether MODEL.POLARMASK.RAY_ORIGIN is the order of the model's rays. Exits with 1 if "
            "something is wrong, with 2 if the pictures cannot decide it."
        ),
    )
    common.add_config_arguments(parser)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="WHAT",
        help="pictures, folders or glob patterns in quotes; ten with several objects will do",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the checks and print what they found.

    Returns:
        1 if something is wrong, else 0.

    Raises:
        ValueError: if the method has no check for such a model, or the pictures cannot decide it.
    """
    from detectron2.utils.logger import setup_logger

    from instseg_ext.engine.media import expand_inputs
    from instseg_ext.engine.predictor import Predictor

    setup_logger(name="instseg_ext")
    common.give_back_overrides(args)
    paths = [source.path for source in expand_inputs(args.input) if source.kind == "image"]
    if not paths:
        raise ValueError("--input has no pictures.")
    cfg, method = common.config_from_args(args)
    checks = method.checks(cfg)
    if not checks:
        raise ValueError(f"{method.name} has no checks for a model of this config.")
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--weights is missing: there is nothing to check in an untrained model.")
    predictor = Predictor(cfg, method, unsafe=args.unsafe)
    wrong = 0
    for name, check in checks.items():
        result = check(predictor, _pictures(paths, name))
        sys.stdout.write(f"{name}: {'ok' if result.passed else 'WRONG'}. {result.text}\n")
        wrong += not result.passed
    return int(wrong > 0)


def _pictures(paths: list[str], title: str) -> Iterator[np.ndarray]:
    """Read the pictures one after the other.

    Raises:
        ValueError: if a file is no picture.
    """
    from tqdm import tqdm

    from instseg_ext.engine.media import UnreadableError, read_picture

    for path in tqdm(paths, desc=title, disable=None):
        try:
            yield read_picture(path)
        except UnreadableError as error:
            raise ValueError(str(error)) from error
