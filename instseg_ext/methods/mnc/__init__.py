"""MNC: multi-task network cascades (arXiv:1512.04412)."""

from instseg_ext.method import Method
from instseg_ext.methods.mnc import arch as _arch  # noqa: F401  registers the model and its RPN
from instseg_ext.methods.mnc import roi_heads as _roi_heads  # noqa: F401  registers the heads
from instseg_ext.methods.mnc.config import add_mnc_config
from instseg_ext.methods.mnc.convert import FAMILIES
from instseg_ext.modeling import legacy_anchors as _anchors  # noqa: F401  the authors' anchors

__all__ = ["METHOD"]

METHOD = Method(
    name="MNC",
    add_config=add_mnc_config,
    meta_architectures=("MNCRCNN",),
    class_count_keys=("MODEL.ROI_HEADS.NUM_CLASSES",),
    score_threshold_keys=("MODEL.MNC.VOTE_MIN_SCORE",),
    converters=FAMILIES,
)
