"""Where files that are made on the spot are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return ``$INSTSEG_CACHE``, by default a folder of this user in the temporary folder.

    Nothing is made or looked for on the disk.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    default = Path(tempfile.gettempdir()) / f"instseg_ext-{user}"
    return Path(os.environ.get("INSTSEG_CACHE") or default)
