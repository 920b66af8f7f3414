"""Arguments that several commands share, and how they become a config."""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from instseg_ext.method import Method

__all__ = [
    "add_config_arguments",
    "add_register_argument",
    "config_from_args",
    "give_back_overrides",
    "typed_config_from_args",
]

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")


def add_register_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--register``."""
    parser.add_argument(
        "--register",
        metavar="NAME=ANNOTATIONS.json:IMAGE_DIR",
        action="append",
        default=[],
        help="register a COCO-format data set under NAME; may be repeated",
    )


def add_config_arguments(parser: argparse.ArgumentParser, *, weights: bool = True) -> None:
    """Add config, weights and data set arguments, and overrides ``KEY VALUE``."""
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="a YAML file, or a name such as SOLO/solov2_R_50_FPN_1x"
        + ("; left out, the config inside the checkpoint is used" if weights else ""),
    )
    if weights:
        parser.add_argument(
            "--weights",
            default="",
            metavar="FILE",
            help="checkpoint; the same as MODEL.WEIGHTS FILE",
        )
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="read weights that hold more than tensors: they can run any code",
    )
    add_register_argument(parser)
    parser.set_defaults(takes_overrides=True)
    parser.epilog = (
        "Overrides of the config are typed as KEY VALUE pairs, for example MODEL.DEVICE cpu."
    )


def give_back_overrides(args: argparse.Namespace) -> None:
    """Move ``KEY VALUE`` pairs that ``--input`` swallowed to the overrides.

    Raises:
        ValueError: if nothing is left of ``--input``.
    """
    for index, word in enumerate(args.input):
        if _KEY.fullmatch(word) and not Path(word).exists():
            args.opts = [*args.input[index:], *args.opts]
            args.input = args.input[:index]
            break
    if not args.input:
        raise ValueError("--input names nothing.")


def config_from_args(args: argparse.Namespace) -> tuple[CfgNode, Method]:
    """Return the config and the method's record that the arguments ask for.

    Raises:
        FileNotFoundError, KeyError, ValueError, ImportError: one sentence naming what is wrong.
    """
    cfg, method, _ = typed_config_from_args(args)
    return cfg, method


def typed_config_from_args(args: argparse.Namespace) -> tuple[CfgNode, Method, frozenset[str]]:
    """Like ``config_from_args``, and the set of keys that the user typed."""
    from instseg_ext import data, zoo

    weights = getattr(args, "weights", "")
    if args.config_file:
        cfg, typed = zoo.load_config(args.config_file, args.opts)
    elif weights:
        cfg, typed = _config_of_checkpoint(weights, args.opts)
    else:
        raise ValueError("--config-file is missing; `instseg models` lists the configs.")
    if weights:
        cfg.MODEL.WEIGHTS = weights
    if args.register:
        data.add_registrations(cfg, [data.parse_register_flag(flag) for flag in args.register])
        data.register_from_config(cfg)
    return cfg, zoo.method_of(cfg), typed


def _config_of_checkpoint(weights: str, opts: list[str]) -> tuple[CfgNode, frozenset[str]]:
    from instseg_ext import checkpoint, zoo

    text = checkpoint.read_metadata(weights).get("config")
    if not text:
        raise ValueError(
            f"{weights} carries no config of its own: give one with --config-file, or, if the "
            "weights are another project's, make a file that has one with `instseg convert`."
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config_of_the_checkpoint.yaml"
        file.write_text(text)
        return zoo.load_config(str(file), opts)
