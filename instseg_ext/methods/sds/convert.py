"""Networks of Caffe for SDS: CaffeNet as trained on ImageNet, and the authors' two pathways."""

from __future__ import annotations

from collections.abc import Collection

import torch

from instseg_ext.checkpoint import Drop, Family, KeyMap, Shapes, Variant, caffe_layer, check_whole
from instseg_ext.methods.sds.towers import CaffeNet

__all__ = ["FAMILIES"]

_LAYERS = "{layer:conv1|conv2|conv3|conv4|conv5|fc6|fc7}"
_PATHS = ("box", "region")
_NOTES = (
    "The weights want INPUT.FORMAT BGR, MODEL.PIXEL_STD [1.0, 1.0, 1.0] and the mean colour "
    "MODEL.PIXEL_MEAN [104.00699, 116.66877, 122.67892] in place of Caffe's mean image.",
    "Support vector machines and refinement are not in the file: `instseg train-sds` fits them.",
)


def _claims(names: Collection[str]) -> bool:
    """Look for the last convolution and the layer of the features, in one or two pathways."""
    single = {"conv5/0", "fc7/0"} <= set(names)
    double = {"conv5_1/0", "fc7_1/0", "conv5_2/0", "fc7_2/0"} <= set(names)
    return single or double


def _describe(shapes: Shapes) -> Variant:
    with torch.device("meta"):
        layers = {name: tuple(value.shape) for name, value in CaffeNet(227).state_dict().items()}
    if "fc7.weight" in shapes:
        check_whole("CaffeNet", shapes, layers)
        return Variant("CaffeNet", notes=_NOTES, backbone_only=True)
    both = {f"backbone.{path}.{name}": shape for path in _PATHS for name, shape in layers.items()}
    check_whole("the networks of SDS", shapes, both)
    return Variant("the two networks of SDS", notes=_NOTES, backbone_only=True)


FAMILIES = (
    Family(
        "sds-caffe",
        "CaffeNet, alone or as the two pathways of SDS",
        KeyMap(
            [
                *caffe_layer(f"{_LAYERS}_1", "backbone.box.{layer}"),
                *caffe_layer(f"{_LAYERS}_2", "backbone.region.{layer}"),
                *caffe_layer(_LAYERS, "{layer}"),
                Drop("fc8{p*}", "classifier of other training"),
            ]
        ),
        _claims,
        _describe,
    ),
)
