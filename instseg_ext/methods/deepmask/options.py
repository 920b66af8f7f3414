"""What DeepMask learns and predicts, as opposed to its layers."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import CfgNode

__all__ = ["InferenceOptions", "LossOptions"]


@dataclass(frozen=True)
class LossOptions:
    """Side of the mask targets and weights of the losses; see the config keys."""

    gt_size: int = 112
    mask_weight: float = 32.0
    score_weight: float = 1.0
    alternate: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> LossOptions:
        """Read ``MODEL.DEEPMASK``."""
        node = cfg.MODEL.DEEPMASK
        return cls(
            gt_size=node.GT_SIZE,
            mask_weight=node.MASK_LOSS_WEIGHT,
            score_weight=node.SCORE_LOSS_WEIGHT,
            alternate=node.ALTERNATE,
        )


@dataclass(frozen=True)
class InferenceOptions:
    """Which windows and pixels become proposals; see the config keys."""

    scales: tuple[float, ...] = (1.0,)
    max_proposals: int = 1000
    mask_thresh: float = 0.2
    nms_thresh: float = 1.0
    legacy_indexing: bool = False
    legacy_paste: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> InferenceOptions:
        """Read ``MODEL.DEEPMASK`` and ``TEST.DETECTIONS_PER_IMAGE``."""
        node = cfg.MODEL.DEEPMASK
        return cls(
            scales=tuple(node.TEST_SCALES),
            max_proposals=cfg.TEST.DETECTIONS_PER_IMAGE,
            mask_thresh=node.MASK_THRESH,
            nms_thresh=node.NMS_THRESH,
            legacy_indexing=node.LEGACY_INDEXING,
            legacy_paste=node.LEGACY_PASTE,
        )
