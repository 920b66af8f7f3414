"""Deep metric learning: instances from embeddings of pixels (arXiv:1703.10277)."""

from instseg_ext.method import Method
from instseg_ext.methods.metric_learning import arch as _arch  # noqa: F401  registers the model
from instseg_ext.methods.metric_learning.config import add_metric_config
from instseg_ext.methods.metric_learning.mapper import build_metric_mapper
from instseg_ext.modeling import deform_resnet as _backbones  # noqa: F401  registers backbones

__all__ = ["METHOD"]

METHOD = Method(
    name="MetricLearning",
    add_config=add_metric_config,
    meta_architectures=("DeepMetricInstSeg",),
    class_count_keys=("MODEL.DEEP_METRIC.NUM_CLASSES",),
    score_threshold_keys=("MODEL.DEEP_METRIC.SEED_MIN",),
    build_mapper=build_metric_mapper,
)
