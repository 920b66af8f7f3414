"""MXNet's ``.params`` files: a list of named arrays, read as data.

All integers are little-endian. A file is the number 0x112, a reserved one, then (each behind its
count, 8 bytes) the arrays and their names. An array is

    version      header                                  what follows
    0            number of dimensions, 4 bytes each      device (2 x 4), type (4), values
    1            magic; 4 and then 8 bytes each          likewise
    2, 3         magic; storage (4); as version 1        likewise, unless the storage is sparse

An array that never had values ends behind its shape, which then has no dimensions or, in version 3
(NumPy's semantics, where no dimensions mean one number), unknown ones.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from typing import IO

import numpy as np

__all__ = ["MXNET_MAGIC", "read_mxnet"]

MXNET_MAGIC = struct.pack("<Q", 0x112)
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DTYPES = {0: "<f4", 1: "<f8", 2: "<f2", 3: "u1", 4: "<i4", 5: "i1", 6: "<i8"}
_DENSE, _STORAGES = 0, {1: "row-sparse", 2: "sparse (CSR)"}
# Nothing has more; without a bound, any number in the place of a magic would be taken for it.
_MOST_DIMENSIONS = 32


def read_mxnet(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the arrays of an MXNet file by name, such as ``"arg:conv1_weight"``.

    Nothing is allocated before the whole file has been found to be as long as its headers say.

    Args:
        path: local file.

    Returns:
        Arrays in the order of the file.

    Raises:
        ValueError: if the file is damaged, or holds what is not understood (sparse arrays, arrays
            without values or without names, unknown types).
    """
    with open(path, "rb") as stream:
        try:
            entries = _entries(_Cursor(stream))
            return {name: _values(stream, entry) for name, entry in entries.items()}
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as a file of MXNet: {error}.") from error


@dataclass(frozen=True)
class _Entry:
    """Where an array lies."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


class _Cursor:
    """Reads numbers from a file and knows how much of it is left."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._end = os.fstat(stream.fileno()).st_size

    @property
    def position(self) -> int:
        return self._stream.tell()

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        """Return the numbers that ``form``, without byte order, describes for ``struct``."""
        return struct.unpack(f"<{form}", self.text(struct.calcsize(f"<{form}"), what))

    def text(self, size: int, what: str) -> bytes:
        self._check(size, what)
        return self._stream.read(size)

    def skip(self, size: int, what: str) -> None:
        self._check(size, what)
        self._stream.seek(size, os.SEEK_CUR)

    def count(self, smallest: int, what: str) -> int:
        """Return how many things follow, each of which takes at least ``smallest`` bytes."""
        (count,) = self.numbers("Q", what)
        self._check(count * smallest, f"{count} {what}")
        return count

    def _check(self, size: int, what: str) -> None:
        left = self._end - self.position
        if size > left:
            raise ValueError(
                f"it ends early, {what} would take {size} bytes and {left} are left: it is damaged "
                "or not completely downloaded"
            )


def _entries(cursor: _Cursor) -> dict[str, _Entry]:
    """Go through the whole file without reading values."""
    if cursor.text(len(MXNET_MAGIC), "the header") != MXNET_MAGIC:
        raise ValueError("it does not begin as one")
    cursor.numbers("Q", "the header")
    arrays = [_entry(cursor, f"array {n}") for n in range(cursor.count(4, "arrays"))]
    count = cursor.count(8, "names")
    if count != len(arrays):
        raise ValueError(f"it has {len(arrays)} arrays and {count} names: weights have names")
    entries: dict[str, _Entry] = {}
    for entry in arrays:
        name = cursor.text(cursor.count(1, "bytes of a name"), "a name").decode()
        if isinstance(entry, str):
            raise ValueError(f"{name!r} is {entry}")
        if name in entries:
            raise ValueError(f"it has two arrays named {name!r}")
        entries[name] = entry
    return entries


def _entry(cursor: _Cursor, what: str) -> _Entry | str:
    """Return where the next array lies, or what is wrong with it that its name should go with."""
    (magic,) = cursor.numbers("I", what)
    if magic in (_V2, _V3):
        (storage,) = cursor.numbers("i", what)
        if storage != _DENSE:
            # Its length is unknown here, and so is the place of its name.
            kind = _STORAGES.get(storage, f"of the unknown storage type {storage}")
            raise ValueError(f"{what} is {kind}; only dense arrays are read")
    if magic in (_V1, _V2, _V3):
        (dimensions,) = cursor.numbers("i", what)
        size = "q"
    else:
        dimensions, size = magic, "I"
    if not -1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{what} has the unknown version or number of dimensions {dimensions:#x}")
    shape = cursor.numbers(f"{max(dimensions, 0)}{size}", what)
    unknown = dimensions < 0 or min(shape, default=0) < 0
    if unknown or (dimensions == 0 and magic != _V3):
        return "an array without values"
    _, _, code = cursor.numbers("iii", what)
    if code not in _DTYPES:
        raise ValueError(f"{what} has values of the unknown type {code}")
    dtype = np.dtype(_DTYPES[code])
    entry = _Entry(shape, dtype, cursor.position)
    cursor.skip(math.prod(shape) * dtype.itemsize, f"{what}, {list(shape)}")
    return entry


def _values(stream: IO[bytes], entry: _Entry) -> np.ndarray:
    stream.seek(entry.offset)
    values = np.fromfile(stream, entry.dtype, math.prod(entry.shape))
    return values.reshape(entry.shape)
