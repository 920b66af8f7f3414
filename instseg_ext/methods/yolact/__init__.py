"""YOLACT and YOLACT++: prototypes and coefficients (arXiv:1904.02689, arXiv:1912.06218)."""

from detectron2.config import CfgNode

from instseg_ext.method import Method
from instseg_ext.methods.yolact import arch as _arch  # noqa: F401  registers the meta-architecture
from instseg_ext.methods.yolact import fpn as _fpn  # noqa: F401  registers the backbone
from instseg_ext.methods.yolact.config import add_yolact_config
from instseg_ext.methods.yolact.convert import FAMILIES
from instseg_ext.methods.yolact.figures import draw_prototypes
from instseg_ext.methods.yolact.mapper import build_yolact_mapper

__all__ = ["METHOD"]


def _evaluator_hints(cfg: CfgNode) -> dict[str, object]:
    """With mask scoring, boxes and masks are ranked by scores of their own."""
    return {"segm_score_field": "mask_scores"} if cfg.MODEL.YOLACT.MASK_IOU.ENABLED else {}


METHOD = Method(
    name="YOLACT",
    add_config=add_yolact_config,
    meta_architectures=("YOLACT",),
    class_count_keys=("MODEL.YOLACT.NUM_CLASSES",),
    score_threshold_keys=("MODEL.YOLACT.SCORE_THRESH",),
    build_mapper=build_yolact_mapper,
    evaluator_hints=_evaluator_hints,
    converters=FAMILIES,
    figures={"prototypes": draw_prototypes},
)
