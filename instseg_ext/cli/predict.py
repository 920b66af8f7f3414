"""``instseg predict``: masks for pictures, videos and cameras, as drawings and COCO results."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instseg_ext.cli import common

if TYPE_CHECKING:
    import numpy as np
    from detectron2.structures import Instances

    from instseg_ext.engine.media import Source
    from instseg_ext.engine.predictor import Predictor
    from instseg_ext.method import Method

__all__ = ["add_parser", "run"]

logger = logging.getLogger(__name__)

RESULTS, IMAGES = "predictions.json", "images.json"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg predict``."""
    parser = subparsers.add_parser("predict", help="masks for pictures, folders, videos, cameras")
    common.add_config_arguments(parser)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="WHAT",
        help="pictures, videos, folders, glob patterns in quotes, or the number of a camera",
    )
    add("--output", metavar="DIR", help=f"folder for drawings, {RESULTS} and {IMAGES}")
    add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="T",
        help="leave out detections with a lower score (default 0.5)",
    )
    add("--overwrite", action="store_true", help="replace files that are in the output folder")
    add("--no-drawings", action="store_true", help=f"write {RESULTS} and {IMAGES} only")
    add("--show", action="store_true", help="show the drawings in a window; q ends")
    add("--max-frames", type=int, default=0, metavar="N", help="stop a video after N frames")
    add("--labels", choices=("auto", "all", "none"), default="auto", help="which labels to draw")
    add("--boxes", action="store_true", help="draw boxes too")
    add(
        "--min-side",
        type=int,
        default=320,
        metavar="PIXELS",
        help="draw smaller pictures enlarged, so that labels are legible (default 320; 0 = never)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Predict; exit status 1 when an input could not be read."""
    from detectron2.utils.logger import setup_logger

    from instseg_ext import compat
    from instseg_ext.engine.media import expand_inputs
    from instseg_ext.engine.predictor import Predictor

    setup_logger(name="instseg_ext")
    common.give_back_overrides(args)
    if not args.output and not args.show:
        raise ValueError("--output is missing: name a folder for the results, or ask for --show.")
    if args.show and not compat.has_gui():
        raise ValueError(
            "--show needs a display and an OpenCV that can open windows; use --output instead."
        )
    sources = expand_inputs(args.input)
    outputs = _plan(args, sources)
    cfg, method = common.config_from_args(args)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--weights is missing: an untrained model finds nothing.")
    predictor = Predictor(cfg, method, threshold=args.confidence_threshold, unsafe=args.unsafe)
    return _Prediction(args, predictor, method).run(sources, outputs)


def _plan(args: argparse.Namespace, sources: list[Source]) -> list[Path | None]:
    """Choose the file of each drawing and refuse to replace what is there, before any work.

    Raises:
        FileExistsError: if a file is there and ``--overwrite`` was not given.
    """
    from instseg_ext.engine.media import output_names

    if not args.output:
        return [None] * len(sources)
    folder = Path(args.output)
    drawings = [] if args.no_drawings else [folder / name for name in output_names(sources)]
    inputs = {Path(source.path).resolve() for source in sources if source.kind != "camera"}
    for path in [*drawings, folder / RESULTS, folder / IMAGES]:
        if path.resolve() in inputs:
            raise FileExistsError(f"{path} is an input; choose another --output folder.")
        if path.exists() and not args.overwrite:
            raise FileExistsError(f"{path} exists; choose another --output folder or --overwrite.")
    folder.mkdir(parents=True, exist_ok=True)
    return drawings or [None] * len(sources)


class _Prediction:
    """The state of one run: what was found, what could not be read, what is being written."""

    def __init__(self, args: argparse.Namespace, predictor: Predictor, method: Method) -> None:
        from instseg_ext.engine.media import Background
        from instseg_ext.visualization.draw import DrawStyle

        self.args = args
        self.predictor = predictor
        self.hints = method.evaluator_hints(predictor.cfg)
        self.names = predictor.names
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.stopped = False
        self.writer = Background()
        self.style = DrawStyle(labels=args.labels, boxes=args.boxes, min_side=args.min_side)
        # A video keeps its size.
        self.video_style = DrawStyle(labels=args.labels, boxes=args.boxes)

    def run(self, sources: list[Source], outputs: list[Path | None]) -> int:
        """Work through the sources and write the files; returns the exit status."""
        try:
            self._pictures(
                [(s, o) for s, o in zip(sources, outputs, strict=True) if s.kind == "image"]
            )
            for source, output in zip(sources, outputs, strict=True):
                if source.kind != "image" and not self.stopped:
                    self._video(source, output)
        except KeyboardInterrupt:
            logger.warning("Interrupted; what was predicted so far is written.")
        self.writer.finish()
        if self.args.output:
            self._write()
        found = f"{len(self.results)} instances in {len(self.images)} images"
        where = f"; results are in {self.args.output}" if self.args.output else ""
        logger.info("Found %s%s.", found, where)
        if self.images and not self.results:
            logger.info(
                "Nothing scored %s or more; try a lower --confidence-threshold.",
                self.args.confidence_threshold,
            )
        if self.failed:
            logger.error(
                "%d inputs could not be read: %s", len(self.failed), "; ".join(self.failed)
            )
        return 1 if self.failed else 0

    def _pictures(self, jobs: list[tuple[Source, Path | None]]) -> None:
        from tqdm import tqdm

        from instseg_ext.engine.media import UnreadableError, prefetch, read_picture
        from instseg_ext.visualization.contact_sheet import write_image

        def read() -> Iterator[tuple[Source, Path | None, np.ndarray | None]]:
            for source, output in jobs:
                try:
                    yield source, output, read_picture(source.path)
                except UnreadableError as error:
                    self.failed.append(str(error))
                    yield source, output, None

        with tqdm(total=len(jobs), desc="pictures", disable=None if jobs else True) as progress:
            for source, output, image in prefetch(read()):
                progress.update()
                if image is None:
                    continue
                instances = self._keep(source.path, image)
                if output is not None:
                    self.writer.submit(
                        lambda i, n, o: write_image(str(o), self._draw(i, n, self.style)),
                        image,
                        instances,
                        output,
                    )
                if self.args.show and not self._show(self._draw(image, instances, self.style), 0):
                    self.stopped = True
                    break

    def _video(self, source: Source, output: Path | None) -> None:
        from tqdm import tqdm

        from instseg_ext.engine import media
        from instseg_ext.visualization.tracks import ColourTracks

        tracks = ColourTracks()
        try:
            fps, count = media.video_properties(source)
        except media.UnreadableError as error:
            self.failed.append(str(error))
            return
        sink = None if output is None else media.VideoSink(output, fps)

        def step(frame: np.ndarray, instances: Instances) -> None:
            ids = tracks.update(instances.pred_boxes.tensor.numpy(), instances.pred_classes.numpy())
            drawn = self._draw(frame, instances, self.video_style, ids)
            if sink is not None:
                sink.write(drawn)
            if self.args.show and not self._show(drawn, 1):
                self.stopped = True

        frames = media.prefetch(media.read_frames(source, self.args.max_frames))
        total = min(count, self.args.max_frames) if self.args.max_frames else count
        try:
            with tqdm(total=total or None, desc=Path(source.path).name, disable=None) as progress:
                for number, frame in enumerate(frames):
                    instances = self._keep(f"{source.path}#{number}", frame)
                    if self.args.show:
                        step(frame, instances)  # windows belong to the main thread
                    else:
                        self.writer.submit(step, frame, instances)
                    progress.update()
                    if self.stopped:
                        break
        except media.UnreadableError as error:
            self.failed.append(str(error))
        finally:
            frames.close()
            if sink is not None:
                self.writer.submit(sink.close)

    def _keep(self, file_name: str, image: np.ndarray) -> Instances:
        """Predict and remember the results; returns the detections."""
        from instseg_ext.evaluation import instances_to_results

        instances = self.predictor(image)
        number = len(self.images) + 1
        height, width = image.shape[:2]
        self.images.append({"id": number, "file_name": file_name, "height": height, "width": width})
        classes = instances.pred_classes.tolist()
        self.results += instances_to_results(
            instances,
            number,
            range(1, max([len(self.names) - 1, *classes]) + 2),
            self.hints.get("segm_score_field"),
        )
        return instances

    def _draw(
        self, image: np.ndarray, instances: Instances, style: Any, ids: np.ndarray | None = None
    ) -> np.ndarray:
        from instseg_ext.visualization.draw import draw_instances

        if self.predictor.semantic:  # a class has the same colour in every picture
            ids = instances.pred_classes.numpy()
        masks = None
        if instances.has("pred_masks_rle"):
            masks = list(instances.pred_masks_rle)
        elif instances.has("pred_masks"):
            masks = instances.pred_masks.numpy()
        return draw_instances(
            image,
            masks,
            instances.pred_boxes.tensor.numpy() if instances.has("pred_boxes") else None,
            instances.pred_classes.tolist(),
            instances.scores.tolist(),
            self.names,
            ids=ids,
            style=style,
        )

    def _show(self, drawn: np.ndarray, wait_ms: int) -> bool:
        """Show a picture; False when the user wants to stop. ``wait_ms`` 0 waits for a key."""
        from instseg_ext import compat

        cv2 = compat.opencv()
        cv2.imshow("instseg", drawn)
        return cv2.waitKey(wait_ms) & 0xFF not in (ord("q"), 27)

    def _write(self) -> None:
        """Write COCO results, and the image list and categories that their ids refer to."""
        from instseg_ext.evaluation import write_json

        folder = Path(self.args.output)
        highest = max((r["category_id"] for r in self.results), default=0)
        categories = [
            {"id": i + 1, "name": self.names[i] if i < len(self.names) else f"class {i}"}
            for i in range(max(len(self.names), highest))
        ]
        write_json(folder / RESULTS, self.results)
        write_json(
            folder / IMAGES, {"images": self.images, "annotations": [], "categories": categories}
        )
