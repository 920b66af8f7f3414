"""FCIS: fully convolutional instance-aware semantic segmentation (arXiv:1611.07709)."""

from instseg_ext.method import Method
from instseg_ext.methods.fcis import arch as _arch  # noqa: F401  registers the model
from instseg_ext.methods.fcis import backbone as _backbone  # noqa: F401  registers the backbone
from instseg_ext.methods.fcis import roi_heads as _roi_heads  # noqa: F401  registers the heads
from instseg_ext.methods.fcis import rpn as _rpn  # noqa: F401  registers the proposals
from instseg_ext.methods.fcis.config import add_fcis_config
from instseg_ext.methods.fcis.convert import FAMILIES
from instseg_ext.modeling import legacy_anchors as _anchors  # noqa: F401  the authors' anchors

__all__ = ["METHOD"]

METHOD = Method(
    name="FCIS",
    add_config=add_fcis_config,
    meta_architectures=("FCISRCNN",),
    class_count_keys=("MODEL.ROI_HEADS.NUM_CLASSES",),
    score_threshold_keys=("MODEL.FCIS.VOTE_MIN_SCORE",),
    converters=FAMILIES,
)
