"""The MultiPathNet authors' Lua Torch files: Fast R-CNN with the integral loss, and MultiPathNet.

The first class is the background, whose box is not read. A layer behind the boxes' multiplies them
by standard deviations and adds a mean, which goes into the weights here. Nets were trained on one
GPU or on several, which puts a container more, or none, around the parts before and behind the
pooling.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from instseg_ext.checkpoint import (
    ConversionError,
    Drop,
    Family,
    Rename,
    Shapes,
    Torch7KeyMap,
    Variant,
    torch7_layer,
    torch7_norm,
    torch7_way,
)
from instseg_ext.checkpoint.keymap import Mapped

__all__ = ["FAMILIES"]

_HEAD, _PREDICTOR = "roi_heads.box_head.towers", "roi_heads.box_predictor"
_BOXES = f"{_PREDICTOR}.bbox_pred"
# Of the layer behind the boxes'; taken out before the names are mapped.
_STATISTICS = re.compile(r"modules\.\d+\.modules\.2\.(mean|std)")
# What boxes are after the statistics went into their weights.
_PLAIN_BOXES = ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0))


# --- names ---------------------------------------------------------------------------------------


def _resnet_rules() -> list[Rename]:
    """Return the rules for Fast R-CNN on a ResNet of basic blocks (fb.resnet.torch).

    The norms of the stem and of the first stage are folded into their convolutions.
    """
    rules = [*torch7_layer(torch7_way(1, 1, 1, 1, 1), "backbone.stem.conv1")]
    first, here = torch7_way(1, 1, 1, 1, 4, "{b+1}", 1), "backbone.res2.{b}"
    rules += torch7_layer(f"{first}.{torch7_way(1, 1)}", f"{here}.conv1")
    rules += torch7_layer(f"{first}.{torch7_way(1, 3)}", f"{here}.conv2")
    for block, here in (
        (torch7_way(1, 1, "{s-1}", "{b+1}", 1), "backbone.res{s}.{b}"),
        (torch7_way(3, 1, "{b+1}", 1), f"{_HEAD}.0.blocks.{{b}}"),
    ):
        for name, convolution, norm in (
            ("conv1", (1, 1), (1, 2)),
            ("conv2", (1, 4), (1, 5)),
            ("shortcut", (2, 1), (2, 2)),
        ):
            rules += torch7_layer(f"{block}.{torch7_way(*convolution)}", f"{here}.{name}")
            rules += torch7_norm(f"{block}.{torch7_way(*norm)}", f"{here}.{name}.norm")
    return rules


def _predictor_rules(place: int) -> list[Rename]:
    """Return the rules for the classifiers, one or several, and the boxes' layer.

    Args:
        place: of their container in the net.
    """
    return [
        *torch7_layer(torch7_way(place, 1), f"{_PREDICTOR}.cls_score.0", _background_last),
        *torch7_layer(
            torch7_way(place, 1, "{u+1}"), f"{_PREDICTOR}.cls_score.{{u}}", _background_last
        ),
        *torch7_layer(torch7_way(place, 2), _BOXES),
    ]


def _background_last(classifier: Tensor) -> Tensor:
    """Move the first class behind the others; (K + 1, ...) weights or bias."""
    return classifier.roll(-1, dims=0)


def _is_wrapped(names: Collection[str]) -> tuple[bool, bool]:
    """Tell whether the parts before and behind the pooling lie in a container more.

    Before it, the first convolution is the first of the first of ... the first; behind it, the
    first convolution of the first block is what lies deepest.
    """
    before = max((n.count("modules") for n in names if re.fullmatch(_FIRST, n)), default=0)
    behind = max((n.count("modules") for n in names if n.startswith("modules.3.")), default=0)
    return before > 5, behind > 6


_FIRST = r"(modules\.1\.)+weight"


class _AuthorsKeyMap(Torch7KeyMap):
    """A key map that takes the containers of training off, and applies the boxes' statistics."""

    def apply(self, state_dict: Mapping[str, Any]) -> Mapped:
        """Rename a state dict, see ``KeyMap``.

        Raises:
            ConversionError: also if the rows of the boxes are not four for each class.
        """
        # Early versions of the container without gradient had a field of their own.
        origin = {name.replace(".inner.", ".modules.1."): name for name in state_dict}
        before, behind = _is_wrapped(origin)
        for place in [place for place, more in ((1, before), (3, behind)) if more]:
            prefix = f"{torch7_way(place, 1)}."
            origin = {
                new.replace(f"{prefix}modules.1.", prefix, 1)
                if new.startswith(prefix)
                else new: old
                for new, old in origin.items()
            }
        plain = {new: state_dict[old] for new, old in origin.items()}
        mapped = super().apply(plain)
        statistics = {
            found[1]: value.float().flatten()
            for name, value in plain.items()
            if (found := _STATISTICS.fullmatch(name))
        }
        if f"{_BOXES}.weight" in mapped.weights and f"{_BOXES}.bias" in mapped.weights:
            _plain_boxes(mapped.weights, statistics)
        return Mapped(
            mapped.weights,
            {origin[old]: new for old, new in mapped.renamed.items()},
            {origin[old]: reason for old, reason in mapped.dropped.items()},
            [origin[old] for old in mapped.leftovers],
            mapped.notes,
        )


def _plain_boxes(weights: dict[str, Tensor], statistics: Mapping[str, Tensor]) -> None:
    """Drop the background's box and let the others predict what they mean.

    Args:
        weights: changed in place.
        statistics: ``mean`` and ``std`` (4,) that the file applies to boxes; empty if it does not.

    Raises:
        ConversionError: if there are not four rows per class, or four statistics.
    """
    weight, bias = weights[f"{_BOXES}.weight"], weights[f"{_BOXES}.bias"]
    if len(weight) % 4 or len(weight) < 8 or len(weight) != len(bias):
        raise ConversionError(
            f"the layer of the boxes is {list(weight.shape)}: it must have 4 rows per class."
        )
    weight, bias = weight.unflatten(0, (-1, 4))[1:], bias.unflatten(0, (-1, 4))[1:]
    if statistics:
        if any(len(statistics.get(name, ())) != 4 for name in ("mean", "std")):
            raise ConversionError("the statistics of the boxes are not four means and deviations.")
        weight = weight * statistics["std"][:, None]
        bias = bias * statistics["std"] + statistics["mean"]
    weights[f"{_BOXES}.weight"] = weight.flatten(0, 1).contiguous()
    weights[f"{_BOXES}.bias"] = bias.flatten().contiguous()


# --- which model ---------------------------------------------------------------------------------


def _claims(names: Collection[str]) -> bool:
    """Look for a net whose fourth part has classifiers and boxes."""
    classifiers = any(re.fullmatch(r"modules\.4\.modules\.1\.(modules\.\d+\.)?weight", n)
                      for n in names)  # fmt: skip
    return classifiers and "modules.4.modules.2.weight" in names


def _describe(shapes: Shapes) -> Variant:
    first = shapes.get(f"{_PREDICTOR}.cls_score.0.bias")
    count = sum(n.startswith(f"{_PREDICTOR}.cls_score") and n.endswith("bias") for n in shapes)
    is_resnet = "backbone.res4.1.conv2.weight" in shapes
    thresholds = [round(0.5 + 0.05 * u, 2) for u in range(count)]
    other = () if count == 6 else ("MODEL.MULTIPATH.IOU_THRESHOLDS", thresholds)
    return Variant(
        f"Fast R-CNN, {'ResNet-18' if is_resnet else 'an unknown network'}, {count} classifiers",
        "MultiPathNet/fast_rcnn_integral_R_18_coco" if is_resnet else "",
        (*_PLAIN_BOXES, *other),
        num_classes=first[0] - 1 if first else None,
    )


FAMILIES = (
    Family(
        "multipathnet-torch7",
        "the MultiPathNet authors' Lua Torch code",
        _AuthorsKeyMap(
            [
                *_resnet_rules(),
                *_predictor_rules(4),
                Drop("modules.{n}.modules.2.{p:mean|std}", "went into the weights of the boxes"),
            ],
            r"backbone\..*|roi_heads\.box_head\.towers\.0\.blocks\..*",
        ),
        _claims,
        _describe,
    ),
)
