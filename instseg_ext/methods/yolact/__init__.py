"""YOLACT and YOLACT++: prototypes and coefficients (arXiv:1904.02689, arXiv:1912.06218)."""

from instseg_ext.method import Method
from instseg_ext.methods.yolact.config import add_yolact_config

__all__ = ["METHOD"]

METHOD = Method(
    name="YOLACT",
    add_config=add_yolact_config,
    meta_architectures=("YOLACT",),
    class_count_keys=("MODEL.YOLACT.NUM_CLASSES",),
    score_threshold_keys=("MODEL.YOLACT.SCORE_THRESH",),
)
