"""ImageNet models of torchvision: ResNet, ResNeXt, VGG-16 and MobileNetV2.

ResNets get the names of detectron2's own converted files (``stem.conv1.norm.weight``,
``res2.0.shortcut.weight``), the others those of `instseg_ext.modeling.vgg` and
`instseg_ext.modeling.mobilenet`; VGG's ``fc6`` and ``fc7`` are kept for the heads that have layers
of these names. All files are for RGB images.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from instseg_ext.checkpoint.family import Family, Shapes, Variant, register_family
from instseg_ext.checkpoint.keymap import COUNTERS, Drop, KeyMap, Rename
from instseg_ext.checkpoint.report import ConversionError
from instseg_ext.checkpoint.resnet_rules import resnet_facts, resnet_rules
from instseg_ext.checkpoint.whole import check_whole, resnet_shapes
from instseg_ext.modeling.mobilenet import MobileNetV2
from instseg_ext.modeling.vgg import VGG

__all__ = ["TORCHVISION"]

_CLASSIFIER = "ImageNet classifier"
_INPUT = (
    "The weights want INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and "
    "MODEL.PIXEL_STD [58.395, 57.12, 57.375]."
)
# Of VGG; they are no part of the backbone.
_HEAD_LAYERS = ("fc6.", "fc7.")
# Convolutions per stage of VGG-16, and blocks per stage of MobileNetV2.
_VGG16 = (2, 2, 3, 3, 3)
_MOBILENET = (1, 2, 3, 4, 3, 3, 1)
# Layers of a MobileNetV2 block in order; the first block of all has no "expand".
_BLOCK = ("expand", "depthwise", "project")


def _vgg_rules() -> list[Rename | Drop]:
    """Convolutions and their ReLUs are numbered through, and so is the pool after each stage."""
    rules: list[Rename | Drop] = []
    index = 0
    for stage, convs in enumerate(_VGG16, start=1):
        for i in range(1, convs + 1):
            rules.append(Rename(f"features.{index}.{{p:weight|bias}}", f"conv{stage}_{i}.{{p}}"))
            index += 2
        index += 1
    # torchvision flattens (C, H, W) as Caffe does and as torch's heads here do: no transpose.
    return [
        *rules,
        Rename("classifier.0.{p:weight|bias}", "fc6.{p}"),
        Rename("classifier.3.{p:weight|bias}", "fc7.{p}"),
        Drop("classifier.6.{p*}", _CLASSIFIER),
    ]


def _mobilenet_rules() -> list[Rename | Drop]:
    """Blocks are numbered through; in a block, the last convolution and norm lie side by side."""
    rules: list[Rename | Drop] = [
        Rename("features.0.0.weight", "stem.conv1.weight"),
        Rename("features.0.1.{p*}", "stem.conv1.norm.{p}"),
    ]
    index = 0
    for stage, blocks in enumerate(_MOBILENET, start=1):
        for b in range(blocks):
            index += 1
            there, here = f"features.{index}.conv", f"stage{stage}.{b}"
            *wrapped, last = _BLOCK if index > 1 else _BLOCK[1:]
            for i, layer in enumerate(wrapped):
                rules += [
                    Rename(f"{there}.{i}.0.weight", f"{here}.{layer}.weight"),
                    Rename(f"{there}.{i}.1.{{p*}}", f"{here}.{layer}.norm.{{p}}"),
                ]
            rules += [
                Rename(f"{there}.{len(wrapped)}.weight", f"{here}.{last}.weight"),
                Rename(f"{there}.{len(wrapped) + 1}.{{p*}}", f"{here}.{last}.norm.{{p}}"),
            ]
    return [
        *rules,
        Drop("features.18.{p*}", "last convolution, which only the classifier reads"),
        Drop("classifier.1.{p*}", _CLASSIFIER),
    ]


def _claims(names: Collection[str]) -> bool:
    """Look for the first layers of each model, and for VGG's norms, which shift its numbers."""
    resnet = {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"}
    mobilenet = {"features.0.0.weight", "features.1.conv.0.0.weight"}
    vgg = {"features.0.weight", "features.0.bias", "features.2.weight"}
    names = set(names)
    with_norm = "features.1.weight" in names
    return resnet <= names or mobilenet <= names or (vgg <= names and not with_norm)


def _describe(shapes: Shapes) -> Variant:
    if "conv1_1.weight" in shapes:
        text, note = "VGG-16", "It is for MODEL.BACKBONE.NAME build_vgg16_backbone."
        expected = _shapes_of(VGG)
    elif "stage1.0.project.weight" in shapes:
        text, note = "MobileNetV2", "It is for MODEL.BACKBONE.NAME build_mobilenetv2_backbone."
        expected = _shapes_of(MobileNetV2, out_features=("stage7",))
    else:
        text, keys = _resnet(shapes)
        told = ", ".join(f"{key} {value}" for key, value in keys.items())
        note = f"It is for MODEL.RESNETS {told}."
        expected = resnet_shapes(keys)
    backbone = {n: shape for n, shape in shapes.items() if not n.startswith(_HEAD_LAYERS)}
    check_whole(f"{text} of torchvision", backbone, expected)
    return Variant(text, notes=(note, _INPUT), backbone_only=True)


def _shapes_of(backbone: type[nn.Module], **options: Any) -> Shapes:
    with torch.device("meta"):
        model = backbone(**options)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _resnet(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """Return a ResNet's name and its keys below ``MODEL.RESNETS``."""
    facts = resnet_facts(shapes, prefix="")
    if not facts.depth:
        raise ConversionError(
            "the ResNet in the file has the blocks of none of 18, 34, 50, 101, 152 layers."
        )
    wide = facts.groups == 1 and facts.width_per_group != 64
    keys = {
        "DEPTH": facts.depth,
        "NUM_GROUPS": facts.groups,
        "WIDTH_PER_GROUP": facts.width_per_group,
        "RES2_OUT_CHANNELS": 64 if facts.depth < 50 else 256,
        "STRIDE_IN_1X1": False,
    }
    return f"Wide {facts.text}" if wide else facts.text, keys


TORCHVISION = register_family(
    Family(
        name="torchvision",
        summary="ImageNet ResNet, ResNeXt, VGG-16 and MobileNetV2 of torchvision",
        key_map=KeyMap(
            [
                COUNTERS,
                *resnet_rules(),
                Drop("fc.{p*}", _CLASSIFIER),
                *_vgg_rules(),
                *_mobilenet_rules(),
            ]
        ),
        claims=_claims,
        describe=_describe,
    )
)
