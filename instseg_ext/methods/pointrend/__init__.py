"""PointRend: masks rendered point by point where they are uncertain (arXiv:1912.08193)."""

from instseg_ext.data import SemanticDatasetMapper
from instseg_ext.method import Method
from instseg_ext.methods.pointrend import implicit as _implicit  # noqa: F401  registers the head
from instseg_ext.methods.pointrend import mask_head as _mask_head  # noqa: F401  registers the head
from instseg_ext.methods.pointrend import roi_heads as _roi_heads  # noqa: F401  registers its frame
from instseg_ext.methods.pointrend import semantic as _semantic  # noqa: F401  registers the head
from instseg_ext.methods.pointrend.config import add_pointrend_config
from instseg_ext.modeling import semantic as _segmentor  # noqa: F401  registers the model

__all__ = ["METHOD", "SEMANTIC_METHOD"]


METHOD = Method(
    name="PointRend",
    add_config=add_pointrend_config,
    meta_architectures=(),
    components=("PointRendHead", "ImplicitPointRendHead", "PointRendHeads"),
    replaces={
        "PointRendMaskHead": "PointRendHead",
        "CoarseMaskHead": "PointRendHead",
        "ImplicitPointRendMaskHead": "ImplicitPointRendHead",
        "PointRendROIHeads": "PointRendHeads",
    },
    class_count_keys=("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.POINT_HEAD.NUM_CLASSES"),
    score_threshold_keys=("MODEL.ROI_HEADS.SCORE_THRESH_TEST",),
)

SEMANTIC_METHOD = Method(
    name="PointRend",
    add_config=add_pointrend_config,
    meta_architectures=("InstSegSemanticSegmentor", "SemanticSegmentor"),
    replaces={"PointRendSemSegHead": "PointRendSemanticHead"},
    class_count_keys=("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "MODEL.POINT_HEAD.NUM_CLASSES"),
    build_mapper=SemanticDatasetMapper,
)
