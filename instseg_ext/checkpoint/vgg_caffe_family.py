"""ImageNet VGG-16 of Caffe, the initial weights of the methods that were written with Caffe.

The trunk gets the names of `instseg_ext.modeling.vgg`; ``fc6`` and ``fc7``, and the copies of them
for masks that some authors added, are kept for the heads that start from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from instseg_ext.checkpoint.family import Family, Shapes, Variant, register_family
from instseg_ext.checkpoint.keymap import Drop, KeyMap, Rename
from instseg_ext.checkpoint.whole import check_whole
from instseg_ext.modeling.vgg import VGG

__all__ = ["VGG_CAFFE", "caffe_layer"]

_HEAD_LAYERS = {"fc6": (4096, 25088), "fc7": (4096, 4096)}
_COPIES = {f"{name}_mask": shape for name, shape in _HEAD_LAYERS.items()}
_NOTES = (
    "It is for MODEL.BACKBONE.NAME build_vgg16_backbone.",
    "The weights want INPUT.FORMAT BGR and MODEL.PIXEL_STD [1.0, 1.0, 1.0]; MODEL.PIXEL_MEAN is "
    "[102.9801, 115.9465, 122.7717] in Fast R-CNN and its relatives.",
)


def caffe_layer(
    source: str, target: str, transform: Callable[[Tensor], Tensor] | None = None
) -> tuple[Rename, Rename]:
    """Return the rules for the weights (0) and the bias (1) of a layer.

    Args:
        source: name of the layer in the file, with holes.
        target: name of the module here.
        transform: changes both, for rows in another order.
    """
    return (
        Rename(f"{source}/0", f"{target}.weight", transform),
        Rename(f"{source}/1", f"{target}.bias", transform),
    )


def _claims(names: Collection[str]) -> bool:
    """Look for the trunk, and for no other classifier than ImageNet's."""
    others = any(name.startswith(("cls_score/", "mask_pred/", "rpn")) for name in names)
    return "conv1_1/0" in names and "conv5_3/0" in names and not others


def _describe(shapes: Shapes) -> Variant:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in VGG().state_dict().items()}
    present = {name.partition(".")[0] for name in shapes}
    heads = {n: shape for n, shape in (_HEAD_LAYERS | _COPIES).items() if n in present}
    for name, shape in heads.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    check_whole("VGG-16 of Caffe", shapes, expected)
    text = f"VGG-16 with {', '.join(heads)}" if heads else "VGG-16 without fc6 and fc7"
    return Variant(text, notes=_NOTES, backbone_only=True)


VGG_CAFFE = register_family(
    Family(
        name="vgg-caffe",
        summary="ImageNet VGG-16 of Caffe",
        key_map=KeyMap(
            [
                *caffe_layer("conv{a}_{b}", "conv{a}_{b}"),
                *caffe_layer("{layer:fc6|fc7|fc6_mask|fc7_mask}", "{layer}"),
                Drop("fc8{p*}", "ImageNet classifier"),
            ]
        ),
        claims=_claims,
        describe=_describe,
    )
)
