"""Instance segmentation for detectron2: every method a meta-architecture or ROI head of its own.

Importing this package is cheap and has no side effects; detectron2 is imported when a config is
asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detectron2.config import CfgNode

__version__ = "0.1.0"

__all__ = ["__version__", "add_instseg_config", "get_config"]


def get_config(name_or_path: str, opts: Sequence[object] = ()) -> CfgNode:
    """Return a complete config: defaults, a YAML file, typed overrides, a concrete device.

    Args:
        name_or_path: a file, or a name under ``projects/*/configs`` such as
            ``"SOLO/solov2_R_50_FPN_1x"``.
        opts: alternating keys and values, ``["MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", 0.01]``.

    Returns:
        A config that is not frozen. Data sets it declares (``INSTSEG.DATASETS``) are registered.

    Raises:
        FileNotFoundError: if no such file or name exists; the message lists the nearest names.
        KeyError: if a key is unknown; the message lists the nearest keys.
        ValueError: if a value has the wrong type or is not allowed.
        ImportError: if detectron2 cannot be used here; the message says how to mend it.
    """
    from instseg_ext import zoo

    return zoo.get_config(name_or_path, opts)


def add_instseg_config(cfg: CfgNode) -> None:
    """Add the keys of this package to ``cfg`` and register all its models and bundled data sets.

    Keys that exist already keep their values, so calling it twice is harmless.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg``; changed in place.

    Raises:
        ValueError: if ``cfg`` is frozen.
        ImportError: if detectron2 cannot be used here; the message says how to mend it.
    """
    from instseg_ext import zoo

    zoo.add_instseg_config(cfg)
