"""``instseg check-dataset``: say what is wrong with a COCO-format data set, and mend a copy."""

from __future__ import annotations

import argparse
import sys

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command and its arguments."""
    from instseg_ext.cli.common import add_register_argument

    parser = subparsers.add_parser(
        "check-dataset",
        help="find mistakes in a COCO-format data set",
        description=(
            "Check a COCO-format data set: ANNOTATIONS.json and IMAGE_DIR, or data sets by name "
            "(--dataset, --register). Exits with 1 if there are errors. Changes nothing; --fix "
            "writes a mended copy of the annotation file."
        ),
    )
    parser.add_argument("json", nargs="?", metavar="ANNOTATIONS.json", help="annotation file")
    parser.add_argument("images", nargs="?", metavar="IMAGE_DIR", help="folder of the images")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="NAME", help="a registered data set"
    )
    add_register_argument(parser)
    parser.add_argument(
        "--cheap", action="store_true", help="open no image and draw no mask (as training does)"
    )
    parser.add_argument("--fix", metavar="OUT.json", help="write a mended annotation file")
    parser.add_argument("--force", action="store_true", help="let --fix overwrite OUT.json")
    parser.add_argument(
        "--all", action="store_true", help="list every finding instead of ten of each kind"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, print the findings, and mend if asked to.

    Returns:
        1 if there are errors, else 0; 0 as well after a successful ``--fix``.

    Raises:
        ValueError, KeyError, FileNotFoundError, FileExistsError: one sentence naming what is wrong.
    """
    from instseg_ext.data import check, repair

    targets = _targets(args)
    if args.fix and len(targets) != 1:
        raise ValueError("--fix writes one file, so it needs exactly one data set.")
    failed = False
    for json_file, images in targets:
        report = check.check_dataset(json_file, images, decode=not args.cheap)
        for line in check.iter_lines(report, None if args.all else 10):
            sys.stdout.write(f"{line}\n")
        failed |= bool(report.errors)
        if args.fix:
            changes = repair.write_repaired(json_file, images, args.fix, force=args.force)
            done = ", ".join(f"{what} ({n})" for what, n in changes.most_common()) or "no change"
            sys.stdout.write(f"{args.fix}: written; {done}\n")
            failed = False
    return int(failed)


def _targets(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the annotation files and image folders to check."""
    from instseg_ext.data import registration
    from instseg_ext.data.foreign import require_files

    if args.json and not args.images:
        raise ValueError(
            f"The image folder is missing: instseg check-dataset {args.json} IMAGE_DIR."
        )
    targets = [(args.json, args.images)] if args.json else []
    registration.register_bundled()
    names = list(args.dataset)
    for flag in args.register:
        entry = registration.parse_register_flag(flag)
        registration.register(entry["NAME"], entry["JSON"], entry["IMAGES"])
        if entry["NAME"] not in names:
            names.append(entry["NAME"])
    for name in names:
        registration.ensure_files(name)
        require_files(name)
        files = registration.dataset_files(name)
        if files is None:
            raise ValueError(f"Data set {name!r} has no COCO-format files that could be checked.")
        targets.append((str(files[0]), str(files[1])))
    if not targets:
        raise ValueError("Name a data set: ANNOTATIONS.json IMAGE_DIR, --dataset or --register.")
    return targets
