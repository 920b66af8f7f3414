"""Config keys of DeepMask and SharpMask."""

from __future__ import annotations

import math

from detectron2.config import CfgNode as CN  # noqa: N817

from instseg_ext.config import check_choice, check_range
from instseg_ext.layers.symmetric_pad import PAD_MODES

__all__ = [
    "TRUNK_STRIDE",
    "add_deepmask_config",
    "canonical_size",
    "check_deepmask_config",
    "check_sharpmask_config",
    "patch_size",
]

# Pixels between two windows, and those of the image that one cell of the trunk's map covers.
TRUNK_STRIDE = 16
HEADS = ("shared", "separate")
_POSITIVE = ("OUT_SIZE", "GT_SIZE", "REDUCE_DIM", "CODE_DIM", "SCORE_DIM")
_RANGES = {
    "CANONICAL_FRAC": "(0, 1]",
    "SHIFT": "[0, inf)",
    "SCALE": "[0, inf)",
    "MIN_AREA": "[0, inf)",
    "MIN_SIDE": "[0, inf)",
    "IMAGE_CACHE_MB": "[0, inf)",
    "SCORE_FREQ": "[0, 1]",
    "NEG_SHIFT": "[0, inf)",
    "NEG_OCTAVES": "[0, inf)",
    "SCORE_DROPOUT": "[0, 1)",
    "MASK_LOSS_WEIGHT": "[0, inf)",
    "SCORE_LOSS_WEIGHT": "[0, inf)",
    "MASK_THRESH": "(0, 1)",
    "NMS_THRESH": "(0, 1]",
}


def add_deepmask_config(cfg: CN) -> None:
    """Add ``MODEL.DEEPMASK`` and ``MODEL.SHARPMASK`` with the settings of the published models.

    Keys of detectron2 that hold too: ``MODEL.BACKBONE`` and ``MODEL.RESNETS`` for the trunk;
    ``SOLVER.IMS_PER_BATCH`` counts patches; ``TEST.DETECTIONS_PER_IMAGE`` of an image's windows,
    those with the highest scores, become proposals; with ``DATALOADER.FILTER_EMPTY_ANNOTATIONS``
    False, images without objects give negative patches, too.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.DEEPMASK = CN()

    # ---- window and patch, in pixels of the scaled image ----
    # Side of the window in which an object is sought (iSz); a multiple of 16.
    _C.MODEL.DEEPMASK.INPUT_SIZE = 160
    # Pixels around the window that the trunk sees too, on each side; a multiple of 16. The patch
    # that the trunk is trained on has the side INPUT_SIZE + 2 * CONTEXT.
    _C.MODEL.DEEPMASK.CONTEXT = 16
    # Longest side of an object of canonical size, as a fraction of INPUT_SIZE, rounded up to whole
    # pixels: 92 of 160.
    _C.MODEL.DEEPMASK.CANONICAL_FRAC = 0.5714286
    # Side of DeepMask's predicted masks. They cover the window.
    _C.MODEL.DEEPMASK.OUT_SIZE = 56
    # Side of the masks that training compares with; predictions are enlarged to it. SharpMask needs
    # INPUT_SIZE, the size that it predicts.
    _C.MODEL.DEEPMASK.GT_SIZE = 112

    # ---- sampling of patches ----
    # Patches for masks: the object's centre lies up to this many pixels, of a patch in which the
    # object has canonical size, from the patch's, in x and in y.
    _C.MODEL.DEEPMASK.SHIFT = 16.0
    # Likewise for its size: up to this many octaves from canonical, in both directions.
    _C.MODEL.DEEPMASK.SCALE = 0.25
    # Share of patches that train the score, half of them positive; the others train masks.
    # 0 for SharpMask, whose score is trained already.
    _C.MODEL.DEEPMASK.SCORE_FREQ = 0.5
    # Negative patches: each object is further away than this many pixels of the patch ...
    _C.MODEL.DEEPMASK.NEG_SHIFT = 32.0
    # ... or at least this many octaves from canonical size.
    _C.MODEL.DEEPMASK.NEG_OCTAVES = 1.0
    # Objects of a smaller area in the image file, in pixels, give no patches ...
    _C.MODEL.DEEPMASK.MIN_AREA = 100.0
    # ... nor do those whose box is shorter than this in x or in y.
    _C.MODEL.DEEPMASK.MIN_SIDE = 5.0
    # Decoded images, in MiB, that each loading process keeps; 0: none.
    _C.MODEL.DEEPMASK.IMAGE_CACHE_MB = 256
    # True: sample with the defects of the authors' code, for comparisons.
    _C.MODEL.DEEPMASK.LEGACY_SAMPLER = False
    # True: each step trains one of the two heads, drawn from the iteration's number, as in the
    # authors' code. False: each step trains both, with SCORE_FREQ of its patches for the score.
    _C.MODEL.DEEPMASK.ALTERNATE = False

    # ---- network ----
    # What the trunk and the refinement see beyond borders: "symmetric", a mirror image that repeats
    # the edge sample, as published; "reflect", one that does not in 3x3 convolutions, as in a
    # third-party PyTorch version; "zeros".
    _C.MODEL.DEEPMASK.PAD_MODE = "symmetric"
    # "shared": both heads see one vector of CODE_DIM per window. "separate": each has its own
    # layers on the trunk, as in the first paper.
    _C.MODEL.DEEPMASK.HEADS = "shared"
    # Channels to which a 1x1 convolution brings the trunk's map.
    _C.MODEL.DEEPMASK.REDUCE_DIM = 128
    # Length of the vector that describes a window.
    _C.MODEL.DEEPMASK.CODE_DIM = 512
    # Outputs of the score head's hidden layer.
    _C.MODEL.DEEPMASK.SCORE_DIM = 1024
    # Share of the score head's inputs that training drops, before both of its layers.
    _C.MODEL.DEEPMASK.SCORE_DROPOUT = 0.5

    # ---- losses ----
    # Of the mean over the mask patches; 32, the number of patches of a published batch, makes it
    # their sum.
    _C.MODEL.DEEPMASK.MASK_LOSS_WEIGHT = 32.0
    # Of the mean over the score patches.
    _C.MODEL.DEEPMASK.SCORE_LOSS_WEIGHT = 1.0

    # ---- inference ----
    # Sizes at which windows slide over the image, as factors of its size: 2^-2.5 to 2^0.5.
    _C.MODEL.DEEPMASK.TEST_SCALES = [0.1767767, 0.25, 0.3535534, 0.5, 0.7071068, 1.0, 1.4142136]
    # A pixel belongs to a mask when its probability is strictly higher.
    _C.MODEL.DEEPMASK.MASK_THRESH = 0.2
    # IoU of boxes above which the lower of two proposals is dropped; 1.0 keeps all, as published.
    _C.MODEL.DEEPMASK.NMS_THRESH = 1.0
    # True: take mask and place of a window from the cell up and right of the scored one, as the
    # authors' code does, for comparisons.
    _C.MODEL.DEEPMASK.LEGACY_INDEXING = False
    # True: windows are moved to whole pixels and resized with corners aligned, as in the authors'
    # code. False: windows stay where they are, pixels have centres.
    _C.MODEL.DEEPMASK.LEGACY_PASTE = False

    _C.MODEL.SHARPMASK = CN()
    # Channels of the coarsest mask encoding and of the coarsest skip connection (km and ks in the
    # paper, which are summed and therefore equal); halved by each of the four refinements. A
    # multiple of 16.
    _C.MODEL.SHARPMASK.DIM = 32
    # Windows that are refined at a time; only memory and speed depend on it.
    _C.MODEL.SHARPMASK.CHUNK = 128
    # True: train the refinement alone, on a trained DeepMask. False: train everything together.
    _C.MODEL.SHARPMASK.FREEZE_TRUNK = True
    # True: predict with DeepMask's mask head, which a SharpMask carries too.
    _C.MODEL.SHARPMASK.USE_DEEPMASK_HEAD = False


def patch_size(cfg: CN) -> int:
    """Return the side of the square that the trunk is trained on, in pixels."""
    return cfg.MODEL.DEEPMASK.INPUT_SIZE + 2 * cfg.MODEL.DEEPMASK.CONTEXT


def canonical_size(cfg: CN) -> int:
    """Return the longest side, in pixels of a patch, of an object of canonical size."""
    size = cfg.MODEL.DEEPMASK.INPUT_SIZE * cfg.MODEL.DEEPMASK.CANONICAL_FRAC
    # 224 * 0.5714286 is 128.
    return math.ceil(size - 1e-3)


def check_deepmask_config(cfg: CN) -> None:
    """Make sure that the values of ``MODEL.DEEPMASK`` are allowed.

    Raises:
        ValueError: naming the first key whose value is not.
    """
    node = cfg.MODEL.DEEPMASK
    for key, low in (("INPUT_SIZE", TRUNK_STRIDE), ("CONTEXT", 0)):
        if node[key] < low or node[key] % TRUNK_STRIDE:
            raise ValueError(
                f"MODEL.DEEPMASK.{key} must be a multiple of {TRUNK_STRIDE}, not below {low}, but "
                f"is {node[key]}."
            )
    for key in _POSITIVE:
        if node[key] < 1:
            raise ValueError(f"MODEL.DEEPMASK.{key} must be positive, not {node[key]}.")
    for key, allowed in _RANGES.items():
        check_range(f"MODEL.DEEPMASK.{key}", node[key], allowed)
    check_choice("MODEL.DEEPMASK.PAD_MODE", node.PAD_MODE, PAD_MODES)
    check_choice("MODEL.DEEPMASK.HEADS", node.HEADS, HEADS)
    if not node.TEST_SCALES or min(node.TEST_SCALES) <= 0:
        raise ValueError(
            "MODEL.DEEPMASK.TEST_SCALES must be a list of positive numbers, not "
            f"{list(node.TEST_SCALES)}."
        )
    if node.LEGACY_PASTE and cfg.INPUT.MIN_SIZE_TEST:
        raise ValueError(
            "MODEL.DEEPMASK.LEGACY_PASTE knows the original size of images alone: set "
            f"INPUT.MIN_SIZE_TEST to 0, not {cfg.INPUT.MIN_SIZE_TEST}."
        )


def check_sharpmask_config(cfg: CN) -> None:
    """Make sure that a SharpMask's keys are allowed, those of ``MODEL.DEEPMASK`` among them.

    Raises:
        ValueError: naming the first key whose value is not.
    """
    check_deepmask_config(cfg)
    node, deepmask = cfg.MODEL.SHARPMASK, cfg.MODEL.DEEPMASK
    if node.DIM < 16 or node.DIM % 16:
        raise ValueError(
            f"MODEL.SHARPMASK.DIM must be a multiple of 16, not {node.DIM}: it is halved four "
            "times."
        )
    if node.CHUNK < 1:
        raise ValueError(f"MODEL.SHARPMASK.CHUNK must be positive, not {node.CHUNK}.")
    if deepmask.GT_SIZE != deepmask.INPUT_SIZE:
        raise ValueError(
            f"MODEL.DEEPMASK.GT_SIZE must be INPUT_SIZE {deepmask.INPUT_SIZE} for SharpMask, which "
            f"predicts masks of that size, not {deepmask.GT_SIZE}."
        )
    if node.FREEZE_TRUNK and deepmask.SCORE_FREQ:
        raise ValueError(
            "MODEL.DEEPMASK.SCORE_FREQ must be 0.0 with MODEL.SHARPMASK.FREEZE_TRUNK True, which "
            f"keeps the score as it is, not {deepmask.SCORE_FREQ}."
        )
    if not node.FREEZE_TRUNK and not deepmask.SCORE_FREQ:
        raise ValueError(
            "MODEL.DEEPMASK.SCORE_FREQ must be above 0 with MODEL.SHARPMASK.FREEZE_TRUNK False, so "
            "that the score follows the trunk."
        )
