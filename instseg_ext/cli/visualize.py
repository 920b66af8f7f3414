"""``instseg visualize``: what the network sees, and what it predicts beside the truth.

A method may bring figures of its own (``Method.figures``), see ``instseg_ext.method.Figure``.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instseg_ext.cli import common

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from instseg_ext.method import FigurePicture, Method

__all__ = ["add_parser", "run"]

logger = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg visualize``."""
    parser = subparsers.add_parser("visualize", help="draw training data, predictions, figures")
    parser.add_argument(
        "kind",
        help="data (what the network sees after augmentation), predictions (truth beside "
        "prediction, worst images first), or a figure of the method (YOLACT: prototypes; "
        "PolarMask: rays, upper-bound, the latter from annotations alone)",
    )
    common.add_config_arguments(parser)
    add = parser.add_argument
    add("--output", metavar="DIR", help="folder (default OUTPUT_DIR/visualize/KIND)")
    add("--overwrite", action="store_true", help="the folder may hold files already")
    add(
        "--count",
        type=int,
        default=12,
        help="pictures (default 12); 0 takes all for a method's figure",
    )
    add(
        "--dataset",
        default="",
        metavar="NAME",
        help="data set (default: the first of DATASETS.TEST)",
    )
    add(
        "--results",
        metavar="JSON",
        help="predictions: a coco_instances_results.json; left out, the model is run",
    )
    add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="leave out detections with a lower score (default 0.5); not for data",
    )
    add(
        "--order",
        choices=("worst", "best", "dataset"),
        default="worst",
        help="predictions: which images come first",
    )
    add("--limit", type=int, default=0, metavar="N", help="predictions: the first N images only")
    add(
        "--input",
        nargs="+",
        metavar="WHAT",
        help="a method's figure: pictures to show it on, instead of those of the data set; they "
        "come without annotations",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw, and log where the files are."""
    from detectron2.utils.logger import setup_logger

    setup_logger(name="instseg_ext")
    cfg, method = common.config_from_args(args)
    kinds = {"data": _data, "predictions": _predictions}
    if args.kind not in kinds and args.kind not in method.figures:
        known = ", ".join([*kinds, *method.figures])
        raise ValueError(f"{method.name} has no figure {args.kind!r}; known are {known}.")
    folder = Path(args.output or Path(cfg.OUTPUT_DIR) / "visualize" / args.kind)
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise FileExistsError(f"{folder} holds files; choose another --output or --overwrite.")
    folder.mkdir(parents=True, exist_ok=True)
    files = kinds.get(args.kind, _figure)(args, cfg, method, folder)
    logger.info("%d files in %s.", len(files), folder)
    if files:
        logger.info("The one to open first: %s", files[-1])
    return 0


def _data(
    args: argparse.Namespace, cfg: CfgNode, method: Method, folder: Path
) -> Sequence[str | Path]:
    from instseg_ext.visualization.data import draw_training_samples

    return draw_training_samples(cfg, method, folder, args.count)


def _dataset_name(args: argparse.Namespace, cfg: CfgNode) -> str:
    name = args.dataset or next(iter(cfg.DATASETS.TEST), "")
    if not name:
        raise ValueError("--dataset is missing, and DATASETS.TEST of the config is empty.")
    return name


def _predictions(
    args: argparse.Namespace, cfg: CfgNode, method: Method, folder: Path
) -> list[Path]:
    from instseg_ext import data
    from instseg_ext.engine.media import read_picture
    from instseg_ext.evaluation import load_ground_truth
    from instseg_ext.visualization import predictions

    name = _dataset_name(args, cfg)
    if data.is_semantic(name):
        raise ValueError(
            f"Data set {name!r} holds label maps, and this picture compares instances; `instseg "
            "predict` draws label maps."
        )
    data.ensure_files(name)
    files = data.dataset_files(name)
    if files is None:
        raise ValueError(f"Data set {name!r} has no COCO file to compare with.")
    truth, images = load_ground_truth(files[0]), Path(files[1])
    if args.limit:
        truth["images"] = truth["images"][: args.limit]
    if args.results:
        results = _read_results(args.results, truth)
    else:
        results = _predict(args, cfg, method, truth, images)
    if results and not any("segmentation" in result for result in results):
        raise ValueError(
            "The results hold boxes only, and this picture compares masks; `instseg predict` draws "
            "boxes."
        )
    reports = predictions.rank_images(
        truth, results, threshold=args.confidence_threshold, order=args.order
    )
    if reports:
        mean = sum(report.quality for report in reports) / len(reports)
        logger.info("Mean quality of %d images: %.3f.", len(reports), mean)
    return predictions.draw_reports(
        reports,
        truth["categories"],
        lambda image: read_picture(str(images / image["file_name"])),
        folder,
        count=args.count,
        title=f"{name}, {args.order} first" if args.order != "dataset" else name,
    )


def _read_results(path: str, truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Read a COCO result file; with ``--limit``, results of other images are dropped."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--results {path} does not exist.")
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--results {path} is not valid JSON: {error}.") from error
    wanted = {"image_id", "category_id", "score"}
    if not isinstance(results, list) or not all(wanted <= set(r) for r in results):
        raise ValueError(f"--results {path} is no list of COCO results with {sorted(wanted)}.")
    known = {image["id"] for image in truth["images"]}
    kept = [result for result in results if result["image_id"] in known]
    if results and not kept:
        raise ValueError(f"--results {path} belongs to another data set: no image id fits.")
    return kept


def _predict(
    args: argparse.Namespace, cfg: CfgNode, method: Method, truth: dict[str, Any], images: Path
) -> list[dict[str, Any]]:
    """Run the model over the images of a data set."""
    from tqdm import tqdm

    from instseg_ext.engine.media import prefetch, read_picture
    from instseg_ext.engine.predictor import Predictor
    from instseg_ext.evaluation import instances_to_results

    if not cfg.MODEL.WEIGHTS:
        raise ValueError("Give --results of an evaluation, or --weights to run the model.")
    predictor = Predictor(cfg, method, threshold=args.confidence_threshold, unsafe=args.unsafe)
    category_ids = sorted(category["id"] for category in truth["categories"])
    entries = truth["images"]
    pictures = prefetch(read_picture(str(images / entry["file_name"])) for entry in entries)
    results: list[dict[str, Any]] = []
    progress = tqdm(zip(entries, pictures, strict=True), total=len(entries), disable=None)
    for entry, picture in progress:
        results += instances_to_results(predictor(picture), entry["id"], category_ids)
    return results


def _figure(
    args: argparse.Namespace, cfg: CfgNode, method: Method, folder: Path
) -> Sequence[str | Path]:
    from instseg_ext.engine.predictor import Predictor

    if args.count < 0:
        raise ValueError(f"--count wants a number of pictures, or 0 for all, not {args.count}.")
    make_predictor = functools.cache(
        lambda: Predictor(cfg, method, threshold=args.confidence_threshold, unsafe=args.unsafe)
    )
    return method.figures[args.kind](cfg, make_predictor, _pictures(args, cfg), folder)


class _Pictures(Sequence["FigurePicture"]):
    """Pictures that are read when they are taken: a data set may not fit into memory."""

    def __init__(self, entries: Sequence[tuple[str, list[dict[str, Any]] | None]]) -> None:
        """Keep the paths and the annotations."""
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> FigurePicture:
        """Read one picture."""
        from instseg_ext.engine.media import read_picture
        from instseg_ext.method import FigurePicture

        path, annotations = self._entries[index]
        return FigurePicture(Path(path).stem, read_picture(path), annotations)


def _pictures(args: argparse.Namespace, cfg: CfgNode) -> Sequence[FigurePicture]:
    """Take the pictures of ``--input``, or else the first ones of the data set."""
    from instseg_ext import data
    from instseg_ext.engine.media import expand_inputs

    if args.input:
        sources = expand_inputs(args.input)
        entries = [(source.path, None) for source in sources if source.kind == "image"]
    else:
        from detectron2.data import DatasetCatalog

        from instseg_ext.data.foreign import require_packages

        name = _dataset_name(args, cfg)
        data.ensure_files(name)
        require_packages(name)
        entries = [(e["file_name"], e.get("annotations")) for e in DatasetCatalog.get(name)]
    return _Pictures(entries[: args.count or None])
