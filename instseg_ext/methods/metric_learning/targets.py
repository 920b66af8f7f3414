"""What class the mask of a cell has, with the embeddings of the moment.

Shape shorthand: N cells of an image, P of them drawn, M objects, T similarities, C classes, D
numbers of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from instseg_ext.layers.mask_ops import chunk_slices, masks_per_chunk
from instseg_ext.methods.metric_learning.labels import CellSample
from instseg_ext.methods.metric_learning.similarity import squared_distances

__all__ = ["class_targets"]

# Distances and masks of some of the drawn cells to all cells, at one time, MiB.
_BUDGET_MB = 64


@torch.no_grad()
def class_targets(
    embeddings: Tensor,
    labels: Tensor,
    sample: CellSample,
    classes: Tensor,
    *,
    radii: Tensor,
    min_iou: float,
    num_classes: int,
) -> Tensor:
    """Compare the masks that drawn cells would give with the objects.

    The mask of a cell is all cells whose squared distance is not above a radius. Cells of nobody
    count neither in masks nor in objects. As objects do not share cells, a mask overlaps at most
    one of them by more than half.

    Args:
        embeddings: (N, D) float32.
        labels: (N,) int64, see ``cell_labels``.
        sample: the P drawn cells.
        classes: (M,) int64 in [0, C) of the objects.
        radii: (T,) squared distances.
        min_iou: IoU from which on a mask has the class of an object, also one that the cell itself
            is not in.
        num_classes: C.

    Returns:
        (P, T) int64 in [0, C]; C for the background, which all cells of the background have.
    """
    num_objects = len(classes)
    owners = torch.arange(num_objects, device=labels.device)
    # One product counts the common cells with each object and, in the last column, those of all.
    counted = torch.cat([labels[:, None] == owners, (labels >= 0)[:, None]], dim=1).float()
    sizes = sample.sizes[:num_objects]
    by_object = torch.cat([classes, classes.new_full((1,), num_classes)])
    targets = []
    for some in chunk_slices(len(sample.cells), masks_per_chunk(8 * len(labels), _BUDGET_MB)):
        distances = squared_distances(embeddings[sample.cells[some]], embeddings)
        per_tau = []
        for limit in radii:
            common = (distances <= limit).float() @ counted
            union = common[:, -1:] + sizes - common[:, :-1]
            iou = common[:, :-1] / union.clamp(min=1)
            # Without an object the added column is the best.
            iou = torch.cat([iou, iou.new_full((len(iou), 1), min_iou * 0.5)], dim=1)
            best, which = iou.max(dim=1)
            per_tau.append(by_object[torch.where(best >= min_iou, which, num_objects)])
        targets.append(torch.stack(per_tau, dim=1))
    in_background = (sample.owners == num_objects)[:, None]
    return torch.where(in_background, num_classes, torch.cat(targets))
