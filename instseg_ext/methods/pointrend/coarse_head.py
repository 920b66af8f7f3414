"""The fully connected head that looks at a whole region.

Shapes: R regions, K classes, S side of the pooled features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from instseg_ext.methods.pointrend.base import total_channels

__all__ = ["CoarseHead"]


class CoarseHead(nn.Module):
    """Convolutions that shrink the features, then fully connected layers (Sec. 4.1 of the paper).

    It predicts the coarse mask of each class (arXiv:1912.08193), or, in implicit PointRend, the
    parameters of a point head. Names and initial weights are those of detectron2's project.
    """

    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dim: int,
        fc_dims: Sequence[int],
        output_shape: Sequence[int],
    ) -> None:
        """Create the layers.

        Args:
            input_shape: channels, height and width of the pooled features.
            conv_dim: channels of the convolutions.
            fc_dims: widths of the fully connected layers before the prediction, at least one.
            output_shape: what is predicted for a region, (K, side, side) for masks.

        Raises:
            ValueError: naming the config key, if one of these does not make a head.
        """
        super().__init__()
        _check(input_shape, conv_dim, fc_dims)
        self.output_shape = tuple(output_shape)
        convs = []
        if input_shape.channels > conv_dim:
            self.reduce_channel_dim_conv = nn.Conv2d(input_shape.channels, conv_dim, 1)
            convs.append("reduce_channel_dim_conv")
        self.reduce_spatial_dim_conv = nn.Conv2d(conv_dim, conv_dim, 2, stride=2)
        convs.append("reduce_spatial_dim_conv")
        width = conv_dim * (input_shape.height // 2) * (input_shape.width // 2)
        fcs = []
        for number, fc_dim in enumerate(fc_dims, start=1):
            self.add_module(f"fc{number}", nn.Linear(width, fc_dim))
            fcs.append(f"fc{number}")
            width = fc_dim
        self.prediction = nn.Linear(width, math.prod(self.output_shape))
        nn.init.normal_(self.prediction.weight, std=0.001)
        nn.init.zeros_(self.prediction.bias)
        for name in convs:
            weight_init.c2_msra_fill(getattr(self, name))
        for name in fcs:
            weight_init.c2_xavier_fill(getattr(self, name))
        self._convs, self._fcs = tuple(convs), tuple(fcs)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], output_shape: Sequence[int]
    ) -> CoarseHead:
        """Build the head of ``MODEL.ROI_MASK_HEAD`` for an output of any shape."""
        node = cfg.MODEL.ROI_MASK_HEAD
        key = "MODEL.ROI_MASK_HEAD.IN_FEATURES"
        pooled = ShapeSpec(
            channels=total_channels(key, node.IN_FEATURES, input_shape),
            height=node.POOLER_RESOLUTION,
            width=node.POOLER_RESOLUTION,
        )
        fc_dims = [node.FC_DIM] * node.NUM_FC
        return cls(pooled, conv_dim=node.CONV_DIM, fc_dims=fc_dims, output_shape=output_shape)

    def forward(self, pooled: Tensor) -> Tensor:
        """Predict.

        Args:
            pooled: (R, C, S, S).

        Returns:
            (R, *output_shape) float32.
        """
        x = pooled
        for name in self._convs:
            x = F.relu(getattr(self, name)(x))
        x = torch.flatten(x, start_dim=1)
        for name in self._fcs:
            x = F.relu(getattr(self, name)(x))
        return self.prediction(x).float().view(x.shape[0], *self.output_shape)


def _check(shape: ShapeSpec, conv_dim: int, fc_dims: Sequence[int]) -> None:
    """Refuse sizes that do not fit each other."""
    if shape.channels < conv_dim:
        raise ValueError(
            f"MODEL.ROI_MASK_HEAD.CONV_DIM {conv_dim} must not exceed the {shape.channels} "
            "channels of MODEL.ROI_MASK_HEAD.IN_FEATURES."
        )
    if shape.height % 2 or shape.width % 2:
        raise ValueError(f"MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION must be even, not {shape.height}.")
    if not fc_dims:
        raise ValueError("MODEL.ROI_MASK_HEAD.NUM_FC must be at least 1.")
