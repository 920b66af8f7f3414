"""Config keys of the data pipeline."""

from __future__ import annotations

from detectron2.config import CfgNode

__all__ = ["add_data_config"]


def add_data_config(cfg: CfgNode) -> None:
    """Add the data keys to ``INSTSEG``; keys that exist already keep their values.

    Resizing, cropping and the horizontal flip are detectron2's own keys (``INPUT.MIN_SIZE_TRAIN``,
    ``INPUT.CROP``, ``INPUT.RANDOM_FLIP``).

    Args:
        cfg: changed in place.
    """
    if "INSTSEG" not in cfg:
        cfg.INSTSEG = CfgNode()
    _C = cfg.INSTSEG
    if "DATASETS" not in _C:
        # Data sets declared by the config: a list of {"NAME": ..., "JSON": ..., "IMAGES": ...}.
        _C.DATASETS = []
    if "CLASS_NAMES" not in _C:
        # Names of the training classes in contiguous order.
        _C.CLASS_NAMES = []
    if "STRETCH" not in _C:
        # (height, width) of the resize without aspect ratio; [0, 0] = off. Needs INPUT.MIN_SIZE_*
        # 0.
        _C.STRETCH = [0, 0]
    if "ACCUMULATE" not in _C:
        # Micro-batches per optimiser step.
        _C.ACCUMULATE = 1
    if "AUGMENTATIONS" not in _C:
        _C.AUGMENTATIONS = CfgNode()
        # Factor ranges [low, high], drawn uniformly per image; 1 leaves the image alone, [] = off.
        _C.AUGMENTATIONS.BRIGHTNESS = []
        _C.AUGMENTATIONS.CONTRAST = []
        _C.AUGMENTATIONS.SATURATION = []
        # Rotate by 0, 90, 180 or 270 degrees, each with probability 1/4.
        _C.AUGMENTATIONS.ROTATE90 = False
        # Flip upside down with probability 1/2, beside the flip of INPUT.RANDOM_FLIP.
        _C.AUGMENTATIONS.VERTICAL_FLIP = False
