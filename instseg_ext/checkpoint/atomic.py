"""Files that are either old or new, never half-written.

A file is written beside its destination, flushed to the disk and renamed over it. A process killed
in between leaves a file with the suffix below, which the next save removes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["atomic_write", "remove_leftovers"]

_SUFFIX = ".part"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that appears under ``path`` only when complete.

    On an exception inside the block the destination is left as it was and the partial file is
    removed.

    Args:
        path: destination on a local file system; its folder must exist.

    Yields:
        The open file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{_SUFFIX}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[str]:
    """Delete the partial files that a killed process left in ``folder``.

    Returns:
        The names of the deleted files. Only names made by ``atomic_write`` are touched.
    """
    removed = []
    for partial in Path(folder).glob(f".*{_SUFFIX}"):
        owner = partial.name.removesuffix(_SUFFIX).rpartition(".")[2]
        if owner.isdecimal() and partial.is_file():
            partial.unlink(missing_ok=True)
            removed.append(partial.name)
    return sorted(removed)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some file systems cannot, and need not be told."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
