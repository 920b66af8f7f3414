"""Model parts that the methods share; importing it registers the shared backbones."""

from instseg_ext.modeling import deform_resnet  # noqa: F401  (registers the builders)
