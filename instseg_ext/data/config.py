"""Config keys of the data pipeline."""

from __future__ import annotations

from detectron2.config import CfgNode

__all__ = ["add_data_config"]


def add_data_config(cfg: CfgNode) -> None:
    """Add ``INSTSEG.AUGMENTATIONS``.

    Resizing, cropping and the horizontal flip are detectron2's own keys (``INPUT.MIN_SIZE_TRAIN``,
    ``INPUT.CROP``, ``INPUT.RANDOM_FLIP``).

    Args:
        cfg: with the node ``INSTSEG``; changed in place. Keys that exist keep their values.
    """
    _C = cfg.INSTSEG
    if "AUGMENTATIONS" in _C:
        return
    _C.AUGMENTATIONS = CfgNode()
    # Factor ranges [low, high], drawn uniformly per image; 1 leaves the image alone, [] = off.
    _C.AUGMENTATIONS.BRIGHTNESS = []
    _C.AUGMENTATIONS.CONTRAST = []
    _C.AUGMENTATIONS.SATURATION = []
    # Rotate by 0, 90, 180 or 270 degrees, each with probability 1/4.
    _C.AUGMENTATIONS.ROTATE90 = False
    # Flip upside down with probability 1/2, beside the flip of INPUT.RANDOM_FLIP.
    _C.AUGMENTATIONS.VERTICAL_FLIP = False
