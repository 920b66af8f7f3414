"""PolarMask: instance segmentation as polar regression (arXiv:1909.13226)."""

from instseg_ext.method import Method
from instseg_ext.methods.polarmask.config import add_polarmask_config
from instseg_ext.methods.polarmask.convert import FAMILIES

__all__ = ["METHOD"]

METHOD = Method(
    name="PolarMask",
    add_config=add_polarmask_config,
    meta_architectures=("PolarMask",),
    class_count_keys=("MODEL.POLARMASK.NUM_CLASSES",),
    score_threshold_keys=("MODEL.POLARMASK.SCORE_THRESH",),
    converters=FAMILIES,
)
