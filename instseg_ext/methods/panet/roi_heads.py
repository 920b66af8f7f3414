"""PANet's region heads: the shared ones, with regions of every level for PANet's heads."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY

from instseg_ext.methods.panet.box_head import PANetBoxHead
from instseg_ext.methods.panet.mask_head import PANetFusionMaskHead
from instseg_ext.methods.panet.pooler import AllLevelPooler
from instseg_ext.modeling.rcnn import InstSegROIHeads

__all__ = ["PANetROIHeads"]


@ROI_HEADS_REGISTRY.register()
class PANetROIHeads(InstSegROIHeads):
    """``InstSegROIHeads`` that gives PANet's heads their regions from all levels.

    Other heads beside them get regions from one level each, as everywhere, so that the parts of the
    method can be switched off one by one.
    """

    pools_all_levels = True

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: if ``MODEL.PANET.LEGACY_D1`` is set in a model that ignores it.
        """
        if cls is PANetROIHeads and cfg.MODEL.PANET.LEGACY_D1:
            raise ValueError(
                "MODEL.PANET.LEGACY_D1 needs MODEL.META_ARCHITECTURE PANetRCNN, not "
                f"{cfg.MODEL.META_ARCHITECTURE}."
            )
        return super().from_config(cfg, input_shape)

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_box_head(cfg, input_shape)
        if isinstance(arguments["box_head"], PANetBoxHead):
            arguments["box_pooler"] = _all_level_pooler("ROI_BOX_HEAD", cfg, input_shape)
        return arguments

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        arguments = super()._init_mask_head(cfg, input_shape)
        if isinstance(arguments.get("mask_head"), PANetFusionMaskHead):
            arguments["mask_pooler"] = _all_level_pooler("ROI_MASK_HEAD", cfg, input_shape)
        return arguments


def _all_level_pooler(
    node_name: str, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
) -> AllLevelPooler:
    """Build the pooler of ``MODEL.<node_name>``."""
    node = cfg.MODEL[node_name]
    return AllLevelPooler(
        node.POOLER_TYPE,
        node.POOLER_RESOLUTION,
        [1.0 / input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
        node.POOLER_SAMPLING_RATIO,
        key=f"MODEL.{node_name}.POOLER_SAMPLING_RATIO",
    )
