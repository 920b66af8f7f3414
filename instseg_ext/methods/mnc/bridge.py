"""From stage 3 to stage 4: each region becomes the box that its class predicts."""

from __future__ import annotations

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor

from instseg_ext.layers.gradient_limit import GradientLimit
from instseg_ext.structures.legacy_boxes import add_last_pixel, clip_to_pixels

__all__ = ["chosen_classes", "refine_boxes"]


def chosen_classes(logits: Tensor, *, foreground_only: bool) -> Tensor:
    """Return the class whose box each region becomes.

    Args:
        logits: (R, K + 1), background last; no gradient leads to them from here.
        foreground_only: as in training. At inference background counts: its deltas are not
            trained, so that such a box hardly moves.

    Returns:
        (R,) int64.
    """
    return (logits[:, :-1] if foreground_only else logits).argmax(dim=1)


def refine_boxes(
    boxes: Tensor,
    deltas: Tensor,
    classes: Tensor,
    transform: Box2BoxTransform,
    image_size: tuple[int, int],
    *,
    limit: GradientLimit | None = None,
    legacy: bool = False,
) -> Tensor:
    """Decode and clip the box of one class per region.

    Gradients flow to ``boxes`` and ``deltas``. A box that must be clipped gives its deltas none, as
    published.

    Args:
        boxes: (R, 4) XYXY.
        deltas: (R, (K + 1) * 4).
        classes: (R,) int64.
        transform: decodes the deltas.
        image_size: (H, W) to clip to.
        limit: bound of the gradient of the deltas; None cuts it, and that of ``boxes``, off.
        legacy: boxes grow by one pixel to the right and to the bottom, and keep one inside the
            image, as in the authors' code.

    Returns:
        (R, 4). Boxes that are no numbers are left where they were.
    """
    pixel = 1.0 if legacy else 0.0
    rows = torch.arange(len(boxes), device=boxes.device)
    deltas = deltas.unflatten(1, (-1, 4))[rows, classes].float()
    with torch.no_grad():
        new = add_last_pixel(transform.apply_deltas(deltas, boxes), pixel)
        clipped = clip_to_pixels(new, image_size, pixel)
        inside = new == clipped
        finite = new.isfinite().all(dim=1, keepdim=True)
    if limit is not None:
        deltas = limit.apply(deltas, inside.all(dim=1))
        new = add_last_pixel(transform.apply_deltas(deltas, boxes), pixel)
    # Chosen, not clipped: a side on the border keeps its whole gradient.
    return torch.where(finite, torch.where(inside, new, clipped), boxes.detach())
