"""Reduce objects to what a checkpoint may hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["to_plain"]


def to_plain(value: Any, where: str = "checkpoint") -> Any:
    """Return ``value`` with containers copied and numpy scalars turned into Python numbers.

    The result can be read with ``torch.load(weights_only=True)``. A state dict keeps its
    ``_metadata``, by which modules recognise files of earlier versions.

    Args:
        value: nested mappings, lists and tuples of tensors, arrays, numbers, strings, None.
        where: name of ``value`` for the message.

    Raises:
        TypeError: for anything else, naming its place.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        # A numpy float64 is a float, too; it must not reach the file as numpy's type.
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Mapping):
        items = ((k, to_plain(v, f"{where}.{k}")) for k, v in value.items())
        if not isinstance(value, OrderedDict):
            return dict(items)
        plain = OrderedDict(items)
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            plain._metadata = metadata
        return plain
    if isinstance(value, (list, tuple)):
        items = [to_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{where} is a {type(value).__name__}: a checkpoint holds only tensors, numbers, strings "
        "and containers of them, so that it can be read without running code."
    )
