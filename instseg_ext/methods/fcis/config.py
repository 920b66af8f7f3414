"""Config keys of FCIS."""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817

from instseg_ext.config import check_range

__all__ = ["add_fcis_config", "check_fcis_config"]

_RANGES = {
    "HEAD_DIM": "[1, inf)",
    "HEAD_LR_MULT": "[0, inf)",
    "FG_FRACTION": "[0, 1]",
    "MIN_DROP_SIZE": "[0, inf)",
    "BINARY_THRESH": "(0, 1)",
}


def add_fcis_config(cfg: CN) -> None:
    """Add ``MODEL.FCIS`` with the settings of the published model for COCO.

    Other parts are detectron2's keys: classes are ``MODEL.ROI_HEADS.NUM_CLASSES``, regions with an
    overlap of ``MODEL.ROI_HEADS.IOU_THRESHOLDS`` are foreground, proposals come from ``MODEL.RPN``
    (``MODEL.PROPOSAL_GENERATOR.MIN_SIZE`` drops small ones), and ``TEST.DETECTIONS_PER_IMAGE``
    limits the results. ``MODEL.RESNETS.RES5_DILATION`` 2 keeps res5 at stride 16, 4 keeps res4 and
    res5 at stride 8.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.FCIS = CN()
    # Position-sensitive parts of a region per axis (k in the paper).
    _C.MODEL.FCIS.GROUP_SIZE = 7
    # Side of the pooled maps and of the masks; a multiple of GROUP_SIZE.
    _C.MODEL.FCIS.POOLED_SIZE = 21
    # Channels of the 1x1 convolution before the score maps.
    _C.MODEL.FCIS.HEAD_DIM = 1024
    # Its learning rate, in units of the other layers'.
    _C.MODEL.FCIS.HEAD_LR_MULT = 3.0
    # Weights of the class, mask and box losses.
    _C.MODEL.FCIS.LOSS_WEIGHT = [1.0, 10.0, 1.0]
    # True: of all regions those with the largest loss are trained. False: random ones.
    _C.MODEL.FCIS.OHEM = True
    # How many per image; losses are divided by this number.
    _C.MODEL.FCIS.OHEM_ROIS = 128
    # The same without OHEM.
    _C.MODEL.FCIS.NUM_ROIS = 128
    # Without OHEM: the largest share of foreground among them.
    _C.MODEL.FCIS.FG_FRACTION = 0.25
    # Regions whose best overlap is in [first, second) are background.
    _C.MODEL.FCIS.BG_IOU = [0.0, 0.5]
    # Box deltas are learned in units of these (dx, dy, dw, dh).
    _C.MODEL.FCIS.BBOX_STDS = [0.2, 0.2, 0.5, 0.5]
    # Rounds of inference: every round after the first pools the refined boxes again, and the
    # regions of all rounds vote.
    _C.MODEL.FCIS.ITER = 2
    # Regions with a shorter side, in pixels of the network input, are dropped before the vote.
    _C.MODEL.FCIS.MIN_DROP_SIZE = 2.0
    # Where mask targets, masks that vote, and results begin (inclusive).
    _C.MODEL.FCIS.BINARY_THRESH = 0.4
    # True: masks of overlapping regions are averaged. False: each detection has its own.
    _C.MODEL.FCIS.VOTE = True
    # Overlap above which a class's detections suppress each other.
    _C.MODEL.FCIS.VOTE_NMS = 0.3
    # Overlap from which on a region votes for a detection's mask.
    _C.MODEL.FCIS.VOTE_IOU = 0.5
    # Lowest score of a detection.
    _C.MODEL.FCIS.VOTE_MIN_SCORE = 0.001
    # True: voted masks pass through POOLED_SIZE cells of their tight box, as in the authors'
    # evaluation.
    _C.MODEL.FCIS.VOTE_REENCODE = False
    # True: proposals come from whole cells of the image only, as published: the last row and column
    # of scores are left out where the stride does not divide the image.
    _C.MODEL.FCIS.CROP_SCORE_GRID = True
    # True: boxes are brought to the original image with their last pixels, as in the authors' code,
    # which moves their right and lower sides by less than a pixel.
    _C.MODEL.FCIS.LEGACY_BOXES = False
    # True: max pooling of the stem without padding, as in the published weights.
    _C.MODEL.FCIS.LEGACY_STEM = True
    # True, with MODEL.RESNETS.NORM FrozenBN: scale and shift of the norms are trained, their
    # statistics are not. FREEZE_AT holds for them, too.
    _C.MODEL.FCIS.TRAIN_BN_AFFINE = True


def check_fcis_config(cfg: CN) -> None:
    """Make sure that the numbers of ``MODEL.FCIS`` are in their ranges.

    Raises:
        ValueError: naming the first key whose value is not.
    """
    for key, allowed in _RANGES.items():
        check_range(f"MODEL.FCIS.{key}", cfg.MODEL.FCIS[key], allowed)
