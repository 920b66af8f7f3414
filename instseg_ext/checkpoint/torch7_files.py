"""Files of Lua Torch (``.t7``), binary and ascii, read as data.

An object begins with its type (4 bytes): nil, number, string, table, Torch object, boolean,
function. Tables, Torch objects and functions have an index behind it; an index that was met before
stands for the same object again. Torch objects name their class and then, tensors and storages
aside, hold the table of their fields. In ascii each group of numbers is a line of text, and the
characters of strings stand as they are.

Functions are byte code of a Lua machine: they are passed over, and nothing of a file is ever
executed. What is allocated is bounded by the length of the file.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CLASS", "LuaFunction", "read_torch7", "torch7_weights"]

# Under this key the fields of a Torch object have its class.
CLASS = "torch_class"
_NIL, _NUMBER, _STRING, _TABLE, _TORCH, _BOOLEAN, _FUNCTION, _OLD_CLOSURE, _CLOSURE = range(9)
# Torch's names of element types; CUDA's have "Cuda" in front, and for float nothing else.
_DTYPES = {
    "Byte": "u1",
    "Char": "i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
    "CudaByte": "u1",
    "CudaChar": "i1",
    "CudaShort": "<i2",
    "CudaInt": "<i4",
    "CudaLong": "<i8",
    "CudaHalf": "<f2",
    "Cuda": "<f4",
    "CudaDouble": "<f8",
}
_ARRAY = re.compile(r"torch\.(\w*?)(Tensor|Storage)")
_MOST_DIMENSIONS = 32
# Nets of thousands of layers are flat; without a bound a file could exhaust the stack.
_DEEPEST = 150
# Of tables and tensors; a file could name one of them in exponentially many ways.
_MOST_NAMES = 100_000


@dataclass(frozen=True)
class LuaFunction:
    """Stands for a function, which is not read.

    Attributes:
        size: of its byte code, in bytes.
    """

    size: int


def read_torch7(path: str | os.PathLike[str]) -> Any:
    """Read the object that ``torch.save`` wrote.

    Args:
        path: local file; binary as written on a 64-bit little-endian machine, or ascii.

    Returns:
        Numbers as float, strings (latin-1), booleans, None; tables as dict, their whole numbers
        among the keys as int; tensors as tensors, which share memory as they did in Torch; storages
        as 1-d tensors; other Torch objects as the dict of their fields with the class under
        ``CLASS``; ``LuaFunction``. An object that is referred to twice is one object here as well,
        and may contain itself.

    Raises:
        ValueError: if the file is damaged, or holds an object whose form is unknown.
    """
    with open(path, "rb") as stream:
        start = stream.read(2)
        stream.seek(0)
        source = _Ascii(stream) if re.fullmatch(rb"[0-8]\n", start) else _Binary(stream)
        try:
            return _Reader(source).object()
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path} cannot be read as a file of Torch7: {error}.") from error


def torch7_weights(content: Any) -> dict[str, Tensor]:
    """Name the tensors of a file by their way from its root, such as ``modules.1.weight``.

    Args:
        content: what ``read_torch7`` gives.

    Returns:
        All tensors with elements of floating-point type, also those that several names lead to.
        Ways that lead back to an object above are not followed.

    Raises:
        ValueError: if there are too many names to be weights.
    """
    found: dict[str, Tensor] = {}
    _collect(content, "", found, set(), itertools.count(1))
    return found


def _collect(
    value: Any, name: str, found: dict[str, Tensor], above: set[int], ways: Iterator[int]
) -> None:
    if isinstance(value, Tensor):
        if value.numel() and value.is_floating_point():
            found[name] = value
    elif isinstance(value, dict) and id(value) not in above:
        above.add(id(value))
        for key, entry in value.items():
            if isinstance(entry, Tensor | dict) and next(ways) > _MOST_NAMES:
                raise ValueError(f"more than {_MOST_NAMES} names lead to its parts: no weights.")
            _collect(entry, f"{name}.{key}" if name else str(key), found, above, ways)
        above.remove(id(value))


class _Reader:
    """Reads objects one inside the other."""

    def __init__(self, source: _Binary | _Ascii) -> None:
        self._source = source
        self._known: dict[int, Any] = {}
        self._depth = 0
        self._simple: dict[int, Callable[[], Any]] = {
            _NIL: lambda: None,
            _NUMBER: lambda: source.numbers("d", 1, "a number")[0],
            _BOOLEAN: lambda: source.integer("a boolean") == 1,
            _STRING: lambda: self._text("a string"),
            _FUNCTION: lambda: self._function(None),
        }
        self._shared: dict[int, Callable[[int], Any]] = {
            _TABLE: self._table,
            _TORCH: self._torch_object,
            _OLD_CLOSURE: self._function,
            _CLOSURE: self._function,
        }

    def object(self) -> Any:
        """Read the next object.

        Raises:
            ValueError: if it cannot be understood.
        """
        kind = self._source.integer("the type of an object")
        if kind not in self._simple and kind not in self._shared:
            raise ValueError(f"there is no type {kind} of objects")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ValueError(f"its objects are nested more than {_DEEPEST} deep")
        if kind in self._simple:
            result = self._simple[kind]()
        else:
            index = self._source.integer("the index of an object")
            known = index in self._known
            result = self._known[index] if known else self._shared[kind](index)
        self._depth -= 1
        return result

    def _text(self, what: str) -> str:
        return self._source.characters(self._source.integer(what), what).decode("latin-1")

    def _function(self, index: int | None) -> LuaFunction:
        size = self._source.integer("a function")
        self._source.characters(size, "a function")
        function = LuaFunction(size)
        if index is not None:
            self._known[index] = function
        # The values that it has from outside may be referred to again, and refer to it.
        self.object()
        return function

    def _table(self, index: int) -> dict[Any, Any]:
        table = self._known[index] = {}
        for _ in range(self._source.count("a table")):
            key, value = self.object(), self.object()
            if isinstance(key, bool):
                key = str(key).lower()  # Python takes True for 1
            elif isinstance(key, float) and key.is_integer():
                key = int(key)
            if not isinstance(key, (str, float, int)):
                raise ValueError(f"a table has a key of the kind {type(key).__name__}")
            table[key] = value
        return table

    def _torch_object(self, index: int) -> Any:
        name = self._text("a version")
        if name.startswith("V "):  # very old files have no version
            name = self._text("the name of a class")
        array = _ARRAY.fullmatch(name)
        if array is None:
            fields = self._known[index] = {CLASS: name}
            self._fields(fields, name)
            return fields
        if array[1] not in _DTYPES:
            raise ValueError(f"class {name} has elements of an unknown type")
        dtype = np.dtype(_DTYPES[array[1]])
        if array[2] == "Storage":
            (size,) = self._source.numbers("q", 1, name)
            result = self._source.values(dtype, size, name)
        else:
            result = self._tensor(dtype, name)
        self._known[index] = result
        return result

    def _fields(self, fields: dict[Any, Any], name: str) -> None:
        """Read the table of a Torch object's fields."""
        content = self.object()
        if content is not None and (not isinstance(content, dict) or CLASS in content):
            raise ValueError(f"an object of the class {name} is no table, a form that is unknown")
        fields.update(content or {})

    def _tensor(self, dtype: np.dtype, name: str) -> Tensor:
        dimensions = self._source.integer(name)
        if not 0 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"a {name} has {dimensions} dimensions")
        size = self._source.numbers("q", dimensions, name)
        stride = self._source.numbers("q", dimensions, name)
        offset = self._source.numbers("q", 1, name)[0] - 1
        storage = self.object()
        if not dimensions or 0 in size:
            return torch.from_numpy(np.empty(size if dimensions else 0, dtype))
        if not isinstance(storage, Tensor) or storage.dim() != 1:
            raise ValueError(f"a {name} of size {list(size)} has no storage")
        if storage.dtype != torch.from_numpy(np.empty(0, dtype)).dtype:
            raise ValueError(f"a {name} has a storage of {storage.dtype}")
        last = offset + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
        if min(size) < 0 or min(stride) < 0 or offset < 0 or last >= len(storage):
            raise ValueError(
                f"a {name} of size {list(size)}, stride {list(stride)} and offset {offset} leaves "
                f"its storage of {len(storage)}"
            )
        return storage.as_strided(size, stride, offset)


class _Source(ABC):
    """What binary and ascii files have in common."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._end = os.fstat(stream.fileno()).st_size

    def integer(self, what: str) -> int:
        """Return a 4-byte integer."""
        return self.numbers("i", 1, what)[0]

    def count(self, what: str) -> int:
        """Return the number of entries that follow, none of which can be without bytes."""
        count = self.integer(what)
        self.check(count, 4, what)
        return count

    @abstractmethod
    def numbers(self, form: str, count: int, what: str) -> tuple:
        """Return numbers: ``i`` 4-byte, ``q`` 8-byte integers, ``d`` floats of 8 bytes."""

    def check(self, count: int, smallest: int, what: str) -> None:
        """Raise if ``count`` things of at least ``smallest`` bytes cannot follow."""
        left = self._end - self.position()
        if not 0 <= count * smallest <= left:
            raise ValueError(
                f"it ends early or is damaged: {what} would take {count} times {smallest} bytes, "
                f"and {left} are left"
            )

    @abstractmethod
    def position(self) -> int:
        """Return how many bytes were read."""


class _Binary(_Source):
    """Reads the numbers of a binary file."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self._stream = stream

    def position(self) -> int:
        return self._stream.tell()

    def numbers(self, form: str, count: int, what: str) -> tuple:
        form = f"<{count}{form}"
        return struct.unpack(form, self.characters(struct.calcsize(form), what))

    def characters(self, size: int, what: str) -> bytes:
        self.check(size, 1, what)
        return self._stream.read(size)

    def values(self, dtype: np.dtype, size: int, what: str) -> Tensor:
        """Return so many elements of a type."""
        self.check(size, dtype.itemsize, what)
        return torch.from_numpy(np.fromfile(self._stream, dtype, size))


class _Ascii(_Source):
    """Reads the lines of numbers and the characters of an ascii file."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self._text, self._at = stream.read(), 0

    def position(self) -> int:
        return self._at

    def numbers(self, form: str, count: int, what: str) -> tuple:
        kind = float if form == "d" else int
        return tuple(map(kind, self._words(count, what)))

    def characters(self, size: int, what: str) -> bytes:
        self.check(size, 1, what)
        start, self._at = self._at, self._at + size
        text = self._text[start : self._at]
        if size and self._text[self._at : self._at + 1] == b"\n":
            self._at += 1
        return text

    def values(self, dtype: np.dtype, size: int, what: str) -> Tensor:
        if dtype.itemsize == 1:  # bytes stand as they are
            return torch.from_numpy(np.frombuffer(self.characters(size, what), dtype).copy())
        kind = float if dtype.kind == "f" else int
        words = map(kind, self._words(size, what))
        return torch.from_numpy(np.array(list(words), dtype=dtype))

    def _words(self, count: int, what: str) -> list[bytes]:
        """Return the numbers of the next line, which must be so many; no numbers have no line."""
        self.check(count, 2, what)
        if not count:
            return []
        end = self._text.find(b"\n", self._at)
        words = self._text[self._at : end if end >= 0 else self._end].split()
        if len(words) != count:
            raise ValueError(f"{what} has {len(words)} numbers in a line instead of {count}")
        self._at = end + 1 if end >= 0 else self._end
        return words
