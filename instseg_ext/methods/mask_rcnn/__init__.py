"""Mask R-CNN: detectron2's own model in this project's frame, the baseline of every comparison."""

from instseg_ext.method import Method
from instseg_ext.modeling import rcnn, res5_heads  # noqa: F401  (they register their classes)

__all__ = ["METHOD"]


def _add_config(cfg: object) -> None:
    """Add nothing: detectron2's keys are enough."""


METHOD = Method(
    name="MaskRCNN",
    add_config=_add_config,
    meta_architectures=("InstSegRCNN", "GeneralizedRCNN"),
    class_count_keys=("MODEL.ROI_HEADS.NUM_CLASSES",),
    score_threshold_keys=("MODEL.ROI_HEADS.SCORE_THRESH_TEST",),
)
