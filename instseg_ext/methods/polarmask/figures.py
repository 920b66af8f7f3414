"""Pictures of rays: ``instseg visualize rays`` and ``instseg visualize upper-bound``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor
from tqdm import tqdm

from instseg_ext import compat
from instseg_ext.evaluation.report import write_json
from instseg_ext.layers.mask_ops import count_pixels
from instseg_ext.layers.polygon_fill import fill_polygons
from instseg_ext.method import FigurePicture
from instseg_ext.methods.polarmask.inference import Frame
from instseg_ext.methods.polarmask.polygons import decode_polygons, ray_directions
from instseg_ext.methods.polarmask.rays import ray_targets
from instseg_ext.methods.polarmask.upper_bound import (
    CENTRES,
    RAYS,
    TARGETS,
    input_size,
    object_masks,
    ray_overlaps,
)
from instseg_ext.structures.contours import Contours, trace_contours
from instseg_ext.visualization.contact_sheet import contact_sheet, write_image
from instseg_ext.visualization.draw import class_label
from instseg_ext.visualization.plot import Curve, plot_curves
from instseg_ext.visualization.rays import close_up, legend, whole_picture

__all__ = ["draw_rays", "draw_upper_bound"]

logger = logging.getLogger(__name__)

# BGR.
_PREDICTED, _TARGET, _OBJECT = (30, 160, 255), (255, 200, 40), (255, 255, 255)
# Detections whose rays are shown one by one.
_EXAMPLES = 4
_CELL = 480
# A ray that meets no contour has a target of 1e-6.
_MISSING = 1e-5


class _Predicted(NamedTuple):
    """Detections of one picture by falling score, in pixels of the network input.

    Attributes:
        points: (R, 2) float32, the locations.
        lengths: (R, rays) float32.
        polygons: (R, rays, 2) float32, the tips.
        scores: (R,).
        classes: (R,).
    """

    points: Tensor
    lengths: Tensor
    polygons: Tensor
    scores: Tensor
    classes: Tensor


class _Objects(NamedTuple):
    """Annotated objects of one picture, in pixels of the network input.

    Attributes:
        masks: (M, H, W) bool.
        contours: of these M.
        classes: of these M.
    """

    masks: Tensor
    contours: Contours
    classes: list[int]


class _Target(NamedTuple):
    """What training would ask of one location.

    Attributes:
        lengths: (rays,) float32.
        polygon: (rays, 2) float32.
        contour: (T, 2) int, of the object.
        label: the object's class.
    """

    lengths: Tensor
    polygon: Tensor
    contour: Tensor
    label: str


@torch.no_grad()
def draw_rays(
    cfg: CfgNode,
    make_predictor: Callable[[], Any],
    pictures: Sequence[FigurePicture],
    folder: Path,
) -> list[Path]:
    """Draw the detections of each picture, and the rays of a few beside their targets.

    The target of a detection is what training would ask of its location for the object that its
    polygon overlaps most.

    Args:
        cfg: of a PolarMask model with a mask branch.
        make_predictor: gives an ``engine.predictor.Predictor`` with that model.
        pictures: those without annotations show predictions only.
        folder: where ``<name>_overview.png`` and ``<name>_rays.png`` go; the second is left out
            when nothing is detected.

    Returns:
        The files, in the order of the pictures.

    Raises:
        ValueError: if the model has no mask branch.
    """
    node = cfg.MODEL.POLARMASK
    if not node.WITH_MASK:
        raise ValueError("MODEL.POLARMASK.WITH_MASK is False: this model has no rays to draw.")
    predictor = make_predictor()
    files = []
    for name, picture, annotated in pictures:
        found, size_hw = _predict(predictor, picture, node)
        objects = _objects(annotated or [], picture.shape[:2], size_hw)
        sheets = {"overview": _overview(picture, found, objects, size_hw)}
        if len(found.scores):
            sheets["rays"] = _ray_sheet(picture, found, objects, node, predictor.names, size_hw)
        else:
            logger.info("Nothing is detected in %s with a score of %s.", name, predictor.threshold)
        for kind, sheet in sheets.items():
            files.append(Path(folder) / f"{name}_{kind}.png")
            write_image(str(files[-1]), sheet)
    return files


def _predict(
    predictor: Any, picture: np.ndarray, node: CfgNode
) -> tuple[_Predicted, tuple[int, int]]:
    """Return the detections above the threshold, on the CPU, and the size of the network input."""
    model = predictor.model
    images = model.preprocess_image([predictor.to_input(picture)])
    with model.precision():
        raw = model.head(model.backbone(images.tensor))
    size_hw = images.image_sizes[0]
    (found,) = model.detections(raw, [Frame(size_hw, picture.shape[:2])])
    points, lengths = found.points.cpu(), found.distances.cpu()
    directions = ray_directions(node.NUM_RAYS, node.RAY_ORIGIN)
    polygons = decode_polygons(points, lengths, directions, size_hw)
    scores, classes = found.scores.cpu(), found.classes.cpu()
    least = -math.inf if predictor.threshold is None else predictor.threshold
    count = int((scores >= least).sum())  # they fall
    kept = (x[:count] for x in (points, lengths, polygons, scores, classes))
    return _Predicted(*kept), size_hw


def _objects(
    annotations: list[dict[str, Any]], source_hw: tuple[int, int], size_hw: tuple[int, int]
) -> _Objects:
    masks, classes = object_masks(annotations, source_hw, size_hw)
    contours, _, _ = trace_contours(masks)
    return _Objects(masks, contours, classes)


def _overview(
    picture: np.ndarray, found: _Predicted, objects: _Objects, size_hw: tuple[int, int]
) -> np.ndarray:
    """Draw the polygons and locations of all detections over the outlines of all objects."""
    view = whole_picture(picture, size_hw, min_side=640)
    for index in range(len(objects.classes)):
        points = objects.contours[index].points
        if len(points):
            view.outline(points.numpy(), _OBJECT, thickness=1)
    for index in reversed(range(len(found.scores))):  # the best on top
        view.outline(found.polygons[index].numpy(), _PREDICTED, thickness=1)
        view.centre(found.points[index].numpy(), _PREDICTED, radius=3)
    count = len(found.scores)
    words = f"{count} detections, polygon and location"
    if count:
        words += f", scores {found.scores[-1]:.2f} to {found.scores[0]:.2f}"
    entries = [(_PREDICTED, words)]
    if objects.classes:
        entries.append((_OBJECT, f"outlines of {len(objects.classes)} annotated objects"))
    return np.concatenate([legend(entries, view.canvas.shape[1]), view.canvas])


def _ray_sheet(
    picture: np.ndarray,
    found: _Predicted,
    objects: _Objects,
    node: CfgNode,
    names: Sequence[str],
    size_hw: tuple[int, int],
) -> np.ndarray:
    """Draw a few detections ray by ray, with their targets where something is annotated."""
    cv2 = compat.opencv()
    picture = cv2.resize(picture, size_hw[::-1], interpolation=cv2.INTER_LINEAR)
    cells, compared = [], False
    for index, match in _examples(found, objects.masks):
        label = class_label(int(found.classes[index]), float(found.scores[index]), names)
        target = None
        if match is not None:
            compared = True
            target = _target(found.points[index], objects, match, node, names, size_hw)
        cells += _example_cells(picture, found, index, target, label)
    entries = [(_PREDICTED, "predicted rays and polygon")]
    if compared:
        entries += [
            (_TARGET, f"target of the same location ({node.RAY_TARGET})"),
            (_OBJECT, "outline of the object"),
        ]
    sheet = contact_sheet(cells, columns=3 if compared else 2, cell_width=_CELL)
    return np.concatenate([legend(entries, sheet.shape[1]), sheet])


def _examples(found: _Predicted, masks: Tensor) -> list[tuple[int, int | None]]:
    """Choose detections to show: the best one of each object, or the best ones where none has one.

    Args:
        found: R detections.
        masks: (M, H, W) bool.

    Returns:
        Index of the detection, and of the object that its polygon overlaps most.
    """
    pairs: dict[int, int] = {}
    areas = count_pixels(masks)
    for index in range(len(found.scores) if len(masks) else 0):
        polygon = found.polygons[index : index + 1].long()  # cut off as inference does
        filled = fill_polygons(polygon, tuple(masks.shape[1:]))
        shared = count_pixels(masks & filled)
        overlaps = shared / (areas + count_pixels(filled) - shared)
        match = int(overlaps.argmax())
        if overlaps[match] > 0 and match not in pairs:
            pairs[match] = index
        if len(pairs) == _EXAMPLES:
            break
    if pairs:
        return [(index, match) for match, index in pairs.items()]
    return [(index, None) for index in range(min(_EXAMPLES, len(found.scores)))]


def _target(
    point: Tensor,
    objects: _Objects,
    match: int,
    node: CfgNode,
    names: Sequence[str],
    size_hw: tuple[int, int],
) -> _Target:
    """Compute the rays that training would ask of ``point`` (2,) for an object."""
    lengths = ray_targets(
        point[None],
        objects.contours,
        torch.tensor([match]),
        num_rays=node.NUM_RAYS,
        mode=node.RAY_TARGET,
        origin=node.RAY_ORIGIN,
    )
    directions = ray_directions(node.NUM_RAYS, node.RAY_ORIGIN)
    polygon = decode_polygons(point[None], lengths, directions, size_hw)[0]
    label = class_label(objects.classes[match], None, names)
    return _Target(lengths[0], polygon, objects.contours[match].points, label)


def _example_cells(
    picture: np.ndarray, found: _Predicted, index: int, target: _Target | None, label: str
) -> Iterator[tuple[np.ndarray, str]]:
    """Draw one detection: its rays, those of its target, and both polygons."""
    point, polygon = found.points[index].numpy(), found.polygons[index].numpy()
    lengths = found.lengths[index]
    extent = [point[None], polygon]
    if target is not None:
        extent += [target.contour.numpy(), target.polygon.numpy()]
    extent = np.concatenate(extent)

    view = close_up(picture, extent, _CELL)
    view.rays(point, polygon, _PREDICTED)
    view.outline(polygon, _PREDICTED)
    view.centre(point, _PREDICTED)
    yield view.canvas, f"{label}: rays of {lengths.min():.1f} to {lengths.max():.1f} pixels"
    if target is None:
        return

    view = close_up(picture, extent, _CELL)
    view.outline(target.contour.numpy(), _OBJECT, thickness=1)
    view.rays(point, target.polygon.numpy(), _TARGET)
    view.outline(target.polygon.numpy(), _TARGET)
    view.centre(point, _TARGET)
    met = int((target.lengths > _MISSING).sum())
    yield view.canvas, f"target, {target.label}: {met} of {len(lengths)} rays meet its outline"

    view = close_up(picture, extent, _CELL)
    view.outline(target.contour.numpy(), _OBJECT, thickness=1)
    view.outline(target.polygon.numpy(), _TARGET)
    view.outline(polygon, _PREDICTED)
    view.centre(point, _PREDICTED)
    shared, joint = torch.minimum(lengths, target.lengths), torch.maximum(lengths, target.lengths)
    yield view.canvas, f"polar IoU {float(shared.sum() / joint.sum()):.3f}"


def draw_upper_bound(
    cfg: CfgNode,
    make_predictor: Callable[[], Any],
    pictures: Sequence[FigurePicture],
    folder: Path,
) -> list[Path]:
    """Plot how well rays can describe the annotated objects, over the number of rays.

    Mean mask IoU of objects with the polygons of their own rays, at the size of the network input.

    Args:
        cfg: read for that size, see ``input_size``.
        make_predictor: not called; no model is needed.
        pictures: with annotations; those without are passed over.
        folder: where ``upper_bound.json`` and ``upper_bound.png`` go.

    Returns:
        The files.

    Raises:
        ValueError: if no picture has annotated objects.
    """
    parts, used = [], 0
    for _, picture, annotated in tqdm(pictures, disable=None):
        size_hw = input_size(cfg, picture.shape[:2])
        masks, _ = object_masks(annotated or [], picture.shape[:2], size_hw)
        overlaps = ray_overlaps(masks)
        used += overlaps.shape[-1] > 0
        parts.append(overlaps)
    overlaps = torch.cat(parts, dim=-1) if parts else torch.zeros(0)
    if not overlaps.numel():
        raise ValueError(
            f"None of the {len(pictures)} pictures has annotated objects with masks: take a data "
            "set with segmentations (--dataset), not --input."
        )
    means, count = overlaps.mean(dim=-1), overlaps.shape[-1]
    files = [Path(folder) / "upper_bound.json", Path(folder) / "upper_bound.png"]
    size = _input_words(cfg)
    summary = {"objects": count, "pictures": used, "input": size, "mean_mask_iou": _table(means)}
    write_json(files[0], summary, indent=2)
    plot_curves(
        files[1],
        _curves(means),
        title=f"Masks of rays at best: {count} objects in {used} pictures, {size}",
        x_label="rays",
        y_label="mean mask IoU with the annotation",
    )
    return files


def _input_words(cfg: CfgNode) -> str:
    """Say at which size pictures are shown to the network."""
    if any(cfg.INSTSEG.STRETCH):
        return "{1} x {0}".format(*cfg.INSTSEG.STRETCH)
    side = cfg.INPUT.MIN_SIZE_TEST
    return f"shorter side {side}" if side else "size of the file"


def _table(means: Tensor) -> list[dict[str, Any]]:
    """List (centres, targets, rays) means."""
    return [
        {"centre": centre, "target": target, "rays": rays, "iou": round(float(means[c, t, r]), 4)}
        for c, centre in enumerate(CENTRES)
        for t, target in enumerate(TARGETS)
        for r, rays in enumerate(RAYS)
    ]


def _curves(means: Tensor) -> list[Curve]:
    """Make one curve for each centre and kind of target; the exact targets lead."""
    colours = {"mass": "tab:blue", "box": "tab:orange"}
    kinds = {"exact": "exact lengths", "bins": "the authors' bins"}
    return [
        Curve(
            f"{centre} centre, {kinds[target]}",
            RAYS,
            means[c, t].tolist(),
            colours[centre],
            secondary=target != "exact",
        )
        for t, target in enumerate(TARGETS)
        for c, centre in enumerate(CENTRES)
    ]
