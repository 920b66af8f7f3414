"""Key maps: how the names of a foreign state dict become ours, written as a table.

A rule is a pair of names with holes in braces. In a source name

    {a}         a number; ``{3*q+1}`` one that solves for a whole ``q``
    {kind:x|y}  one of the words listed
    {rest*}     any text, not empty

and in the target ``{a}``, ``{a+1}``, ``{a-2}``, ``{2*a}``, ``{kind}``, ``{rest}`` fill in what was
matched. Everything outside braces is literal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instseg_ext.checkpoint.report import ConversionError, shorten

__all__ = ["COUNTERS", "Drop", "KeyMap", "Mapped", "Rename", "as_tensor"]

_HOLE = re.compile(r"\{([^{}]*)\}")
_NUMBER = re.compile(r"(?:(?P<factor>\d+)\*)?(?P<name>[a-z]\w*)(?P<shift>[+-]\d+)?")


@dataclass(frozen=True)
class Rename:
    """A tensor that goes under another name.

    Attributes:
        source: name in the file, with holes.
        target: name here; it may use each hole of ``source`` any number of times.
        transform: changes the tensor, for layouts that differ (order of classes, of axes).
        note: a sentence for the report of a file that the rule concerns.
    """

    source: str
    target: str
    transform: Callable[[Tensor], Tensor] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a target that asks for what the source does not give."""
        known = self._pattern.names
        for hole in _HOLE.findall(self.target):
            number = _NUMBER.fullmatch(hole)
            if number is None or number["name"] not in known:
                raise ValueError(f"{self.target!r} uses {{{hole}}}, which {self.source!r} lacks.")

    def apply(self, name: str) -> str | None:
        """Return the new name, None if the rule does not concern ``name``."""
        found = self._pattern.match(name)
        if found is None:
            return None
        return _HOLE.sub(lambda hole: _fill(hole[1], found), self.target)

    @cached_property
    def _pattern(self) -> _Pattern:
        return _Pattern(self.source)


@dataclass(frozen=True)
class Drop:
    """An entry that is not taken over.

    Attributes:
        source: name in the file, with holes.
        reason: why, in a few words; the report groups the dropped names by it.
    """

    source: str
    reason: str

    def concerns(self, name: str) -> bool:
        """Tell whether ``name`` is to be dropped."""
        return self._pattern.match(name) is not None

    @cached_property
    def _pattern(self) -> _Pattern:
        return _Pattern(self.source)


# Batch normalisation counts its batches; only its cumulative average, which nobody uses, reads it.
COUNTERS = Drop("{layer*}.num_batches_tracked", "counters of batch normalisation")


@dataclass(frozen=True)
class Mapped:
    """What a key map made of a state dict.

    Attributes:
        weights: tensors by new name, in the order of the file.
        renamed: new name by old name.
        dropped: reason by old name.
        leftovers: old names that no rule concerns.
        notes: of the rules that were applied, each once.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class KeyMap:
    """Rules, of which the first that concerns a name decides."""

    def __init__(self, rules: Sequence[Rename | Drop]) -> None:
        """Keep the rules.

        Args:
            rules: in order of precedence.
        """
        self.rules = tuple(rules)

    def apply(self, state_dict: Mapping[str, Any]) -> Mapped:
        """Rename a state dict in one pass.

        Args:
            state_dict: tensors or numpy arrays by name; not modified.

        Returns:
            The result. Tensors that no transform changed share their memory with the file's.

        Raises:
            ConversionError: if two names become one, or an entry that is kept is no tensor.
        """
        mapped = Mapped()
        origin: dict[str, str] = {}
        for name, value in state_dict.items():
            rule, target = self._decide(name)
            if isinstance(rule, Drop):
                mapped.dropped[name] = rule.reason
            elif target is None:
                mapped.leftovers.append(name)
            elif target in origin:
                raise ConversionError(f"both {origin[target]} and {name} become {target}.")
            else:
                origin[target] = name
                mapped.renamed[name] = target
                tensor = as_tensor(name, value)
                mapped.weights[target] = rule.transform(tensor) if rule.transform else tensor
                if rule.note and rule.note not in mapped.notes:
                    mapped.notes.append(rule.note)
        return mapped

    def _decide(self, name: str) -> tuple[Rename | Drop | None, str | None]:
        for rule in self.rules:
            if isinstance(rule, Drop):
                if rule.concerns(name):
                    return rule, None
            elif (target := rule.apply(name)) is not None:
                return rule, target
        return None, None


def as_tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` as a tensor without gradient; arrays are not copied where possible.

    Raises:
        ConversionError: if it is neither tensor nor array nor number, naming it.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic, int, float)):
        return torch.from_numpy(np.ascontiguousarray(value)).reshape(np.shape(value))
    raise ConversionError(f"{shorten(name)} is a {type(value).__name__}, not a tensor.")


class _Pattern:
    """The source name of a rule."""

    def __init__(self, text: str) -> None:
        self.names: set[str] = set()
        self._scales: dict[str, tuple[int, int]] = {}
        pieces, end = [], 0
        for hole in _HOLE.finditer(text):
            pieces += [re.escape(text[end : hole.start()]), self._group(hole[1], text)]
            end = hole.end()
        self._regex = re.compile("".join([*pieces, re.escape(text[end:])]))

    def _group(self, hole: str, text: str) -> str:
        name, colon, words = hole.partition(":")
        if colon:
            body = "|".join(re.escape(word) for word in words.split("|"))
        elif hole.endswith("*"):
            name, body = hole[:-1], ".+"
        elif number := _NUMBER.fullmatch(hole):
            name, body = number["name"], r"\d+"
            self._scales[name] = (int(number["factor"] or 1), int(number["shift"] or 0))
        else:
            raise ValueError(f"{text!r} has a hole of unknown form, {{{hole}}}.")
        if not name.isidentifier() or name in self.names:
            raise ValueError(f"{text!r}: {name!r} is no name of a hole, or is used twice.")
        self.names.add(name)
        return f"(?P<{name}>{body})"

    def match(self, name: str) -> dict[str, int | str] | None:
        """Return the values of the holes, None if ``name`` has another form."""
        match = self._regex.fullmatch(name)
        if match is None:
            return None
        values: dict[str, int | str] = dict(match.groupdict())
        for hole, (factor, shift) in self._scales.items():
            whole, rest = divmod(int(match[hole]) - shift, factor)
            if rest or whole < 0:
                return None
            values[hole] = whole
        return values


def _fill(hole: str, values: Mapping[str, int | str]) -> str:
    number = _NUMBER.fullmatch(hole)
    assert number is not None, "checked when the rule was made"
    value = values[number["name"]]
    if isinstance(value, str):
        return value
    return str(int(number["factor"] or 1) * value + int(number["shift"] or 0))
