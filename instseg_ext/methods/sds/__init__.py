"""SDS: region proposals, one network for boxes and one for regions, linear SVMs, refinement."""

from instseg_ext.method import Method
from instseg_ext.methods.sds import arch as _arch  # noqa: F401  registers the model
from instseg_ext.methods.sds.config import add_sds_config
from instseg_ext.methods.sds.convert import FAMILIES
from instseg_ext.methods.sds.mapper import build_sds_mapper
from instseg_ext.methods.sds.region_files import write_regions
from instseg_ext.methods.sds.region_sources import region_source
from instseg_ext.methods.sds.segmentation import propose_regions
from instseg_ext.methods.sds.stages import extract_features, fit_linear_models, save_fitted

__all__ = [
    "METHOD",
    "extract_features",
    "fit_linear_models",
    "propose_regions",
    "region_source",
    "save_fitted",
    "write_regions",
]

METHOD = Method(
    name="SDS",
    add_config=add_sds_config,
    meta_architectures=("SDS",),
    class_count_keys=("MODEL.SDS.NUM_CLASSES",),
    score_threshold_keys=("MODEL.SDS.SCORE_THRESH",),
    build_mapper=build_sds_mapper,
    evaluator_hints=lambda cfg: {"map_r_rule": "sds"},
    converters=FAMILIES,
)
