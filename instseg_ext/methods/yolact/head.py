"""YOLACT's head: boxes, classes and mask coefficients of all anchors, and the prototypes.

Shape shorthand: N images, K classes, A anchors per cell, k prototypes, (hp, wp) their size, (h3,
w3) the size of the finest level, P anchors of all levels. Anchors are level-major, then row-major,
then in the order of the channels. Background is the last class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from instseg_ext.methods.yolact.assembly import assemble_logits
from instseg_ext.methods.yolact.convs import build_conv
from instseg_ext.methods.yolact.mask_iou import MaskIoUNet
from instseg_ext.methods.yolact.protonet import ProtoNet

__all__ = ["YOLACTHead", "YOLACTOutputs", "to_reference_layout"]


class YOLACTOutputs(NamedTuple):
    """Raw outputs of the head.

    Attributes:
        box_deltas: (N, P, 4), relative to the anchors.
        class_logits: (N, P, K + 1).
        coefficients: (N, P, k) in (-1, 1).
        prototypes: (N, k, hp, wp), not negative.
        semantic_logits: (N, K, h3, w3), None in eval mode.
        level_sizes: (height, width) of each level.
    """

    box_deltas: Tensor
    class_logits: Tensor
    coefficients: Tensor
    prototypes: Tensor
    semantic_logits: Tensor | None
    level_sizes: tuple[tuple[int, int], ...]


def to_reference_layout(raw: YOLACTOutputs) -> dict[str, Tensor]:
    """Return raw outputs in the order of the authors' code, under its names.

    Returns:
        ``loc`` (N, P, 4), ``conf`` (N, P, 1 + K) logits with background first, ``mask`` (N, P, k),
        ``proto`` (N, hp, wp, k) and, in training, ``segm`` (N, K, h3, w3).
    """
    reference = {
        "loc": raw.box_deltas,
        "conf": raw.class_logits.roll(1, dims=2),
        "mask": raw.coefficients,
        "proto": raw.prototypes.permute(0, 2, 3, 1),
    }
    if raw.semantic_logits is not None:
        reference["segm"] = raw.semantic_logits
    return reference


class YOLACTHead(nn.Module):
    """Everything of YOLACT (arXiv:1904.02689) and YOLACT++ behind the pyramid.

    One shared convolution and three predictors run on every level; prototypes and, in training,
    per-class semantic maps are made from the finest one. ``mask_iou`` is called by the model on the
    masks it has chosen; it is None without mask scoring.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        num_anchors: int,
        num_classes: int,
        num_protos: int = 32,
        width: int = 256,
        mask_iou: bool = False,
    ) -> None:
        """Create the convolutions.

        Args:
            input_shape: channels of every pyramid level; they must be equal.
            in_features: levels that carry anchors, finest first.
            num_anchors: A.
            num_classes: K.
            num_protos: k.
            width: channels of the shared convolution and the prototype branch.
            mask_iou: whether to have the network that scores masks.
        """
        super().__init__()
        self.in_features = tuple(in_features)
        channels = input_shape[in_features[0]].channels
        self.shared_conv = build_conv(channels, width, relu=True)
        self.box_pred = build_conv(width, num_anchors * 4)
        self.class_pred = build_conv(width, num_anchors * (num_classes + 1))
        self.coefficient_pred = build_conv(width, num_anchors * num_protos)
        self.num_anchors = num_anchors
        self.protonet = ProtoNet(channels, width=width, num_protos=num_protos)
        self.semantic = build_conv(channels, num_classes, 1)
        self.mask_iou = MaskIoUNet(num_classes) if mask_iou else None

    def forward(self, features: Mapping[str, Tensor]) -> YOLACTOutputs:
        """Compute the raw outputs.

        Args:
            features: pyramid levels by name, (N, D, h_l, w_l).
        """
        levels = [features[name] for name in self.in_features]
        shared = [self.shared_conv(x) for x in levels]
        return YOLACTOutputs(
            box_deltas=self._predict(self.box_pred, shared),
            class_logits=self._predict(self.class_pred, shared),
            coefficients=self._predict(self.coefficient_pred, shared).tanh(),
            prototypes=self.protonet(levels[0]),
            semantic_logits=self.semantic(levels[0]) if self.training else None,
            level_sizes=tuple((x.shape[-2], x.shape[-1]) for x in levels),
        )

    def _predict(self, layer: nn.Module, shared: Sequence[Tensor]) -> Tensor:
        """Return (N, P, D) from the maps of all levels."""
        # Channels are anchor-major. Moving them last copies nothing in channels_last.
        maps = [layer(x).permute(0, 2, 3, 1) for x in shared]
        return torch.cat(
            [x.reshape(len(x), -1, x.shape[-1] // self.num_anchors) for x in maps], dim=1
        )

    def masks(self, raw: YOLACTOutputs, selection: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Make mask probabilities at the prototypes' size, not cropped by any box.

        Args:
            raw: outputs of ``forward``.
            selection: per image (n,) int64 anchors in [0, P), repetitions allowed; None means all.

        Returns:
            Per image (n, hp, wp) float32 in [0, 1].
        """
        if selection is None:
            selection = [slice(None)] * len(raw.prototypes)
        return [
            assemble_logits(prototypes, coefficients[anchors]).sigmoid()
            for prototypes, coefficients, anchors in zip(
                raw.prototypes, raw.coefficients, selection, strict=True
            )
        ]
