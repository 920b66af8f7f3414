"""The file that a conversion writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instseg_ext import __version__
from instseg_ext.checkpoint.atomic import atomic_write
from instseg_ext.checkpoint.plain import to_plain

__all__ = ["check_destination", "sha256_of", "write_converted"]


def check_destination(path: str, overwrite: bool = False) -> None:
    """Refuse a destination before long work.

    Raises:
        ValueError: if its suffix is not that of what is written, or it is a folder.
        FileExistsError: if it exists and may not be overwritten.
    """
    if Path(path).suffix != ".pth":
        raise ValueError(f"{path}: converted weights are written as .pth; name the file so.")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a file.")
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it.")


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_converted(
    path: str,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    backbone_only: bool = False,
    overwrite: bool = False,
) -> None:
    """Write weights that ``MODEL.WEIGHTS`` accepts, here and in detectron2.

    Args:
        path: a ``.pth``; its folder is made if need be.
        weights: by name.
        metadata: what ``read_metadata`` gives; ``family`` and ``sha256`` at least.
        backbone_only: let detectron2 match the names by their endings.
        overwrite: whether an existing file may be replaced.

    Raises:
        ValueError, FileExistsError: see ``check_destination``.
    """
    check_destination(path, overwrite)
    content = {
        "model": {name: _compact(tensor) for name, tensor in weights.items()},
        "__author__": f"{metadata['family']}, converted by instseg_ext {__version__}",
        "instseg_ext": {"version": __version__, **metadata},
    }
    if backbone_only:
        content["matching_heuristics"] = True
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(to_plain(content), file)


def _compact(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in a storage of its own: a view would drag all of its into the file."""
    tensor = tensor.contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
