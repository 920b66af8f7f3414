"""What a conversion did, for the eyes of whoever asked for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ConversionError", "Report", "listing", "shorten"]

_MOST, _FEW = 10, 2


@dataclass
class Report:
    """The account of one conversion.

    Attributes:
        family: name of the family.
        variant: what was recognised, in words.
        config: name of the config that fits; empty if none does, or for a backbone.
        opts: ``(key, value, key, value, ...)``, what differs from that config.
        notes: what the user should know: what the weights cannot tell, what was changed in them.
        mapped: new name by old name.
        dropped: reason by old name. Entries beside the state dict (``optimizer``) are in it, too.
        missing: names of the model that the file lacks.
        leftovers: names of the file that no rule of the family concerns.
        mismatched: name to (shape in the file, shape in the model).
    """

    family: str
    variant: str = ""
    config: str = ""
    opts: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    mapped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def summary(self) -> str:
        """Return a few lines: what was recognised, and counts."""
        lines = [f"family      {self.family}"]
        if self.variant:
            lines.append(f"recognised  {self.variant}")
        if self.config:
            lines.append(f"config      {' '.join(map(str, (self.config, *self.opts)))}")
        lines += [f"note        {note}" for note in self.notes]
        lines.append(f"mapped      {len(self.mapped)}")
        lines.append(f"dropped     {len(self.dropped)}")
        for reason in dict.fromkeys(self.dropped.values()):
            names = [name for name, why in self.dropped.items() if why == reason]
            lines.append(f"            {len(names)} {reason}: {listing(names, _FEW)}")
        lines.append(f"missing     {len(self.missing)}")
        lines.append(f"left over   {len(self.leftovers)}")
        if self.mismatched:
            lines.append(f"mismatched  {len(self.mismatched)}")
        return "\n".join(lines)

    def full(self) -> str:
        """Return the summary and one line for every name."""
        width = max((len(name) for name in self.mapped), default=0)
        lines = [self.summary(), ""]
        lines += [f"mapped      {old:<{width}}  ->  {new}" for old, new in self.mapped.items()]
        lines += [f"dropped     {name}  ({reason})" for name, reason in self.dropped.items()]
        lines += [f"missing     {name}" for name in self.missing]
        lines += [f"left over   {name}" for name in self.leftovers]
        lines += [
            f"mismatched  {name}  {list(found)} in the file, {list(wanted)} in the model"
            for name, (found, wanted) in self.mismatched.items()
        ]
        return "\n".join(lines)


class ConversionError(ValueError):
    """A file that cannot be converted; the message names what is wrong.

    Attributes:
        report: what was found out so far, None if nothing was.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        """Keep the message and the report."""
        super().__init__(message)
        self.report = report


def listing(names: Collection[str] | Mapping[str, object], most: int = _MOST) -> str:
    """Return the first few names and how many more there are."""
    shown = [shorten(name) for name in list(names)[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def shorten(name: str, most: int = 120) -> str:
    """Return ``name`` fit for a message: names in files of strangers may be of any length."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= most else f"{text[:most]}..."
