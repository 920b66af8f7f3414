"""``instseg propose``: a file of proposals for a data set, by any model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from instseg_ext.cli import common

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from instseg_ext.method import Method

__all__ = ["add_parser", "run"]

# Written out, because the help must not import what holds them.
FORMS = ("torch", "detectron2-pickle", "json")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg propose``."""
    parser = subparsers.add_parser(
        "propose",
        help="write the proposals of a model for a data set to a file",
        description="Run a model over a data set and write what it finds, whatever the classes, as "
        "proposals for MODEL.LOAD_PROPOSALS; or take them from another program's file.",
    )
    common.add_config_arguments(parser)
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="a registered data set")
    add("--output", required=True, metavar="FILE", help="the file to write")
    add(
        "--from-file",
        metavar="FILE",
        help="take the proposals from detectron2's .pkl or a .json of COCO results instead of a "
        "model",
    )
    add(
        "--top",
        type=int,
        default=0,
        metavar="N",
        help="keep the best N proposals of each image (default 0: all)",
    )
    add(
        "--format",
        choices=FORMS,
        default=FORMS[0],
        help="torch, the file that this package reads (default); detectron2's pickle, which has no "
        "masks; or a COCO result file",
    )
    add("--overwrite", "--force", action="store_true", help="replace the file if it exists")
    add("--num-gpus", type=int, default=1, help="processes; without CUDA, CPU processes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what is cheap to check, then propose in as many processes as asked for."""
    from instseg_ext import data, engine

    output = Path(args.output)
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists; choose another --output or --overwrite.")
    if args.top < 0:
        raise ValueError(f"--top must be 0 (all) or more, not {args.top}.")
    if args.from_file:
        return _import(args, output)
    cfg, _ = _config(args)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--weights is missing: an untrained model proposes noise.")
    data.require_source(args.dataset)
    data.ensure_files(args.dataset)
    engine.check_weights(cfg)
    output.parent.mkdir(parents=True, exist_ok=True)
    engine.launch(_worker, num_gpus=args.num_gpus, device=cfg.MODEL.DEVICE, args=(args,))
    return 0


def _import(args: argparse.Namespace, output: Path) -> int:
    """Take the proposals from a file."""
    from detectron2.config import get_cfg
    from detectron2.utils.logger import setup_logger

    import instseg_ext
    from instseg_ext import data, engine

    if args.config_file or args.weights or args.opts:
        raise ValueError("--from-file needs no model: leave the config, weights and overrides out.")
    setup_logger(name="instseg_ext")
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    data.add_registrations(cfg, [data.parse_register_flag(flag) for flag in args.register])
    data.register_from_config(cfg)
    data.require_source(args.dataset)
    data.ensure_files(args.dataset)
    output.parent.mkdir(parents=True, exist_ok=True)
    engine.import_proposals(
        Path(args.from_file), args.dataset, output, form=args.format, top=args.top or None
    )
    return 0


def _config(args: argparse.Namespace) -> tuple[CfgNode, Method]:
    """Return the config, with the data set as its test set unless that one has proposals itself."""
    cfg, method = common.config_from_args(args)
    if not cfg.MODEL.LOAD_PROPOSALS:
        cfg.DATASETS.TEST = (args.dataset,)
    return cfg, method


def _worker(args: argparse.Namespace) -> None:
    """Propose in one process."""
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from instseg_ext import engine

    setup_logger(name="instseg_ext", distributed_rank=comm.get_rank())
    cfg, method = _config(args)
    engine.propose_dataset(
        cfg,
        method,
        args.dataset,
        Path(args.output),
        form=args.format,
        top=args.top or None,
        unsafe=args.unsafe,
    )
