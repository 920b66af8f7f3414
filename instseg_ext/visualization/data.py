"""Pictures of training samples as the network sees them, after augmentation."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.structures import Instances

from instseg_ext import compat, data
from instseg_ext.visualization.contact_sheet import contact_sheet, write_image
from instseg_ext.visualization.draw import DrawStyle, draw_instances

if TYPE_CHECKING:
    from instseg_ext.method import Method

__all__ = ["draw_labels", "draw_sample", "draw_training_samples", "sample_masks", "sample_pixels"]


def draw_training_samples(
    cfg: CfgNode, method: Method, out_dir: str | os.PathLike, count: int = 8
) -> list[Path]:
    """Draw the first samples of the training stream, one picture each and a sheet of all.

    The stream is the one that training with this seed (``SEED``, or 0) begins with.

    Args:
        cfg: of the run; reads what the training loader reads.
        method: record of the configured method; its mapper is used if it brings one.
        out_dir: folder for ``samples.png`` and ``sample_000.png``, ...; made if missing.
        count: number of samples.

    Returns:
        the files written, the sheet last.

    Raises:
        ValueError: if ``count`` is not positive, or as the training loader raises.
    """
    if count < 1:
        raise ValueError(f"--count wants at least 1 picture, not {count}.")
    build_mapper = method.build_mapper or data.build_mapper
    loader = data.build_train_loader(
        cfg,
        build_mapper(cfg, True),
        seed=max(cfg.SEED, 0),
        build_source=method.build_source,
    )
    names = data.dataset_classes(cfg.DATASETS.TRAIN[0])
    samples = itertools.islice(itertools.chain.from_iterable(loader), count)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    files, cells = [], []
    for index, sample in enumerate(samples):
        picture = draw_sample(sample, cfg.INPUT.FORMAT, names)
        height, width = sample["image"].shape[1:]
        caption = f"{Path(sample['file_name']).name}  {width}x{height}"
        cells.append((picture, f"{caption}  {_content(sample)}"))
        files.append(out / f"sample_{index:03d}.png")
        write_image(str(files[-1]), picture)
    sheet = contact_sheet(cells, columns=4, title=f"Training samples of {cfg.DATASETS.TRAIN[0]}")
    write_image(str(out / "samples.png"), sheet)
    return [*files, out / "samples.png"]


def _content(sample: dict) -> str:
    if "sem_seg" in sample:
        return f"{len(sample['sem_seg'].unique())} labels"
    if "label" in sample:
        return "positive" if sample["label"] > 0 else "negative"
    return f"{len(sample['instances'])} objects"


def sample_pixels(sample: dict, image_format: str) -> np.ndarray:
    """Return the image of a mapped sample as (h, w, 3) uint8 BGR.

    Args:
        sample: with ``image`` (C, H, W), 0 to 255.
        image_format: its channel order, ``INPUT.FORMAT``.
    """
    pixels: torch.Tensor = sample["image"].permute(1, 2, 0).float().clamp(0, 255)
    rgb = detection_utils.convert_image_to_rgb(pixels.round().byte(), image_format)
    return np.ascontiguousarray(rgb[:, :, ::-1])


def sample_masks(instances: Instances) -> np.ndarray | None:
    """Return the masks of a mapped sample.

    Args:
        instances: on the CPU, with ``gt_masks``, or ``gt_contours`` whose inside is filled, or
            neither.

    Returns:
        (M, H, W) bool; None if there are boxes only.
    """
    if instances.has("gt_masks"):
        return instances.gt_masks.tensor.numpy().astype(bool)
    if not instances.has("gt_contours"):
        return None
    contours = instances.gt_contours
    masks = np.zeros((len(instances), *instances.image_size), dtype=np.uint8)
    for mask, points in zip(masks, contours.points.split(contours.lengths.tolist()), strict=True):
        compat.opencv().fillPoly(mask, [points.numpy().astype(np.int32)], 1)
    return masks.view(bool)


def draw_sample(sample: dict, image_format: str, names: list[str]) -> np.ndarray:
    """Draw masks, boxes and class names of one mapped sample over its image, or its label map.

    Args:
        sample: what a training mapper gives: ``image`` (C, H, W) and ``instances`` or ``sem_seg``;
            where it has ``boxes_inclusive``, the far sides of its boxes are their last pixels.
        image_format: channel order of the image, ``INPUT.FORMAT``.
        names: class names by contiguous index.

    Returns:
        (h, w, 3) uint8 BGR, small images enlarged.
    """
    if "sem_seg" in sample:
        pixels = sample_pixels(sample, image_format)
        return draw_labels(pixels, sample["sem_seg"].numpy(), names, min_side=256)
    instances = sample["instances"]
    last_pixel = np.array([0, 0, 1, 1]) * bool(sample.get("boxes_inclusive", False))
    return draw_instances(
        sample_pixels(sample, image_format),
        masks=sample_masks(instances),
        boxes=instances.gt_boxes.tensor.numpy() + last_pixel,
        classes=instances.gt_classes.tolist(),
        names=names,
        style=DrawStyle(boxes=True, min_side=256),
    )


def draw_labels(
    image_bgr: np.ndarray, labels: np.ndarray, names: list[str], *, min_side: int = 0
) -> np.ndarray:
    """Draw the regions of a label map, each class in a colour of its own.

    Args:
        image_bgr: (H, W, 3) uint8; not modified.
        labels: (H, W) int; what is no class, such as ignored pixels, is left as it is.
        names: class names by label.
        min_side: see ``DrawStyle``.

    Returns:
        (H, W, 3) uint8, enlarged by a whole factor where ``min_side`` asks for it.
    """
    classes = [label for label in np.unique(labels).tolist() if 0 <= label < len(names)]
    masks = labels == np.array(classes, dtype=labels.dtype)[:, None, None]
    return draw_instances(
        image_bgr,
        masks=masks,
        classes=classes,
        names=names,
        ids=classes,
        style=DrawStyle(min_side=min_side),
    )
