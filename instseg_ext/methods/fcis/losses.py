"""What FCIS reads out of a region's pooled score maps, and its losses.

Shapes: R regions, K foreground classes, P side of the pooled maps. ``scores`` is (R, K + 1, 2, P,
P), background last; of the pair, the first map is outside and the second inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from instseg_ext.methods.fcis.sampling import Regions

__all__ = [
    "RegionLosses",
    "class_logits",
    "hardest",
    "image_losses",
    "mask_logits",
    "region_losses",
]


def class_logits(scores: Tensor) -> Tensor:
    """Return (R, K + 1): the larger map of each pair, averaged (section 2.2 of arXiv:1611.07709).

    Where both are equal, the gradient goes to the outside map.
    """
    outside, inside = scores.unbind(2)
    return torch.where(inside > outside, inside, outside).mean(dim=(2, 3))


def mask_logits(scores: Tensor, classes: Tensor) -> Tensor:
    """Return (R, P, P): inside minus outside of one class per region.

    Its sigmoid is the softmax over the pair.

    Args:
        scores: see the module.
        classes: (R,) int64.
    """
    pair = scores[torch.arange(len(scores), device=scores.device), classes]
    return pair[:, 1] - pair[:, 0]


@dataclass(frozen=True)
class RegionLosses:
    """Unweighted losses of each region, (R,) float32; mask and box are 0 for background.

    Attributes:
        classes: cross entropy over the classes.
        masks: cross entropy over inside and outside, mean over the map.
        boxes: smooth L1, sum over the four deltas.
    """

    classes: Tensor
    masks: Tensor
    boxes: Tensor

    def weighted(self, weights: tuple[float, float, float]) -> Tensor:
        """Return (R,): the sum of all three, as regions are ranked by it."""
        return weights[0] * self.classes + weights[1] * self.masks + weights[2] * self.boxes


def region_losses(scores: Tensor, deltas: Tensor, regions: Regions) -> RegionLosses:
    """Compare the predictions for regions with their targets.

    Args:
        scores: see the module.
        deltas: (R, 4) predicted.
        regions: R regions with targets.
    """
    foreground = regions.foreground(scores.shape[1] - 1)
    of_class = F.cross_entropy(class_logits(scores), regions.classes, reduction="none")
    logits = mask_logits(scores, regions.classes)[foreground]
    of_mask = F.binary_cross_entropy_with_logits(logits, regions.masks, reduction="none")
    of_box = F.smooth_l1_loss(
        deltas[foreground], regions.deltas[foreground], reduction="none", beta=1.0
    )
    zeros = of_class.new_zeros(len(of_class))
    rows = foreground.nonzero()[:, 0]
    return RegionLosses(
        of_class,
        zeros.index_put((rows,), of_mask.mean(dim=(1, 2))),
        zeros.index_put((rows,), of_box.sum(dim=1)),
    )


def hardest(losses: Tensor, number: int) -> Tensor:
    """Return the index of the ``number`` largest of (R,) losses, all if there are fewer."""
    return losses.topk(min(number, len(losses))).indices


def image_losses(
    losses: RegionLosses, num_regions: int, weights: tuple[float, float, float]
) -> dict[str, Tensor]:
    """Return the losses of one image.

    The class loss is the mean over the regions. Mask and box losses are divided by the number of
    regions that an image should have, whatever it has and however few of them are foreground.

    Args:
        losses: of the image's regions; none is fine.
        num_regions: how many an image should have.
        weights: of the class, mask and box losses.
    """
    return {
        "loss_cls": weights[0] * losses.classes.sum() / max(len(losses.classes), 1),
        "loss_mask": weights[1] * losses.masks.sum() / num_regions,
        "loss_box_reg": weights[2] * losses.boxes.sum() / num_regions,
    }
