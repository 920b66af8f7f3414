"""FCIS's region proposals."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY

from instseg_ext.modeling.clip_first_rpn import ClipFirstRPN

__all__ = ["FCISRPN"]


@PROPOSAL_GENERATOR_REGISTRY.register()
class FCISRPN(ClipFirstRPN):
    """``ClipFirstRPN`` that can leave out cells of which the image has only a part.

    As published, the class loss of an image is the mean over its labelled anchors, and the box loss
    is divided by ``MODEL.RPN.BATCH_SIZE_PER_IMAGE``.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments; see ``ClipFirstRPN.from_config``."""
        arguments = super().from_config(cfg, input_shape)
        arguments["normalizer"] = "mixed"
        arguments["whole_cells"] = cfg.MODEL.FCIS.CROP_SCORE_GRID
        return arguments
