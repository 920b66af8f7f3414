"""Families of foreign checkpoints, and the registry that knows them by name.

How a family is written:

1. Rules (`instseg_ext.checkpoint.keymap`): one `Rename` per kind of name in the file, a `Drop`
   with its reason for what is not taken over. `resnet_rules` has what families share.
2. ``claims(names)``: a cheap test on the file's names that no other family's files pass. It says
   whose file this is, not which model.
3. ``describe(shapes)``: looks at shapes by *converted* name, so that families that differ in names
   only share it, and returns a `Variant`: what it is in words, the config that fits, the class
   count. For a file that holds a backbone alone it sets ``backbone_only``; the names are then those
   behind ``backbone.bottom_up.`` (``stem.conv1.weight``, ``res2.0.conv1.weight``) and the result is
   marked ``matching_heuristics``, so that detectron2 finds their place in any model by their
   endings, as it does with its own ImageNet files.
4. A `Family` of the three. A method lists its families in its `Method` record (``converters``), and
   the zoo registers them; families that belong to no method are registered in
   `instseg_ext.checkpoint` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import get_cfg

import instseg_ext
from instseg_ext.checkpoint.keymap import KeyMap

__all__ = [
    "Family",
    "Shapes",
    "Variant",
    "families",
    "find_family",
    "register_family",
]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Variant:
    """Which of a family's models a file holds.

    Attributes:
        text: in words, such as ``"SOLOv2, ResNet-50, 4 convolutions of width 512"``.
        config: name of the config that fits, such as ``"SOLO/solov2_R_50_FPN_3x"``; empty if no
            config of ours does, or where none is needed.
        opts: ``(key, value, key, value, ...)``, what differs from that config.
        notes: sentences on what the weights cannot tell.
        num_classes: foreground classes, read from the classifier; None without one.
        backbone_only: see the module's docstring.
    """

    text: str
    config: str = ""
    opts: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    num_classes: int | None = None
    backbone_only: bool = False


@dataclass(frozen=True)
class Family:
    """Files that were written by one code base.

    Attributes:
        name: as typed after ``--from``.
        summary: whose files these are, in a few words.
        key_map: the rules.
        claims: tells from the names in a file whether it is one of the family's.
        describe: tells from shapes by converted name which model it is.
    """

    name: str
    summary: str
    key_map: KeyMap
    claims: Callable[[Collection[str]], bool]
    describe: Callable[[Shapes], Variant]


_REGISTRY: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known by its name.

    Raises:
        ValueError: if another one has that name.
    """
    if _REGISTRY.setdefault(family.name, family) is not family:
        raise ValueError(f"there are two checkpoint families named {family.name!r}.")
    return family


def families() -> dict[str, Family]:
    """Return all families by name, in alphabetical order."""
    # Methods bring families along, and only the front door of the package knows all methods.
    instseg_ext.add_instseg_config(get_cfg())
    return dict(sorted(_REGISTRY.items()))


def find_family(name: str) -> Family:
    """Return the family of that name.

    Raises:
        ValueError: if there is none; the message lists the names.
    """
    known = families()
    if name not in known:
        raise ValueError(f"there is no checkpoint family {name!r}; known: {', '.join(known)}.")
    return known[name]
