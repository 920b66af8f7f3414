"""PolarMask: instance segmentation as polar regression (arXiv:1909.13226)."""

from detectron2.config import CfgNode

from instseg_ext.method import Check, Method
from instseg_ext.methods.polarmask import arch as _arch  # noqa: F401  registers the architecture
from instseg_ext.methods.polarmask import fpn as _fpn  # noqa: F401  registers the backbone
from instseg_ext.methods.polarmask.config import add_polarmask_config
from instseg_ext.methods.polarmask.convert import FAMILIES
from instseg_ext.methods.polarmask.figures import draw_rays, draw_upper_bound
from instseg_ext.methods.polarmask.mapper import build_polarmask_mapper
from instseg_ext.methods.polarmask.ray_order import check_rays

__all__ = ["METHOD"]


def _checks(cfg: CfgNode) -> dict[str, Check]:
    """Rays can be compared with boxes where a model has both."""
    node = cfg.MODEL.POLARMASK
    return {"ray order": check_rays} if node.WITH_MASK and node.WITH_BOX else {}


METHOD = Method(
    name="PolarMask",
    add_config=add_polarmask_config,
    meta_architectures=("PolarMask",),
    class_count_keys=("MODEL.POLARMASK.NUM_CLASSES",),
    score_threshold_keys=("MODEL.POLARMASK.SCORE_THRESH",),
    build_mapper=build_polarmask_mapper,
    converters=FAMILIES,
    figures={"rays": draw_rays, "upper-bound": draw_upper_bound},
    checks=_checks,
)
