"""Backbones alone, for which no config is needed: are all of their tensors in the file?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone

from instseg_ext.checkpoint.family import Shapes
from instseg_ext.checkpoint.report import ConversionError, listing

__all__ = ["check_whole", "resnet_shapes"]


def check_whole(text: str, shapes: Shapes, expected: Shapes) -> None:
    """Refuse a file that lacks a tensor, has one too many or one of another shape.

    Args:
        text: what the file should be, such as ``"VGG-16 of Caffe"``.
        shapes: by converted name.
        expected: shapes of that backbone.

    Raises:
        ConversionError: naming the first tensors in question.
    """
    wrong = [f"{name} is missing" for name in expected if name not in shapes]
    wrong += [f"{name} is unknown" for name in shapes if name not in expected]
    wrong += [
        f"{name} is {list(shape)} instead of {list(expected[name])}"
        for name, shape in shapes.items()
        if shape != expected.get(name, shape)
    ]
    if wrong:
        raise ConversionError(f"the file holds no whole {text}: {listing(wrong)}.")


def resnet_shapes(keys: Mapping[str, Any]) -> Shapes:
    """Return the shapes of a ResNet up to res5, with frozen norms.

    Args:
        keys: below ``MODEL.RESNETS``.
    """
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    for key, value in keys.items():
        cfg.MODEL.RESNETS[key] = value
    with torch.device("meta"):
        model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
