"""DeepMask and SharpMask of their authors (Lua Torch), and DeepMask of a port to PyTorch.

In the authors' files the norms of the trunk are constant, and SharpMask's layers stand under
several names: ``neths`` and ``netvs`` hold those that ``refs`` puts together. A file that was saved
after the model had been made ready for whole images has convolutions in the place of linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import Tensor

from instseg_ext.checkpoint import (
    COUNTERS,
    ConversionError,
    Drop,
    Family,
    KeyMap,
    Rename,
    Shapes,
    Torch7KeyMap,
    Variant,
    torch7_layer,
    torch7_norm,
    torch7_way,
)

__all__ = ["FAMILIES"]

_REDUCED = 128  # channels that the window's vector is made of
# Of what the shapes tell, the keys and the published models' values.
_PUBLISHED = {
    "MODEL.DEEPMASK.INPUT_SIZE": 160,
    "MODEL.DEEPMASK.OUT_SIZE": 56,
    "MODEL.SHARPMASK.DIM": 32,
}


# --- layouts -------------------------------------------------------------------------------------


def _window(layer: Tensor) -> Tensor:
    """Make the layer that sees a whole window a convolution.

    Args:
        layer: (out, 128 cells^2) or (out, 128, cells, cells) weights, or (out,) bias.

    Raises:
        ConversionError: if the number of columns belongs to no square.
    """
    if layer.dim() != 2:
        return layer
    cells = math.isqrt(layer.shape[1] // _REDUCED)
    if layer.shape[1] != _REDUCED * cells**2:
        raise ConversionError(
            f"the layer of the window is {list(layer.shape)}: it must have {_REDUCED} columns for "
            "each cell of a square."
        )
    return layer.unflatten(1, (_REDUCED, cells, cells))


def _linear(layer: Tensor) -> Tensor:
    """Make a 1x1 convolution a linear layer; (out, in, 1, 1) weights, anything else stays."""
    return layer.flatten(1) if layer.dim() == 4 else layer


# --- the authors' files --------------------------------------------------------------------------


def _trunk_rules() -> list[Rename]:
    """Return the rules for the trunk, the ResNet of fb.resnet.torch up to its third stage."""
    # Mirrors stand before convolutions of 3x3 and 7x7, in a container with them.
    rules = [
        *torch7_layer(f"trunk.{torch7_way(1, 2)}", "backbone.stem.conv1"),
        *torch7_norm(f"trunk.{torch7_way(2)}", "backbone.stem.conv1.norm"),
    ]
    block = f"trunk.{torch7_way('{s+3}', '{b+1}', 1)}"
    here = "backbone.res{s}.{b}"
    for layer, convolution, norm in (
        ("conv1", (1, 1), (1, 2)),
        ("conv2", (1, 4, 2), (1, 5)),
        ("conv3", (1, 7), (1, 8)),
        ("shortcut", (2, 1), (2, 2)),
    ):
        rules += torch7_layer(f"{block}.{torch7_way(*convolution)}", f"{here}.{layer}")
        rules += torch7_norm(f"{block}.{torch7_way(*norm)}", f"{here}.{layer}.norm")
    return [
        *rules,
        *torch7_layer(f"trunk.{torch7_way(9)}", "head.reduce"),
        *torch7_layer(f"trunk.{torch7_way(12)}", "head.encode", _window),
    ]


def _head_rules() -> list[Rename | Drop]:
    """Return the rules for the heads; the mask head of SharpMask's files is ``maskBranchDM``."""
    branch = "{branch:maskBranch|maskBranchDM}"
    refined = "head.refine"
    return [
        *torch7_layer(f"{branch}.{torch7_way(1, 1)}", "head.mask.fc", _linear),
        *torch7_layer(f"{branch}.{torch7_way(1)}", "head.mask.fc", _linear),
        *torch7_layer(f"scoreBranch.{torch7_way(2)}", "head.score.fc1", _linear),
        *torch7_layer(f"scoreBranch.{torch7_way(5)}", "head.score.fc2", _linear),
        *torch7_layer(f"netvs.0.{torch7_way(1)}", f"{refined}.encode", _linear),
        *torch7_layer(f"netvs.{{i+1}}.{torch7_way('{3*n+2}')}", f"{refined}.topdown.{{i}}.{{n}}"),
        # All but the first begin with a crop.
        *torch7_layer(f"neths.1.{torch7_way('{3*n+2}')}", f"{refined}.lateral.0.{{n}}"),
        *torch7_layer(f"neths.{{i+1}}.{torch7_way('{3*n+3}')}", f"{refined}.lateral.{{i}}.{{n}}"),
        *torch7_layer(f"refs.4.{torch7_way(6)}", f"{refined}.predict"),
        Drop("refs.{p*}", "other names of layers in neths and netvs"),
    ]


def _claims_authors(names: Collection[str]) -> bool:
    first = f"trunk.{torch7_way(1, 2)}.weight"
    return first in names and any(name.startswith("scoreBranch.modules") for name in names)


# --- the port ------------------------------------------------------------------------------------

_PORT_BLOCK, _BLOCK = "trunk.0.{s+2}.{b}", "backbone.res{s}.{b}"
_PORT_RULES = (
    COUNTERS,
    Rename("trunk.0.0.1.weight", "backbone.stem.conv1.weight"),
    Rename("trunk.0.1.{p*}", "backbone.stem.conv1.norm.{p}"),
    Rename(f"{_PORT_BLOCK}.conv2.1.weight", f"{_BLOCK}.conv2.weight"),
    Rename(f"{_PORT_BLOCK}.conv{{c}}.weight", f"{_BLOCK}.conv{{c}}.weight"),
    Rename(f"{_PORT_BLOCK}.bn{{c}}.{{p*}}", f"{_BLOCK}.conv{{c}}.norm.{{p}}"),
    Rename(f"{_PORT_BLOCK}.downsample.0.weight", f"{_BLOCK}.shortcut.weight"),
    Rename(f"{_PORT_BLOCK}.downsample.1.{{p*}}", f"{_BLOCK}.shortcut.norm.{{p}}"),
    Rename("trunk.1.0.{p*}", "head.reduce.{p}"),
    Rename("trunk.1.2.{p*}", "head.encode.{p}"),
    # Enlarged masks put the layer one container deeper.
    Rename("maskBranch.0.0.{p*}", "head.mask.fc.{p}", _linear),
    Rename("maskBranch.0.{p:weight|bias}", "head.mask.fc.{p}", _linear),
    Rename("scoreBranch.1.{p*}", "head.score.fc1.{p}", _linear),
    Rename("scoreBranch.4.{p*}", "head.score.fc2.{p}", _linear),
)


def _claims_port(names: Collection[str]) -> bool:
    return "trunk.0.0.1.weight" in names and "scoreBranch.1.weight" in names


# --- which model ---------------------------------------------------------------------------------


def _describe(shapes: Shapes) -> Variant:
    sharp = "head.refine.predict.weight" in shapes
    deeper = "backbone.res4.6.conv1.weight" in shapes
    found = {}
    if (window := shapes.get("head.encode.weight")) and len(window) == 4:
        found["MODEL.DEEPMASK.INPUT_SIZE"] = 16 * window[2]
        if sharp and (encode := shapes.get("head.refine.encode.bias")):
            found["MODEL.SHARPMASK.DIM"] = encode[0] // window[2] ** 2
    if mask := shapes.get("head.mask.fc.bias"):
        found["MODEL.DEEPMASK.OUT_SIZE"] = math.isqrt(mask[0])
    opts: list[Any] = [
        word for key, value in found.items() if value != _PUBLISHED[key] for word in (key, value)
    ]
    return Variant(
        f"{'SharpMask' if sharp else 'DeepMask'}, {'a deeper ResNet' if deeper else 'ResNet-50'}",
        "" if deeper else f"DeepMask/{'sharpmask' if sharp else 'deepmask'}_R_50",
        tuple(opts),
    )


def _describe_port(shapes: Shapes) -> Variant:
    variant = _describe(shapes)
    return Variant(
        variant.text,
        variant.config,
        (*variant.opts, "MODEL.DEEPMASK.PAD_MODE", "reflect"),
        ("its 3x3 convolutions pad without repeating the edge, MODEL.DEEPMASK.PAD_MODE reflect",),
    )


FAMILIES = (
    Family(
        "deepmask-torch7",
        "the DeepMask and SharpMask authors' Lua Torch code",
        Torch7KeyMap([*_trunk_rules(), *_head_rules()], r"backbone\..*"),
        _claims_authors,
        _describe,
    ),
    Family(
        "deepmask-pytorch",
        "a port of DeepMask to PyTorch",
        KeyMap(_PORT_RULES),
        _claims_port,
        _describe_port,
    ),
)
