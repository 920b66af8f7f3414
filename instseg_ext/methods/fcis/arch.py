"""FCIS's frame: the shared two-stage model whose candidates vote for the masks."""

from __future__ import annotations

from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from instseg_ext.layers.mask_voting import VotingRule
from instseg_ext.methods.fcis.roi_heads import FCISROIHeads
from instseg_ext.modeling.voting_keys import voting_rule
from instseg_ext.modeling.voting_rcnn import VotingRCNN

__all__ = ["FCISRCNN"]


@META_ARCH_REGISTRY.register()
class FCISRCNN(VotingRCNN):
    """FCIS (arXiv:1611.07709): candidates of ``FCISROIHeads``, merged by voting."""

    heads_class: ClassVar[type[nn.Module]] = FCISROIHeads

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Keep the parts; the arguments are those of ``VotingRCNN``."""
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: if the backbone is a pyramid.
        """
        backbone = cfg.MODEL.BACKBONE.NAME
        if "fpn" in backbone:
            raise ValueError(
                f"FCIS needs all maps at one stride, not the pyramid of {backbone}: set "
                "MODEL.BACKBONE.NAME to build_fcis_resnet_backbone."
            )
        return {
            **super().from_config(cfg),
            "voting": voting_rule(cfg, "FCIS", VotingRule.fcis),
            "legacy_boxes": cfg.MODEL.FCIS.LEGACY_BOXES,
        }
