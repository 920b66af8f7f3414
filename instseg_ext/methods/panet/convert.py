"""Checkpoints of the PANet authors' PyTorch code, a fork of Detectron.pytorch.

Channels of anchors, regions and masks have our order. Three things do not: the background is the
first class, the pyramid's layers are listed from the coarsest level to the finest, and the frozen
norms of the backbone are layers of scale and shift alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor

from instseg_ext.checkpoint import (
    ConversionError,
    Family,
    KeyMap,
    Rename,
    ResNetFacts,
    Shapes,
    Variant,
    resnet_facts,
)
from instseg_ext.checkpoint.keymap import Mapped

__all__ = ["FAMILIES"]

_BOTTOM_UP = "backbone.bottom_up."
_BOX, _MASK = "roi_heads.box_head", "roi_heads.mask_head"
_PREDICTOR = "roi_heads.box_predictor"


# --- classes -------------------------------------------------------------------------------------


def _background_last(predictor: Tensor) -> Tensor:
    """Move the first class behind the others; (K + 1, ...) weight or bias."""
    return predictor.roll(-1, dims=0)


def _without_background_box(predictor: Tensor) -> Tensor:
    """Leave out the box of the first class, which is never read; (4 (K + 1), ...).

    Raises:
        ConversionError: if there are not 4 rows per class.
    """
    if not predictor.dim() or len(predictor) % 4:
        raise ConversionError(
            f"Box_Outs.bbox_pred is {list(predictor.shape)}: it must have 4 rows per class."
        )
    return predictor[4:].contiguous()


def _without_background_mask(predictor: Tensor) -> Tensor:
    """Leave out the mask of the first class, which is never read; (K + 1, ...).

    Raises:
        ConversionError: if all classes share one mask.
    """
    if len(predictor) < 2:
        raise ConversionError(
            "Mask_Outs.classify has one mask for all classes (MRCNN.CLS_SPECIFIC_MASK False): such "
            "models are not converted."
        )
    return predictor[1:].contiguous()


# --- names ---------------------------------------------------------------------------------------

_PARAMETERS = "{p:weight|bias}"


def _layers(names: Mapping[str, str]) -> tuple[Rename, ...]:
    """Return the rules for single layers, name in the file to name here."""
    return tuple(Rename(f"{old}.{_PARAMETERS}", f"{new}.{{p}}") for old, new in names.items())


def _blocks(names: Mapping[str, str]) -> tuple[Rename, ...]:
    """Return the rules for pairs of a convolution (0) and its norm (1)."""
    return _layers(
        {f"{old}.0": new for old, new in names.items()}
        | {f"{old}.1": f"{new}.norm" for old, new in names.items()}
    )


def _resnet_rules() -> tuple[Rename, ...]:
    there, here = "Conv_Body.conv_body.res{n}.{b}", f"{_BOTTOM_UP}res{{n}}.{{b}}"
    stem = "Conv_Body.conv_body.res1"
    return (
        Rename(f"{stem}.conv1.weight", f"{_BOTTOM_UP}stem.conv1.weight"),
        Rename(f"{there}.conv{{c}}.weight", f"{here}.conv{{c}}.weight"),
        Rename(f"{there}.downsample.0.weight", f"{here}.shortcut.weight"),
        *_layers(
            {
                f"{stem}.bn1": f"{_BOTTOM_UP}stem.conv1.norm",
                f"{there}.bn{{c}}": f"{here}.conv{{c}}.norm",
                f"{there}.downsample.1": f"{here}.shortcut.norm",
            }
        ),
    )


def _pyramid_rules() -> tuple[Rename, ...]:
    """Return the rules of both paths, listed coarse to fine and fine to coarse."""
    body = "Conv_Body"
    return _blocks(
        {f"{body}.conv_top": "backbone.fpn_lateral5"}
        | {
            f"{body}.topdown_lateral_modules.{n}.conv_lateral": f"backbone.fpn_lateral{4 - n}"
            for n in range(3)
        }
        | {f"{body}.posthoc_modules.{n}": f"backbone.fpn_output{5 - n}" for n in range(4)}
        # Spelt so.
        | {f"{body}.panet_buttomup_conv1_modules.{{n}}": "backbone.pan_down{n+2}"}
        | {f"{body}.panet_buttomup_conv2_modules.{{n}}": "backbone.pan_out{n+3}"}
    )


_RULES = (
    *_resnet_rules(),
    *_pyramid_rules(),
    *_layers(
        {
            "RPN.FPN_RPN_conv": "proposal_generator.rpn_head.conv",
            "RPN.FPN_RPN_cls_score": "proposal_generator.rpn_head.objectness_logits",
            "RPN.FPN_RPN_bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
            # ReLUs have numbers, too.
            "Box_Head.convs.{3*q}": f"{_BOX}.conv{{q+2}}",
            "Box_Head.convs.{3*q+1}": f"{_BOX}.conv{{q+2}}.norm",
            "Box_Head.fc": f"{_BOX}.fc1",
            # The head without convolutions.
            "Box_Head.fc1.{l}.0": f"{_BOX}.fc1.{{l}}",
            "Box_Head.fc1.{l}.1": f"{_BOX}.fc1_norm.{{l}}",
            "Box_Head.fc2.0": f"{_BOX}.fc2",
            "Box_Head.fc2.1": f"{_BOX}.fc2_norm",
            "Mask_Head.conv_fcn.{3*q}": f"{_MASK}.conv{{q+2}}",
            "Mask_Head.conv_fcn.{3*q+1}": f"{_MASK}.conv{{q+2}}.norm",
            "Mask_Head.mask_fc.0": f"{_MASK}.fc",
            "Mask_Head.upconv": f"{_MASK}.deconv",
        }
    ),
    *_blocks(
        {
            "Box_Head.conv1_head.{l}": f"{_BOX}.conv1.{{l}}",
            "Mask_Head.mask_conv1.{l}": f"{_MASK}.conv1.{{l}}",
            "Mask_Head.mask_conv4": f"{_MASK}.conv4",
            "Mask_Head.mask_conv4_fc": f"{_MASK}.conv4_fc",
            "Mask_Head.mask_conv5_fc": f"{_MASK}.conv5_fc",
        }
    ),
    Rename(f"Box_Outs.cls_score.{_PARAMETERS}", f"{_PREDICTOR}.cls_score.{{p}}", _background_last),
    Rename(
        f"Box_Outs.bbox_pred.{_PARAMETERS}",
        f"{_PREDICTOR}.bbox_pred.{{p}}",
        _without_background_box,
    ),
    Rename(
        f"Mask_Outs.classify.{_PARAMETERS}", f"{_MASK}.predictor.{{p}}", _without_background_mask
    ),
)


class _WithStatistics(KeyMap):
    """Rules after which the backbone's layers of scale and shift are frozen norms.

    Those have statistics, with which detectron2 makes them the identity; without them a model
    would report them missing.
    """

    def apply(self, state_dict: Mapping[str, Any]) -> Mapped:
        """Rename a state dict and add the statistics; see `KeyMap.apply`."""
        mapped = super().apply(state_dict)
        scales = [
            (name.removesuffix(".weight"), len(scale))
            for name, scale in mapped.weights.items()
            if name.startswith(_BOTTOM_UP) and name.endswith(".norm.weight")
        ]
        for name, channels in scales:
            identity = FrozenBatchNorm2d(channels)
            mapped.weights[f"{name}.running_mean"] = identity.running_mean
            mapped.weights[f"{name}.running_var"] = identity.running_var
        return mapped


# --- models --------------------------------------------------------------------------------------

# Fully connected box head, masks.
_CONFIGS = {
    (False, True): "PANet/panet_R_50_FPN_2x_mask",
    (False, False): "PANet/panet_R_50_FPN_1x_det",
    (True, False): "PANet/panet_R_50_FPN_1x_det_2fc",
}
# Boxes as in the authors' code.
_OPTS = ("MODEL.PANET.LEGACY_D1", True)
_NOTE = (
    "the weights want MODEL.PANET.LEGACY_D1 True, the authors' anchors and boxes, which a config "
    "given with --config does not get by itself"
)


def _describe(shapes: Shapes) -> Variant:
    facts = resnet_facts(shapes)
    two_fc = f"{_BOX}.fc1.0.weight" in shapes
    masks = f"{_MASK}.predictor.weight" in shapes
    fusion = f"{_MASK}.fc.weight" in shapes
    words = [
        f"PANet, {facts.text}, box head of {'two layers' if two_fc else 'convolutions and a layer'}"
    ]
    if masks:
        words.append(f"masks {'with' if fusion else 'without'} fully connected fusion")
    config = _CONFIGS.get((two_fc, masks), "") if facts == ResNetFacts(50) else ""
    opts = (*_OPTS, "MODEL.PANET.FC_FUSION", False) if masks and not fusion else _OPTS
    classifier = shapes.get(f"{_PREDICTOR}.cls_score.bias")
    return Variant(
        ", ".join(words),
        config,
        opts if config else (),
        (_NOTE,),
        # The last class is the background.
        classifier[0] - 1 if classifier else None,
    )


def _claims(names: Collection[str]) -> bool:
    return any(name.startswith("Conv_Body.panet_buttomup_") for name in names)


FAMILIES = (
    Family(
        "panet",
        "the PANet authors' PyTorch code",
        _WithStatistics(_RULES),
        _claims,
        _describe,
    ),
)
