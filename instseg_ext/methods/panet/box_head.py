"""PANet's box heads: detectron2's, with a first layer per level."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from instseg_ext.config import check_choice
from instseg_ext.methods.panet.config import FUSIONS, check_region_heads
from instseg_ext.methods.panet.fusion import (
    LevelConvs,
    LevelLinears,
    build_conv,
    normalise_vectors,
)
from instseg_ext.methods.panet.pooler import PooledRegions

__all__ = ["PANetBoxHead"]


@ROI_BOX_HEAD_REGISTRY.register()
class PANetBoxHead(nn.Module):
    """3x3 convolutions and fully connected layers, the first of all of them once per level.

    Four convolutions and one layer are the published default, no convolution and two layers its
    "2fc". As published, the norm follows the convolutions or, where there are none, the fully
    connected layers; a fully connected layer behind convolutions has none.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_levels: int,
        num_conv: int,
        conv_dim: int,
        num_fc: int,
        fc_dim: int,
        norm: str,
        fusion: str,
    ) -> None:
        """Create the layers.

        Args:
            input_shape: channels, height and width of a region on each level.
            num_levels: levels that a region is pooled from.
            num_conv: convolutions.
            conv_dim: their channels.
            num_fc: fully connected layers.
            fc_dim: their outputs.
            norm: normalisation layer, "" for none.
            fusion: "max" or "sum".

        Raises:
            ValueError: if there is no layer at all.
        """
        super().__init__()
        if num_conv + num_fc < 1:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.NUM_CONV and NUM_FC must not both be 0: the levels are fused "
                "after the first layer."
            )
        self.num_conv, self.num_fc = num_conv, num_fc
        cells = input_shape.height * input_shape.width
        if num_conv:
            self.conv1 = LevelConvs(num_levels, input_shape.channels, conv_dim, norm, fusion)
            self._output_shape = replace(input_shape, channels=conv_dim)
            in_dim = conv_dim * cells
        else:
            self.fc1 = LevelLinears(num_levels, input_shape.channels * cells, fc_dim, fusion)
            norms = [get_norm(norm, fc_dim) for _ in self.fc1] if norm else None
            self.fc1_norm = nn.ModuleList(norms) if norms else None
            in_dim = fc_dim
        for k in range(2, num_conv + 1):
            self.add_module(f"conv{k}", build_conv(conv_dim, conv_dim, norm))
        self._further_fcs = range(1 if num_conv else 2, num_fc + 1)
        for k in self._further_fcs:
            fc = nn.Linear(in_dim, fc_dim)
            c2_xavier_fill(fc)
            self.add_module(f"fc{k}", fc)
            self.add_module(f"fc{k}_norm", None if num_conv else get_norm(norm, fc_dim))
            in_dim = fc_dim
        if num_fc:
            self._output_shape = ShapeSpec(channels=fc_dim)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the config key, if the regions would not come from all levels or
                ``MODEL.PANET.FUSION`` is unknown.
        """
        check_region_heads(cfg, "PANetBoxHead")
        node = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "num_levels": len(cfg.MODEL.ROI_HEADS.IN_FEATURES),
            "num_conv": node.NUM_CONV,
            "conv_dim": node.CONV_DIM,
            "num_fc": node.NUM_FC,
            "fc_dim": node.FC_DIM,
            "norm": node.NORM,
            "fusion": check_choice("MODEL.PANET.FUSION", cfg.MODEL.PANET.FUSION, FUSIONS),
        }

    @property
    def output_shape(self) -> ShapeSpec:
        """Return the shape of the output, which detectron2's predictor asks for."""
        return self._output_shape

    def forward(self, regions: PooledRegions) -> Tensor:
        """Map R regions to (R, FC_DIM), or (R, CONV_DIM, P, P) without fully connected layers."""
        if self.num_conv:
            x = self.conv1(regions)
            for k in range(2, self.num_conv + 1):
                x = self.get_submodule(f"conv{k}")(x)
        else:
            x = self.fc1(regions, self.fc1_norm)
        for k in self._further_fcs:
            x = getattr(self, f"fc{k}")(x.flatten(1))
            x = normalise_vectors(x, getattr(self, f"fc{k}_norm")).relu()
        return x
