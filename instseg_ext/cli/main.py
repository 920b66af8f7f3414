"""The console script ``instseg <command> ...``."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from instseg_ext import __version__, compat

__all__ = ["build_parser", "main", "run_command"]

# Modules are imported for their parser only; each defers torch and detectron2 to its `run`.
_COMMANDS = (
    "instseg_ext.doctor",
    "instseg_ext.cli.train",
    "instseg_ext.cli.train_alternating",
    "instseg_ext.cli.train_sds",
    "instseg_ext.cli.predict",
    "instseg_ext.cli.propose",
    "instseg_ext.cli.propose_regions",
    "instseg_ext.cli.check_dataset",
    "instseg_ext.cli.check_model",
    "instseg_ext.cli.visualize",
    "instseg_ext.cli.benchmark",
    "instseg_ext.cli.evaluate_patches",
    "instseg_ext.cli.convert",
    "instseg_ext.cli.models",
)

# What a user can cause and mend. Anything else is a defect of ours and keeps its traceback.
_USER_ERRORS = (
    ValueError,
    KeyError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    ImportError,
)

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        Exit status: 0 success, 1 the command found problems, 2 wrong usage or input.
    """
    return run_command(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="instseg", description="Instance segmentation for detectron2."
    )
    parser.add_argument("--version", action="version", version=f"instseg_ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in _COMMANDS:
        importlib.import_module(name).add_parser(subparsers)
    return parser


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run the parsed command; user errors become one sentence.

    Overrides ``KEY VALUE`` may stand anywhere among the options.
    """
    args, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("--")]
    if unknown or (rest and not getattr(args, "takes_overrides", False)):
        parser.error(f"unrecognised arguments: {' '.join(unknown or rest)}")
    args.opts = rest
    try:
        if getattr(args, "needs_detectron2", True):
            compat.require_detectron2()
        return args.run(args)
    except _USER_ERRORS as error:
        # Nobody listens before a run has set up its log; afterwards the place of the error matters.
        logger.debug("The error below came from here:", exc_info=error)
        # str(KeyError) would put the sentence into quotation marks.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.stderr.write(f"{parser.prog}: error: {message}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
