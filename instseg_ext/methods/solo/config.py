"""The ``MODEL.SOLO`` node, shared by SOLO and SOLOv2."""

from detectron2.config import CfgNode as CN  # noqa: N817

__all__ = ["add_solo_config"]


def add_solo_config(cfg: CN) -> None:
    """Define ``MODEL.SOLO`` with the settings of the published R-50 SOLOv2.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.SOLO = CN()

    # Foreground classes; there is no background channel. Follows the training set (train_net).
    _C.MODEL.SOLO.NUM_CLASSES = 80

    # ---- levels: five lists of equal length, finest level first ----
    # Backbone features that carry a grid.
    _C.MODEL.SOLO.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    # Stride in input pixels to which each feature is resized before the grid is laid (P2 is halved,
    # P6 is brought to the size of P5). A mask must cover more than this many mask-map pixels.
    _C.MODEL.SOLO.STRIDES = [8, 8, 16, 32, 32]
    # Cells per side of each level's grid (S).
    _C.MODEL.SOLO.NUM_GRIDS = [40, 36, 24, 16, 12]
    # Lowest and highest sqrt(box width * box height), in input pixels, of each level's objects,
    # both ends included. Ranges overlap, so an object usually belongs to two levels.
    _C.MODEL.SOLO.SCALE_RANGES = [
        [1.0, 96.0],
        [48.0, 192.0],
        [96.0, 384.0],
        [192.0, 768.0],
        [384.0, 2048.0],
    ]
    # Side of an object's centre region as a fraction of its box side (epsilon in the paper): cells
    # under that region, at most 3x3, are positive.
    _C.MODEL.SOLO.CENTER_RADIUS = 0.2

    # ---- head ----
    # How META_ARCHITECTURE "SOLO" makes the mask of a cell: vanilla (a channel per cell), decoupled
    # (the product of a column's and a row's channel, a tower for each) or decoupled_light (one
    # tower for both). SOLOv2 has a head of its own.
    _C.MODEL.SOLO.HEAD = "vanilla"
    # 3x3 convolutions of each tower.
    _C.MODEL.SOLO.NUM_CONVS = 4
    # Width of the towers.
    _C.MODEL.SOLO.CONV_DIM = 512
    # Channels of the mask features and of the kernel that each cell predicts (E); SOLOv2 only.
    _C.MODEL.SOLO.KERNEL_DIM = 256
    # Normalisation of all head convolutions: GN (32 groups, so widths are multiples of 32), BN or
    # SyncBN. All published models use GN.
    _C.MODEL.SOLO.NORM = "GN"
    # Category score of every cell before training (pi).
    _C.MODEL.SOLO.PRIOR_PROB = 0.01

    # ---- mask features (SOLOv2) ----
    _C.MODEL.SOLO.MASK_FEATURES = CN()
    # Backbone features that are summed at the resolution of the first; coordinates join the last.
    _C.MODEL.SOLO.MASK_FEATURES.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    # Width of the convolutions before the sum.
    _C.MODEL.SOLO.MASK_FEATURES.CONV_DIM = 128

    # ---- deformable convolution in the head ----
    _C.MODEL.SOLO.DEFORM = CN()
    # Which convolutions of the towers are deformable: none, last or all.
    _C.MODEL.SOLO.DEFORM.TOWERS = "none"
    # True: all convolutions of the mask features, the final 1x1 included.
    _C.MODEL.SOLO.DEFORM.MASK_FEATURES = False
    # True: v2 with a modulation mask; False: v1.
    _C.MODEL.SOLO.DEFORM.MODULATED = False

    # ---- losses ----
    # Weight of the category loss.
    _C.MODEL.SOLO.LOSS_WEIGHT_CLS = 1.0
    # Weight of the dice loss (lambda).
    _C.MODEL.SOLO.LOSS_WEIGHT_MASK = 3.0
    # Focal loss: weight of the positive term (alpha), 1 - alpha for the negative one.
    _C.MODEL.SOLO.FOCAL_ALPHA = 0.25
    # Focal loss: exponent (gamma).
    _C.MODEL.SOLO.FOCAL_GAMMA = 2.0

    # ---- inference ----
    # A cell is a candidate of a class when its category score is strictly higher.
    _C.MODEL.SOLO.SCORE_THRESH = 0.1
    # A pixel belongs to a mask when its probability is strictly higher.
    _C.MODEL.SOLO.MASK_THRESH = 0.5
    # Best candidates that enter Matrix NMS.
    _C.MODEL.SOLO.NMS_PRE = 500
    # Decay of Matrix NMS: gaussian or linear.
    _C.MODEL.SOLO.NMS_KERNEL = "gaussian"
    # Multiplies the squared IoU in the gaussian decay (sigma).
    _C.MODEL.SOLO.NMS_SIGMA = 2.0
    # Decayed scores below this are dropped. TEST.DETECTIONS_PER_IMAGE of the others are kept.
    _C.MODEL.SOLO.UPDATE_THRESH = 0.05
