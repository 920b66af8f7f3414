"""SDS: region proposals, one network for boxes and one for regions, linear SVMs, refinement."""

from instseg_ext.methods.sds.region_files import write_regions
from instseg_ext.methods.sds.region_sources import region_source
from instseg_ext.methods.sds.segmentation import propose_regions

__all__ = ["propose_regions", "region_source", "write_regions"]
