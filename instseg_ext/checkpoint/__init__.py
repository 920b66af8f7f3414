"""Safe reading, conversion and atomic writing of weights and training checkpoints."""

from instseg_ext.checkpoint import (  # noqa: F401  (registers the families of no method)
    detectron2_family,
    torchvision_family,
)
from instseg_ext.checkpoint.atomic import atomic_write, remove_leftovers
from instseg_ext.checkpoint.checkpointer import InstSegCheckpointer
from instseg_ext.checkpoint.conversion import (
    AUTO,
    check_fit,
    convert,
    convert_with_variant,
    model_shapes,
    recognise,
    shapes_of,
)
from instseg_ext.checkpoint.converted import check_destination, sha256_of, write_converted
from instseg_ext.checkpoint.family import (
    Family,
    Shapes,
    Variant,
    families,
    find_family,
    register_family,
)
from instseg_ext.checkpoint.keymap import COUNTERS, Drop, KeyMap, Rename
from instseg_ext.checkpoint.plain import to_plain
from instseg_ext.checkpoint.readers import fetch_weights, read_metadata, read_weights
from instseg_ext.checkpoint.report import ConversionError, Report
from instseg_ext.checkpoint.resnet_rules import (
    ResNetFacts,
    block_rules,
    fpn_rules,
    resnet_facts,
    resnet_rules,
)
from instseg_ext.checkpoint.rpn_rules import anchors_by_size, foreground_minus_background
from instseg_ext.checkpoint.torch7_rules import (
    Torch7KeyMap,
    torch7_layer,
    torch7_norm,
    torch7_way,
)
from instseg_ext.checkpoint.vgg_caffe_family import caffe_layer
from instseg_ext.checkpoint.whole import check_whole, resnet_shapes

__all__ = [
    "AUTO",
    "COUNTERS",
    "ConversionError",
    "Drop",
    "Family",
    "InstSegCheckpointer",
    "KeyMap",
    "Rename",
    "Report",
    "ResNetFacts",
    "Shapes",
    "Torch7KeyMap",
    "Variant",
    "anchors_by_size",
    "atomic_write",
    "block_rules",
    "caffe_layer",
    "check_destination",
    "check_fit",
    "check_whole",
    "convert",
    "convert_with_variant",
    "families",
    "fetch_weights",
    "find_family",
    "foreground_minus_background",
    "fpn_rules",
    "model_shapes",
    "read_metadata",
    "read_weights",
    "recognise",
    "register_family",
    "remove_leftovers",
    "resnet_facts",
    "resnet_rules",
    "resnet_shapes",
    "sha256_of",
    "shapes_of",
    "to_plain",
    "torch7_layer",
    "torch7_norm",
    "torch7_way",
    "write_converted",
]
