"""``instseg propose-regions``: the regions that SDS classifies, one file for each image."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from instseg_ext.cli.common import add_register_argument

__all__ = ["add_parser", "run"]

# Written out, because the help must not import what holds them.
SOURCES = ("builtin", "skimage", "opencv")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg propose-regions``."""
    parser = subparsers.add_parser(
        "propose-regions",
        help="write region proposals for a data set, which SDS classifies",
        description=(
            "Segment the images of a data set into region proposals, or take them from other "
            "methods, and write one file for each image. Says how many of the objects they find, "
            "which bounds the AP of SDS. Started again, it goes on where it stopped."
        ),
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="a registered data set")
    add("--output", required=True, metavar="FOLDER", help="folder of the files")
    add(
        "--from",
        dest="path",
        metavar="PATH",
        help="make the regions of this instead of segmenting the images: a proposal file (`instseg "
        "propose`), a COCO result file (.json), or a folder of MCG's .mat files",
    )
    add(
        "--source",
        choices=SOURCES,
        default=SOURCES[0],
        help="segment with this package alone (default), with scikit-image, or around the boxes "
        "of OpenCV's selective search",
    )
    add("--max-regions", type=int, default=2000, metavar="N", help="of an image (default 2000)")
    add("--seed", type=int, default=0, help="of the order of the regions (default 0)")
    add("--workers", type=int, default=0, metavar="N", help="processes (default 0: one a core)")
    add("--force", action="store_true", help="throw away the regions in the folder")
    add_register_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the files and print what they find.

    Raises:
        ValueError, KeyError, FileNotFoundError, FileExistsError: one sentence naming what is wrong.
    """
    from detectron2.data import DatasetCatalog

    from instseg_ext import data
    from instseg_ext.data import foreign
    from instseg_ext.methods import sds

    if args.max_regions < 1 or args.workers < 0:
        raise ValueError("--max-regions must be at least 1, and --workers not negative.")
    source = sds.region_source(
        Path(args.path) if args.path else None, args.source, args.max_regions, args.seed
    )
    _register(args)
    data.require_source(args.dataset)
    data.ensure_files(args.dataset)
    foreign.require_files(args.dataset)
    dicts = DatasetCatalog.get(args.dataset)
    settings = {
        "dataset": args.dataset,
        **({"from": str(args.path)} if args.path else {"source": args.source, "seed": args.seed}),
        "max_regions": args.max_regions,
    }
    workers = args.workers or os.cpu_count() or 1
    summary = sds.write_regions(
        dicts, args.output, source, settings, workers=workers, force=args.force
    )
    sys.stdout.write(_table(summary))
    sys.stdout.write(f"{args.output}: written\n")
    return 0


def _register(args: argparse.Namespace) -> None:
    """Register the bundled data sets and those of ``--register``."""
    from instseg_ext import data

    data.register_bundled()
    for flag in args.register:
        entry = data.parse_register_flag(flag)
        data.register(entry["NAME"], entry["JSON"], entry["IMAGES"])


def _table(summary: dict) -> str:
    """Return the figures of a summary as text."""
    lines = [
        f"{summary['images']} images, {summary['regions_per_image']:.0f} regions on average, "
        f"{summary['objects']} objects"
    ]
    if summary["objects"]:
        lines.append(f"{'regions':>8} {'recall@0.5':>11} {'recall@0.7':>11} {'mean best IoU':>14}")
    for limit, figures in summary.get("recall", {}).items():
        lines.append(
            f"{limit:>8} {figures['0.5']:>11.3f} {figures['0.7']:>11.3f} "
            f"{figures['mean_best_iou']:>14.3f}"
        )
    return "\n".join(lines) + "\n"
