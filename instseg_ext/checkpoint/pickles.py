"""Pickles of numpy arrays and builtin containers, read without running code."""

from __future__ import annotations

import importlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

__all__ = ["load_restricted", "torch_safe_globals"]


def load_restricted(file: IO[bytes], also: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Unpickle numpy arrays, dtypes, dicts, OrderedDicts, lists, strings and numbers.

    Strings of Python 2 are read as latin-1, as detectron2 reads them.

    Args:
        file: opened for reading in binary mode.
        also: what else may be called, by module and name; harmless whatever its arguments are.

    Raises:
        pickle.UnpicklingError: if the pickle names any other global; nothing of it is executed.
    """
    unpickler = _RestrictedUnpickler(file, encoding="latin1")
    unpickler.also = dict(also or {})
    return unpickler.load()


def torch_safe_globals() -> list[Any]:
    """Return what ``torch.serialization.safe_globals`` needs for files that hold numpy arrays."""
    named = [(value, f"{module}.{name}") for (module, name), value in _numpy_globals().items()]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"}
    return [*named, *dtypes]


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves the few globals of the table below, and of ``also``, and refuses the rest."""

    also: Mapping[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        allowed = {**_numpy_globals(), **self.also}
        allowed["collections", "OrderedDict"] = OrderedDict
        try:
            return allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}") from None


def _numpy_globals() -> dict[tuple[str, str], Any]:
    """Return the globals of pickled arrays under the module names of numpy 1 and numpy 2."""
    multiarray = _import_first("numpy._core.multiarray", "numpy.core.multiarray")
    numeric = _import_first("numpy._core.numeric", "numpy.core.numeric")
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): _plain_dtype,
        # Protocol 2 writes bytes as text that is encoded again on reading.
        ("_codecs", "encode"): _latin1_bytes,
        ("__builtin__", "bytes"): _no_bytes,
        ("builtins", "bytes"): _no_bytes,
    }
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = multiarray._reconstruct
        table[f"{core}.multiarray", "scalar"] = multiarray.scalar
        table[f"{core}.numeric", "_frombuffer"] = numeric._frombuffer
    return table


def _import_first(*names: str) -> Any:
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(names[-1])


def _plain_dtype(code: Any, *flags: Any) -> np.dtype:
    """Stand in for ``numpy.dtype``; arrays of Python objects are not weights."""
    dtype = np.dtype(code, *flags)
    if dtype.hasobject:
        raise pickle.UnpicklingError("it holds an array of Python objects")
    return dtype


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """Stand in for ``_codecs.encode`` with the one codec that pickles of arrays use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Stand in for ``bytes``, which protocol 2 calls for the content of empty arrays."""
    return b""
