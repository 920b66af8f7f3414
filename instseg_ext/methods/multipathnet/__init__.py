"""MultiPathNet: foveal regions, skip connections and integral loss (arXiv:1604.02135)."""

from instseg_ext.method import Method
from instseg_ext.methods.multipathnet import arch as _arch  # noqa: F401  registers the model
from instseg_ext.methods.multipathnet import roi_heads as _roi_heads  # noqa: F401  and its heads
from instseg_ext.methods.multipathnet.config import add_multipathnet_config
from instseg_ext.methods.multipathnet.convert import FAMILIES
from instseg_ext.methods.multipathnet.mapper import build_mapper

__all__ = ["METHOD"]

METHOD = Method(
    name="MultiPathNet",
    add_config=add_multipathnet_config,
    meta_architectures=("MultiPathRCNN",),
    class_count_keys=("MODEL.ROI_HEADS.NUM_CLASSES",),
    score_threshold_keys=("MODEL.ROI_HEADS.SCORE_THRESH_TEST",),
    build_mapper=build_mapper,
    converters=FAMILIES,
)
