"""DeepMask and SharpMask: class-agnostic segments by windows (arXiv:1506.06204, 1603.08695)."""

from instseg_ext.method import Method
from instseg_ext.methods.deepmask import sharpmask as _sharp  # noqa: F401  registers both models
from instseg_ext.methods.deepmask import trunk as _trunk  # noqa: F401  registers the trunks
from instseg_ext.methods.deepmask.config import add_deepmask_config
from instseg_ext.methods.deepmask.convert import FAMILIES
from instseg_ext.methods.deepmask.mapper import build_patch_source
from instseg_ext.methods.deepmask.patch_metric import evaluate_patches

__all__ = ["METHOD"]

METHOD = Method(
    name="DeepMask",
    add_config=add_deepmask_config,
    meta_architectures=("DeepMask", "SharpMask"),
    build_source=build_patch_source,
    evaluator_hints=lambda cfg: {"proposals": True},
    converters=FAMILIES,
    evaluate_patches=evaluate_patches,
)
