"""Classes by several classifiers, one for each IoU threshold ("integral loss"), and boxes.

Shapes: R regions, K classes, U classifiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import Tensor, nn

from instseg_ext.methods.multipathnet.sampling import labels_by_threshold
from instseg_ext.methods.multipathnet.towers import RegionFeatures

__all__ = ["IntegralPredictor", "integral_loss"]


class IntegralPredictor(FastRCNNOutputLayers):
    """U classifiers ``cls_score.<number>`` on the features of all crops, and one ``bbox_pred``.

    All of them start from the same weights. Probabilities are averaged, not logits.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        box_dim: int,
        thresholds: Sequence[float],
        **kwargs: Any,
    ) -> None:
        """Create the layers.

        Args:
            input_shape: channels of the features that are classified.
            box_dim: channels of those that boxes are read off.
            thresholds: IoU from which a region is foreground for each classifier, rising.
            **kwargs: the arguments of ``FastRCNNOutputLayers``.
        """
        super().__init__(input_shape, **kwargs)
        first, out_dim = self.cls_score, self.bbox_pred.out_features
        self.cls_score = nn.ModuleList(
            nn.Linear(first.in_features, first.out_features) for _ in thresholds
        )
        for layer in self.cls_score:
            layer.load_state_dict(first.state_dict())
        self.bbox_pred = nn.Linear(box_dim, out_dim)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.bbox_pred.bias)
        self.foreground_ious = tuple(thresholds)
        self.register_buffer("thresholds", torch.tensor(thresholds), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec, box_dim: int) -> dict[str, Any]:
        """Return the constructor arguments."""
        return {
            **super().from_config(cfg, input_shape),
            "box_dim": box_dim,
            "thresholds": cfg.MODEL.MULTIPATH.IOU_THRESHOLDS,
        }

    def forward(self, x: RegionFeatures) -> tuple[Tensor, Tensor]:
        """Return logits (R, U, K + 1), background last, and deltas (R, 4 K) or (R, 4)."""
        logits = torch.stack([layer(x.classes) for layer in self.cls_score], dim=1)
        return logits, self.bbox_pred(x.boxes)

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances], turn: int = -1
    ) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_box_reg``.

        Args:
            predictions: of ``forward``.
            proposals: of each image, the drawn regions, see ``sample_regions``.
            turn: number of the only classifier that learns, -1 for all.
        """
        logits, deltas = predictions
        if not len(logits):
            nothing = (logits.sum() + deltas.sum()) * 0.0
            return {"loss_cls": nothing, "loss_box_reg": nothing}
        classes = torch.cat([x.gt_classes for x in proposals])
        overlap = torch.cat([x.gt_iou for x in proposals])
        labels = labels_by_threshold(classes, overlap, self.thresholds, self.num_classes)
        boxes = torch.cat([x.proposal_boxes.tensor for x in proposals])
        # an image without objects has background only, whose boxes are not compared
        targets = [(x.gt_boxes if x.has("gt_boxes") else x.proposal_boxes) for x in proposals]
        losses = {
            "loss_cls": integral_loss(logits, labels, turn),
            "loss_box_reg": self.box_reg_loss(
                boxes, torch.cat([x.tensor for x in targets]), deltas, classes
            ),
        }
        return {name: value * self.loss_weight.get(name, 1.0) for name, value in losses.items()}

    def mean_probs(self, logits: Tensor) -> Tensor:
        """Return probabilities (R, K + 1), the mean of all classifiers', of (R, U, K + 1)."""
        return F.softmax(logits.float(), dim=2).mean(dim=1)


def integral_loss(logits: Tensor, labels: Tensor, turn: int = -1) -> Tensor:
    """Return the mean cross entropy of all classifiers ("integral loss" of arXiv:1604.02135).

    Args:
        logits: (R, U, K + 1), at least one region.
        labels: (R, U) int64 in [0, K].
        turn: number of the only classifier that counts, -1 for all. The others have a gradient of
            zero.
    """
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    if turn < 0:
        return losses.mean()
    chosen = torch.arange(losses.shape[1], device=losses.device) == turn
    return torch.where(chosen, losses, losses.new_zeros(())).sum() / len(losses)
