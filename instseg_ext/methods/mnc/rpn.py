"""Stage 1 of the cascade: boxes that are objects of some class."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY

from instseg_ext.modeling.clip_first_rpn import ClipFirstRPN

__all__ = ["MNCRPN"]


@PROPOSAL_GENERATOR_REGISTRY.register()
class MNCRPN(ClipFirstRPN):
    """The RPN of MNC (Sec. 3.1 of arXiv:1512.04412).

    The losses of an image are divided by the number of its labelled anchors. Boxes with a gradient,
    and labels from the sample of the later stages, are to be asked for: see ``propose`` and
    ``losses``.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments; see ``ClipFirstRPN.from_config``."""
        arguments = super().from_config(cfg, input_shape)
        arguments["normalizer"] = "labelled"
        arguments["extra_pixel"] = cfg.MODEL.MNC.LEGACY_BOXES
        return arguments
