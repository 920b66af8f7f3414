"""SOLO family: instances by location (arXiv:1912.04488, arXiv:2003.10152)."""

from instseg_ext.method import Method
from instseg_ext.methods.solo import arch as _arch  # noqa: F401  registers the meta-architectures
from instseg_ext.methods.solo.config import add_solo_config
from instseg_ext.methods.solo.convert import FAMILIES

__all__ = ["METHOD"]

METHOD = Method(
    name="SOLO",
    add_config=add_solo_config,
    meta_architectures=("SOLO", "SOLOv2"),
    class_count_keys=("MODEL.SOLO.NUM_CLASSES",),
    score_threshold_keys=("MODEL.SOLO.SCORE_THRESH", "MODEL.SOLO.UPDATE_THRESH"),
    converters=FAMILIES,
)
