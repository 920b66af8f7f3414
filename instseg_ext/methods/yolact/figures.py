"""Pictures of how YOLACT makes a mask: ``instseg visualize prototypes``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from instseg_ext.method import FigurePicture
from instseg_ext.methods.yolact.assembly import assemble_logits, cropped_masks
from instseg_ext.methods.yolact.inference import Detections
from instseg_ext.visualization.contact_sheet import contact_sheet, write_image
from instseg_ext.visualization.draw import DrawStyle, class_label, draw_instances
from instseg_ext.visualization.maps import draw_map, draw_signed_map

__all__ = ["draw_prototypes"]

logger = logging.getLogger(__name__)

# Prototypes whose part in the mask is shown one by one.
_STEPS = 8
_CELL = 200


@torch.no_grad()
def draw_prototypes(
    cfg: CfgNode,
    make_predictor: Callable[[], Any],
    pictures: Sequence[FigurePicture],
    folder: Path,
) -> list[Path]:
    """Draw the prototypes of each picture and how they make the mask of its best detection.

    Args:
        cfg: not read; the predictor has it.
        make_predictor: gives an ``engine.predictor.Predictor`` with a YOLACT model.
        pictures: their annotations are not read.
        folder: where ``<name>_prototypes.png`` and ``<name>_assembly.png`` go; the second is left
            out when nothing is detected.

    Returns:
        The files, in the order of the pictures.
    """
    predictor = make_predictor()
    model = predictor.model
    files = []
    for name, picture, _ in pictures:
        images = model.preprocess_image([predictor.to_input(picture)])
        with model.precision():
            raw = model.head(model.backbone(images.tensor))
        prototypes, found = raw.prototypes[0].float().cpu(), model.detections(raw)[0]
        sheets = {"prototypes": _prototype_sheet(picture, prototypes)}
        if len(found.scores):
            sheets["assembly"] = _assembly_sheet(picture, prototypes, found, predictor.names)
        else:
            logger.info("Nothing is detected in %s: only its prototypes are drawn.", name)
        for kind, sheet in sheets.items():
            files.append(Path(folder) / f"{name}_{kind}.png")
            write_image(str(files[-1]), sheet)
    return files


def _prototype_sheet(picture: np.ndarray, prototypes: Tensor) -> np.ndarray:
    """Draw (k, h, w) prototypes, each scaled to its own largest value."""
    size_hw = picture.shape[:2]
    cells = [(picture, "picture")]
    cells += [
        (draw_map(p, size_hw), f"{i}: 0 to {p.max():.2f}") for i, p in enumerate(prototypes.numpy())
    ]
    return contact_sheet(cells, columns=6, cell_width=_CELL, title="Prototypes")


def _assembly_sheet(
    picture: np.ndarray, prototypes: Tensor, found: Detections, names: Sequence[str]
) -> np.ndarray:
    """Draw what each prototype adds to the best detection, and what becomes of the sum."""
    size_hw = picture.shape[:2]
    coefficients, box = found.coefficients[:1].cpu(), found.boxes[:1].cpu()
    parts = (coefficients[0, :, None, None] * prototypes).numpy()
    mask = cropped_masks(prototypes, coefficients, box)[0].numpy()
    # What matters is what a prototype adds where the mask can be.
    share = np.abs(parts)[:, mask > 0].sum(axis=1)
    order = np.argsort(-share, kind="stable")[:_STEPS]
    logits = assemble_logits(prototypes, coefficients)[0].numpy()
    limit = max(np.abs(logits).max(), np.abs(parts).max())
    cells, total = [], np.zeros_like(logits)
    for step, i in enumerate(order, start=1):
        total = total + parts[i]
        cells.append(
            (
                draw_signed_map(parts[i], size_hw, limit),
                f"{coefficients[0, i]:+.2f} x prototype {i}",
            )
        )
        cells.append((draw_signed_map(total, size_hw, limit), f"sum of {step}"))
    label = class_label(int(found.classes[0]), float(found.scores[0]), names)
    cells += [
        (draw_signed_map(logits, size_hw, limit), f"all {len(prototypes)}"),
        (draw_map(1 / (1 + np.exp(-logits)), size_hw, 1.0), "sigmoid"),
        (draw_map(mask, size_hw, 1.0), "cut to the box"),
        (_draw_result(picture, mask, box), "above one half"),
    ]
    return contact_sheet(
        cells, columns=4, cell_width=_CELL, title=f"How the mask of {label} is made"
    )


def _draw_result(picture: np.ndarray, mask: np.ndarray, box: Tensor) -> np.ndarray:
    height, width = picture.shape[:2]
    low = torch.from_numpy(mask)[None, None]
    full = torch.nn.functional.interpolate(low, (height, width), mode="bilinear")[0] > 0.5
    pixels = (box * torch.tensor([width, height, width, height])).numpy()
    return draw_instances(picture, masks=full.numpy(), boxes=pixels, style=DrawStyle(boxes=True))
