"""Model parts that the methods share; importing it registers the shared backbones."""

from instseg_ext.modeling import darknet, deform_resnet, mobilenet, vgg  # noqa: F401  (register builders)
