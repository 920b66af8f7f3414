"""Write files of Lua Torch as its ``torch.save`` does, binary or ascii."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

NAMES = {
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.float16: "Half",
    torch.float32: "Float",
    torch.float64: "Double",
}


@dataclass
class Torch:
    """An object of a class, with its fields."""

    name: str
    fields: Any = field(default_factory=dict)


@dataclass
class Function:
    """A function: byte code, and the values that it has from outside."""

    code: bytes = b"\x1bLJ junk"
    upvalues: Any = field(default_factory=dict)
    kind: int = 8


@dataclass
class Storage:
    """The elements of tensors; several tensors may have one."""

    values: torch.Tensor
    prefix: str = ""


@dataclass
class View:
    """A tensor on a storage."""

    storage: Storage | None
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0


class Writer:
    """Collects the bytes of one file.

    Args:
        ascii: write text.
        cuda: name tensors as those of a GPU.
        versions: False leaves out the versions of classes, as very old files do.
    """

    def __init__(self, *, ascii: bool = False, cuda: bool = False, versions: bool = True):
        self.ascii, self.cuda, self.versions = ascii, cuda, versions
        self.parts: list[bytes] = []
        self.written: dict[int, int] = {}
        self.alive: list[Any] = []  # an id is not given to another object meanwhile

    def numbers(self, form, values):
        if self.ascii:
            texts = [f"{v:.17g}" if form in "dfe" else str(v) for v in values]
            self.parts += [" ".join(texts).encode() + b"\n"] if texts else []
        else:
            self.parts.append(struct.pack(f"<{len(values)}{form}", *values))

    def text(self, content):
        content = content if isinstance(content, bytes) else content.encode("latin-1")
        self.numbers("i", [len(content)])
        self.raw(content)

    def raw(self, content):
        self.parts.append(content + (b"\n" if self.ascii and content else b""))

    def object(self, value):
        if value is None:
            self.numbers("i", [0])
        elif isinstance(value, bool):
            self.numbers("i", [5])
            self.numbers("i", [int(value)])
        elif isinstance(value, (int, float)):
            self.numbers("i", [1])
            self.numbers("d", [float(value)])
        elif isinstance(value, str):
            self.numbers("i", [2])
            self.text(value)
        elif isinstance(value, Function) and value.kind == 6:
            self.numbers("i", [6])
            self.text(value.code)
            self.object(value.upvalues)
        else:
            self.shared(value)

    def shared(self, value):
        kind = {dict: 3, list: 3, Function: 8}.get(type(value), 4)
        self.numbers("i", [value.kind if kind == 8 else kind])
        known = id(value) in self.written
        if not known:
            self.written[id(value)] = len(self.written) + 1
            self.alive.append(value)
        self.numbers("i", [self.written[id(value)]])
        if known:
            return
        if isinstance(value, list):
            self.entries(dict(enumerate(value, start=1)))
        elif isinstance(value, dict):
            self.entries(value)
        elif isinstance(value, Function):
            self.text(value.code)
            self.object(value.upvalues)
        else:
            self.torch_object(value)

    def entries(self, table):
        self.numbers("i", [len(table)])
        for key, entry in table.items():
            self.object(key)
            self.object(entry)

    def torch_object(self, value):
        if isinstance(value, Torch):
            self.header(value.name)
            self.object(value.fields)
        elif isinstance(value, Storage):
            self.header(f"torch.{self.element(value)}Storage")
            self.numbers("q", [len(value.values)])
            self.elements(value.values)
        elif isinstance(value, View):
            self.tensor(value)
        else:
            storage = Storage(value.contiguous().flatten())
            self.tensor(View(storage, tuple(value.shape), value.contiguous().stride()))

    def tensor(self, view):
        element = self.element(view.storage) if view.storage else "Float"
        self.header(f"torch.{element}Tensor")
        self.numbers("i", [len(view.size)])
        self.numbers("q", list(view.size))
        self.numbers("q", list(view.stride))
        self.numbers("q", [view.offset + 1])
        self.object(view.storage)

    def element(self, storage):
        name = NAMES[storage.values.dtype]
        if self.cuda:
            return "Cuda" if name == "Float" else f"Cuda{name}"
        return name

    def elements(self, values):
        array = values.numpy()
        if not self.ascii:
            self.parts.append(array.tobytes())
        elif array.dtype.itemsize == 1:
            self.raw(array.tobytes())
        elif array.dtype.kind == "f":
            self.numbers("d", array.astype(np.float64).tolist())
        else:
            self.numbers("q", array.tolist())

    def header(self, name):
        if self.versions:
            self.text("V 1")
        self.text(name)


def file_bytes(value, **options):
    """Return the file of an object; tables are dicts and lists."""
    writer = Writer(**options)
    writer.object(value)
    return b"".join(writer.parts)


# --- nets ---------------------------------------------------------------------------------------


def net(*modules, name="nn.Sequential"):
    return Torch(name, {"modules": list(modules), "train": True, "_type": "torch.FloatTensor"})


def layer(name, **fields):
    """A layer with its work space."""
    fields = {key: value for key, value in fields.items() if value is not None}
    space = {"output": torch.empty(0), "gradInput": torch.zeros(2, 2)}
    space |= {f"grad{k.title()}": v for k, v in fields.items() if k in ("weight", "bias")}
    return Torch(f"nn.{name}", {**fields, **space})


def one(name):
    return layer(name)


def named(value, name=""):
    """Name the tensors of a model as they are named when its file has been read."""
    if isinstance(value, torch.Tensor):
        return {name: value} if value.numel() else {}
    if isinstance(value, Torch):
        value = value.fields
    if isinstance(value, list):
        value = dict(enumerate(value, start=1))
    found = {}
    for key, entry in value.items() if isinstance(value, dict) else ():
        found |= named(entry, f"{name}.{key}" if name else str(key))
    return found
