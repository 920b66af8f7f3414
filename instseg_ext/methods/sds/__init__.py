"""SDS: region proposals, one network for boxes and one for regions, linear SVMs, refinement."""

from instseg_ext.methods.sds.segmentation import propose_regions

__all__ = ["propose_regions"]
