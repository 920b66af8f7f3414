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

    # Colour changes, canvas and crop of single-shot detectors, part of YOLACT's recipe. Images
    # become float32 and are not clipped to [0, 255]. The flip is INPUT.RANDOM_FLIP; INPUT.CROP
    # would crop once more.
    _C.AUGMENTATIONS.SSD = CfgNode()
    _C.AUGMENTATIONS.SSD.ENABLED = False
    # Each with probability 1/2: brightness +-32 grey levels, contrast and saturation times 0.5 to
    # 1.5, hue +-18 degrees. Needs INPUT.FORMAT RGB or BGR.
    _C.AUGMENTATIONS.SSD.PHOTOMETRIC = True
    # With probability 1/2 the image is laid on a canvas of 1 to this many times its width and
    # height, which makes objects smaller; 1.0 = off. The largest canvas takes
    # 12 bytes * EXPAND_RATIO ** 2 per pixel of the image in each loading process.
    _C.AUGMENTATIONS.SSD.EXPAND_RATIO = 4.0
    # Value of the canvas for each channel, in the order of INPUT.FORMAT; [] = MODEL.PIXEL_MEAN.
    _C.AUGMENTATIONS.SSD.EXPAND_FILL = []
    # With probability 5/6 a window of 0.3 to 1 of each side, height / width 0.5 to 2, that holds
    # the centre of at least one object that is no crowd. Objects centred outside are dropped.
    _C.AUGMENTATIONS.SSD.CROP = True
