"""Where the files that ship with the package are: ``configs/``, ``projects/``, ``datasets/``."""

from __future__ import annotations

from pathlib import Path

__all__ = ["root"]


def root() -> Path:
    """Find the folder that holds ``configs/``, ``projects/`` and ``datasets/``.

    The three lie side by side in the checkout and in the installed package, so that a relative
    ``_BASE_`` of a config file resolves in both.

    Returns:
        The checkout when the package lies in one (the folder above it has ``projects/`` and
        ``pyproject.toml``), else ``instseg_ext/shipped``.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if (checkout / "projects").is_dir() and (checkout / "pyproject.toml").is_file():
        return checkout
    return package / "shipped"
