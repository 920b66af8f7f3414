"""PANet: path aggregation for instance segmentation (arXiv:1803.01534)."""

from instseg_ext.method import Method
from instseg_ext.methods.panet import arch as _arch  # noqa: F401  registers the model
from instseg_ext.methods.panet import fpn as _fpn  # noqa: F401  registers the backbone
from instseg_ext.methods.panet import roi_heads as _roi_heads  # noqa: F401  registers the heads
from instseg_ext.methods.panet.config import add_panet_config
from instseg_ext.methods.panet.convert import FAMILIES
from instseg_ext.modeling import legacy_anchors as _anchors  # noqa: F401  the authors' anchors

__all__ = ["METHOD"]

METHOD = Method(
    name="PANet",
    add_config=add_panet_config,
    meta_architectures=("PANetRCNN",),
    components=("PANetROIHeads", "PANetFusionMaskHead"),
    class_count_keys=("MODEL.ROI_HEADS.NUM_CLASSES",),
    score_threshold_keys=("MODEL.ROI_HEADS.SCORE_THRESH_TEST",),
    converters=FAMILIES,
)
