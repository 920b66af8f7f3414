"""Turn the state dict of somebody else's code into one of ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from instseg_ext.checkpoint.family import Family, Shapes, Variant, families, find_family
from instseg_ext.checkpoint.report import ConversionError, Report, listing

__all__ = [
    "AUTO",
    "check_fit",
    "convert",
    "convert_with_variant",
    "model_shapes",
    "recognise",
    "shapes_of",
]

AUTO = "auto"
# What every name of a dense model of this package starts with, see `Method`.
_OURS = ("backbone.", "head.")
# Not needed to compute anything.
_COUNTER = ".num_batches_tracked"
# A norm without them is an affine layer, to which detectron2's initial values reduce it.
_STATISTICS = (".running_mean", ".running_var")


def convert(state_dict: Mapping[str, Any], family: str = AUTO) -> tuple[dict[str, Tensor], Report]:
    """Rename a state dict of ``family``.

    Args:
        state_dict: tensors or arrays by name, without wrappers (see ``read_weights``); not
            modified.
        family: a name of ``families()``, or ``"auto"`` to recognise it.

    Returns:
        Tensors by our names, and the account of what was done. The account names the config that
        fits; ``check_fit`` compares the tensors with that config's model.

    Raises:
        ConversionError: if the family is not known or not that of the file, if names are left over,
            or if two of them become one.
    """
    weights, report, _ = convert_with_variant(state_dict, family)
    return weights, report


def convert_with_variant(
    state_dict: Mapping[str, Any], family: str = AUTO
) -> tuple[dict[str, Tensor], Report, Variant]:
    """Like ``convert``, and what was recognised."""
    state_dict = _without_wrapper(state_dict)
    found = recognise(state_dict) if family == AUTO else find_family(family)
    if not found.claims(state_dict.keys()):
        raise ConversionError(_not_of_family(found, state_dict))
    mapped = found.key_map.apply(state_dict)
    report = Report(
        found.name, mapped=mapped.renamed, dropped=mapped.dropped, leftovers=mapped.leftovers
    )
    if mapped.leftovers:
        raise ConversionError(
            f"{len(mapped.leftovers)} names of the file have no place in the key map of "
            f"{found.name}: {listing(mapped.leftovers)}.",
            report,
        )
    variant = found.describe(shapes_of(mapped.weights))
    report.variant, report.notes = variant.text, (*mapped.notes, *variant.notes)
    report.config, report.opts = variant.config, variant.opts
    return mapped.weights, report, variant


def recognise(state_dict: Mapping[str, Any]) -> Family:
    """Find out whose file it is.

    Raises:
        ConversionError: if no family claims it; the message says what was seen.
    """
    owners = _owners(state_dict.keys())
    if len(owners) == 1:
        return owners[0]
    if owners:
        raise ConversionError(
            f"the file may be of {' or '.join(family.name for family in owners)}: say which with "
            "--from."
        )
    names = list(state_dict)
    if names and all(name.startswith(_OURS) for name in names):
        raise ConversionError(
            "the names in the file look like this package's own: if it was saved here, it needs "
            "no conversion; give it as MODEL.WEIGHTS."
        )
    raise ConversionError(
        f"the file is of no known family: it has {len(names)} names, of which the first are "
        f"{listing(names, 5) or 'none'}; known families: {', '.join(families())}."
    )


def model_shapes(cfg: CfgNode) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's state dict, without spending memory on the model.

    Args:
        cfg: not modified.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_fit(
    weights: Mapping[str, Tensor], expected: Shapes, report: Report, *, backbone_only: bool = False
) -> None:
    """Compare converted weights with the model they are for.

    Args:
        weights: by converted name.
        expected: shapes of the model's state dict.
        report: ``missing``, ``leftovers`` and ``mismatched`` are filled in.
        backbone_only: the weights' names are endings of the model's. The model may have more, and
            the weights may have parts (``res5.``, ``fc6.``) of which the model has nothing. Norms
            may lack their statistics if all do.

    Raises:
        ConversionError: if a name is missing or too many, or a shape differs.
    """
    spared: tuple[str, ...] = (_COUNTER,)
    if backbone_only:
        expected = _by_ending(weights.keys(), expected)
        if not any(name.endswith(_STATISTICS) for name in weights):
            spared += _STATISTICS
    report.leftovers = [name for name in weights if name not in expected]
    if backbone_only:
        built = {_part(name) for name in expected}
        report.leftovers = [name for name in report.leftovers if _part(name) in built or not built]
    report.missing = [
        name for name in expected if name not in weights and not name.endswith(spared)
    ]
    report.mismatched = {
        name: (tuple(tensor.shape), tuple(expected[name]))
        for name, tensor in weights.items()
        if name in expected and tuple(tensor.shape) != tuple(expected[name])
    }
    wrong = []
    if report.missing:
        wrong.append(
            f"{len(report.missing)} names of the model are missing: {listing(report.missing)}"
        )
    if report.leftovers:
        wrong.append(
            f"{len(report.leftovers)} names are not the model's: {listing(report.leftovers)}"
        )
    if report.mismatched:
        pairs = [
            f"{name} {list(found)} instead of {list(wanted)}"
            for name, (found, wanted) in report.mismatched.items()
        ]
        wrong.append(f"{len(pairs)} shapes differ: {listing(pairs)}")
    if wrong:
        model = f"the model of {report.config}" if report.config else "the model"
        raise ConversionError(
            f"the file ({report.variant}) does not fit {model}: {'; '.join(wrong)}.", report
        )


def shapes_of(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor or array."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def _without_wrapper(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Take off the prefix of parallel wrappers, which some programs save with the weights.

    Raises:
        ConversionError: if it is no dict of names.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise ConversionError("the file holds no tensors by name.")
    if state_dict and all(name.startswith("module.") for name in state_dict):
        return {name.removeprefix("module."): value for name, value in state_dict.items()}
    return state_dict


def _owners(names: Collection[str]) -> list[Family]:
    return [family for family in families().values() if family.claims(names)]


def _not_of_family(family: Family, state_dict: Mapping[str, Any]) -> str:
    owners = [owner.name for owner in _owners(state_dict.keys())]
    hint = f"it looks like {' or '.join(owners)}" if owners else "no known family does"
    return (
        f"the names in the file are not those of {family.name} ({family.summary}); {hint}. The "
        f"first are {listing(list(state_dict), 5) or 'none'}."
    )


def _by_ending(names: Collection[str], expected: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the part of a model that a backbone alone is to fill, under the backbone's names."""
    for ending in names:
        for name in expected:
            if name.endswith(f".{ending}"):
                prefix = name.removesuffix(ending)
                return {
                    key.removeprefix(prefix): shape
                    for key, shape in expected.items()
                    if key.startswith(prefix)
                }
    return {}


def _part(name: str) -> str:
    return name.partition(".")[0]
