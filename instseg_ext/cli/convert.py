"""``instseg convert``: checkpoints of other code bases, made ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import Tensor

    from instseg_ext.checkpoint import Report, Variant
    from instseg_ext.method import Method

__all__ = ["FAMILIES", "add_parser", "run"]

# Written out, because the help must not import what registers them.
FAMILIES = (
    "auto",
    "adelaidet",
    "deepmask-pytorch",
    "deepmask-torch7",
    "detectron2",
    "fcis-mxnet",
    "mnc-caffe",
    "multipathnet-torch7",
    "panet",
    "polarmask",
    "sds-caffe",
    "solo-authors",
    "solo-mmdet",
    "torchvision",
    "vgg-caffe",
    "yolact",
    "yolact-edge",
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg convert``."""
    parser = subparsers.add_parser("convert", help="make checkpoints of other code bases ours")
    add = parser.add_argument
    add(
        "--from",
        dest="family",
        required=True,
        metavar="FAMILY",
        help=f"whose file it is: {', '.join(FAMILIES)}; auto recognises family and model",
    )
    add("input", metavar="IN", help="the file, as its authors publish it, or its URL")
    add("output", metavar="OUT", help="the .pth to write")
    add(
        "--config",
        default="",
        metavar="NAME",
        help="config of the model, a name or a YAML file; left out, the one that fits is found",
    )
    add("--overwrite", action="store_true", help="replace OUT if it exists")
    add("--verbose", action="store_true", help="write every name, not only counts")
    add("--report", default="", metavar="FILE", help="write every name to FILE, also on failure")
    add(
        "--unsafe",
        action="store_true",
        help="read a file that holds more than tensors: it can run any code",
    )
    parser.set_defaults(run=run, takes_overrides=True)
    parser.epilog = (
        "Overrides of the config are typed as KEY VALUE pairs after OUT, for example "
        "INPUT.MIN_SIZE_TEST 512."
    )


def run(args: argparse.Namespace) -> int:
    """Convert one file; nothing is written unless all of it fits."""
    from instseg_ext import checkpoint

    checkpoint.check_destination(args.output, args.overwrite)
    if args.family != checkpoint.AUTO:
        checkpoint.find_family(args.family)
    try:
        report, how_to_use = _convert(args)
    except checkpoint.ConversionError as error:
        if error.report is not None:
            _write_report(args.report, error.report)
        raise
    _write_report(args.report, report)
    sys.stdout.write(f"{report.full() if args.verbose else report.summary()}\n\n")
    sys.stdout.write(f"Wrote {args.output}. {how_to_use}\n")
    return 0


def _convert(args: argparse.Namespace) -> tuple[Report, str]:
    """Read, rename, compare with the model, write; returns what to do with the file, too."""
    from instseg_ext import checkpoint

    source = _local_file(args.input)
    content = checkpoint.read_weights(source, args.unsafe)
    if isinstance(content.get("instseg_ext"), Mapping):
        raise ValueError(
            f"{args.input} was written by this package: it needs no conversion; give it as "
            "MODEL.WEIGHTS."
        )
    weights, report, variant = checkpoint.convert_with_variant(content["model"], args.family)
    beside = {str(key) for key in content} - {"model", "__author__", "matching_heuristics"}
    report.dropped.update(dict.fromkeys(sorted(beside), "beside the weights"))
    metadata: dict[str, Any] = {"family": report.family, "sha256": checkpoint.sha256_of(source)}
    cfg = _config(args, report, variant)
    if cfg is not None:
        _check_fit(weights, cfg, report, variant)
    if cfg is not None and not variant.backbone_only:
        metadata["class_names"] = _class_names(content, cfg)
        metadata["config"] = _portable(cfg)
    checkpoint.write_converted(
        args.output,
        weights,
        metadata,
        backbone_only=variant.backbone_only,
        overwrite=args.overwrite,
    )
    return report, _how_to_use(args.output, None if variant.backbone_only else cfg)


def _local_file(name: str) -> str:
    from instseg_ext import checkpoint

    if "://" not in name and not Path(name).is_file():
        raise FileNotFoundError(f"{name} does not exist.")
    try:
        return checkpoint.fetch_weights(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{name} cannot be fetched: check the address and the network, or download the file "
            "and give its path."
        ) from error


def _config(args: argparse.Namespace, report: Report, variant: Variant) -> CfgNode | None:
    """Return the config that the weights are for, with the file's number of classes.

    Returns:
        None for a backbone alone, unless a config was asked for.
    """
    from instseg_ext import checkpoint, zoo

    name = args.config or variant.config
    if not name and variant.backbone_only:
        if args.opts:
            raise ValueError(
                f"{args.opts[0]}: overrides need a config, and a backbone has none; give one with "
                "--config."
            )
        return None
    if not name:
        raise checkpoint.ConversionError(
            f"no config here describes this model ({variant.text}): give the one that does with "
            "--config, and what differs as KEY VALUE.",
            report,
        )
    implied = () if args.config else variant.opts
    cfg, typed = zoo.load_config(name, [*implied, *args.opts])
    method = zoo.method_of(cfg)
    owners = [m for m in zoo.METHODS if report.family in [f.name for f in m.converters]]
    if owners and method not in owners:
        raise ValueError(
            f"{name} is a config of {method.name}, but {report.family} files hold "
            f"{' or '.join(m.name for m in owners)}."
        )
    report.config, report.opts = name, implied
    if variant.num_classes is not None and not variant.backbone_only:
        before = zoo.class_count(cfg)
        _set_classes(cfg, method, variant.num_classes, typed)
        if before != variant.num_classes:
            report.notes += (f"{variant.num_classes} classes instead of the config's {before}.",)
    return cfg


def _check_fit(
    weights: Mapping[str, Tensor], cfg: CfgNode, report: Report, variant: Variant
) -> None:
    """Compare the weights with the config's model; name the config that would fit if another."""
    from instseg_ext import checkpoint

    expected = checkpoint.model_shapes(cfg)
    try:
        checkpoint.check_fit(weights, expected, report, backbone_only=variant.backbone_only)
    except checkpoint.ConversionError as error:
        fitting = " ".join(map(str, (variant.config, *variant.opts)))
        if not variant.config or report.config == variant.config:
            raise
        raise checkpoint.ConversionError(
            f"{error} By its shapes the file is for {fitting}.", report
        ) from error


def _set_classes(cfg: CfgNode, method: Method, count: int, typed: frozenset[str]) -> None:
    from instseg_ext import zoo

    clash = set(method.class_count_keys) & typed
    if clash and zoo.class_count(cfg) != count:
        raise ValueError(
            f"{', '.join(sorted(clash))} {zoo.class_count(cfg)} was typed, but the file has "
            f"{count} classes; leave the key out."
        )
    zoo.set_class_count(cfg, count)


def _class_names(content: Mapping[str, Any], cfg: CfgNode) -> list[str]:
    """Return the names of the classes, from the config, the file, or the data set of the config.

    Returns:
        Empty if nobody knows as many names as there are classes.
    """
    from detectron2.data import MetadataCatalog

    from instseg_ext import zoo

    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dataset_meta = meta.get("dataset_meta")
    dataset_meta = dataset_meta if isinstance(dataset_meta, Mapping) else {}
    candidates = [
        cfg.INSTSEG.CLASS_NAMES,
        # MMDetection 3, then 2 and 1.
        dataset_meta.get("classes"),
        dataset_meta.get("CLASSES"),
        meta.get("CLASSES"),
        *(MetadataCatalog.get(name).get("thing_classes") for name in cfg.DATASETS.TEST),
    ]
    for names in candidates:
        if isinstance(names, (list, tuple)) and len(names) == zoo.class_count(cfg):
            return [str(name) for name in names]
    return []


def _portable(cfg: CfgNode) -> str:
    """Return the text of a config without what belongs to this machine."""
    from detectron2.config import get_cfg

    cfg = cfg.clone()
    # The default means: CUDA where there is one.
    cfg.MODEL.DEVICE = get_cfg().MODEL.DEVICE
    return cfg.dump()


def _write_report(path: str, report: Report) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(f"{report.full()}\n", encoding="utf-8")


def _how_to_use(path: str, cfg: CfgNode | None) -> str:
    """Return what to do with the file of a model with this config, or of a backbone."""
    from instseg_ext import zoo

    if cfg is None:
        return f"Start training from it with MODEL.WEIGHTS {path}."
    use = f"Use it: instseg predict --weights {path} --input PICTURE --output FOLDER"
    if not zoo.method_of(cfg).checks(cfg):
        return use
    return f"{use}\nCheck it: instseg check-model --weights {path} --input PICTURES"
