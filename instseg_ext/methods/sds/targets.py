"""What the networks, the classifiers and the refinement of SDS learn from (Sec. 3 of its sheet).

The objects of an image are its first regions, as ``RegionProposals.intersect`` puts them.

Shapes: R regions of which the first G are the objects, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WindowOptions", "draw_windows", "latent_positives", "svm_negatives", "window_labels"]


@dataclass(frozen=True)
class WindowOptions:
    """How windows are drawn for fine-tuning; see the config keys of the same names.

    Attributes:
        foreground: windows of each image with an object.
        background: windows without.
        min_iou: lowest IoU with an object of a region that has its class.
    """

    foreground: int = 8
    background: int = 24
    min_iou: float = 0.5


def window_labels(iou: Tensor, gt_classes: Tensor, num_classes: int, min_iou: float) -> Tensor:
    """Label regions for fine-tuning.

    Args:
        iou: (R, G) of regions and objects.
        gt_classes: (G,) int64.
        num_classes: C, the label of the background.
        min_iou: see ``WindowOptions``.

    Returns:
        (R,) int64: the class of the object that a region overlaps most.
    """
    labels = torch.full((len(iou),), num_classes, dtype=torch.int64, device=iou.device)
    if iou.shape[1] == 0:
        return labels
    best, which = iou.max(dim=1)
    return torch.where(best >= min_iou, gt_classes[which], labels)


def draw_windows(labels: Tensor, num_classes: int, options: WindowOptions) -> Tensor:
    """Draw the windows of an image, with replacement, so many with an object and so many without.

    Where there is no window of one kind, those of the other take its place, so that every image
    counts alike.

    Args:
        labels: (R,) of ``window_labels``.
        num_classes: C.
        options: numbers.

    Returns:
        (W,) int64 regions, those with objects first; empty if there is no region.
    """
    objects = (labels < num_classes).nonzero().flatten()
    nothing = (labels == num_classes).nonzero().flatten()
    total = options.foreground + options.background
    wanted = options.foreground if len(nothing) else total
    wanted = wanted if len(objects) else 0
    drawn = []
    for pool, number in ((objects, wanted), (nothing, total - wanted)):
        if len(pool):
            drawn.append(pool[torch.randint(len(pool), (number,), device=pool.device)])
    return torch.cat(drawn) if drawn else labels.new_zeros(0)


def svm_negatives(iou: Tensor, gt_classes: Tensor, label: int, max_iou: float) -> Tensor:
    """Find the negatives of a class: its bad regions, and the objects of other classes.

    Args:
        iou: (R, G).
        gt_classes: (G,).
        label: the class.
        max_iou: regions are negatives below this IoU with every object of the class.

    Returns:
        (R,) bool.
    """
    objects = len(gt_classes)
    of_class = gt_classes == label
    negative = torch.ones(len(iou), dtype=torch.bool, device=iou.device)
    if of_class.any():
        negative = iou[:, of_class].amax(dim=1) < max_iou
    negative[:objects] = ~of_class
    return negative


def latent_positives(
    iou: Tensor, gt_classes: Tensor, label: int, scores: Tensor, min_iou: float
) -> Tensor:
    """Choose, for each object of a class, the best scored region that overlaps it enough.

    Args:
        iou: (R, G).
        gt_classes: (G,).
        label: the class.
        scores: (R,) of the class.
        min_iou: strict lower bound of the IoU.

    Returns:
        (P,) int64 regions; an object that no region overlaps enough has none.
    """
    objects = len(gt_classes)
    chosen = []
    for column in (gt_classes == label).nonzero().flatten().tolist():
        near = iou[:, column] > min_iou
        near[:objects] = False
        if near.any():
            chosen.append(torch.where(near, scores, -torch.inf).argmax())
    return torch.stack(chosen) if chosen else gt_classes.new_zeros(0)
