"""The ROI heads of PointRend."""

from __future__ import annotations

from typing import Any

from detectron2.config import configurable
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Instances

from instseg_ext.methods.pointrend.old_names import rename_old_names
from instseg_ext.modeling.rcnn import InstSegROIHeads

__all__ = ["PointRendHeads"]


@ROI_HEADS_REGISTRY.register()
class PointRendHeads(InstSegROIHeads):
    """``InstSegROIHeads`` that read the first models' names and know PointRend's losses."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Keep the parts; see ``InstSegROIHeads``."""
        super().__init__(**kwargs)
        self.register_load_state_dict_pre_hook(rename_old_names)

    def loss_counts(self, sampled: list[Instances]) -> dict[str, int]:
        """See ``InstSegROIHeads.loss_counts``: no region has more points than another."""
        counts = super().loss_counts(sampled)
        regions = counts["loss_mask"]
        return {**counts, "loss_mask_point": regions, "loss_l2": regions}
