"""Config keys of deep metric learning."""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817
from detectron2.layers import get_norm

from instseg_ext.config import check_choice, check_range

__all__ = ["add_metric_config", "check_settings"]


def add_metric_config(cfg: CN) -> None:
    """Add ``MODEL.DEEP_METRIC`` with what is known of the paper's settings.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.DEEP_METRIC = CN()
    # Foreground classes, without background.
    _C.MODEL.DEEP_METRIC.NUM_CLASSES = 80

    # ---- features ----
    # Maps of the backbone that both heads read, brought to the size of the first one and added. The
    # cells of the first one are the pixels of the method.
    _C.MODEL.DEEP_METRIC.IN_FEATURES = ["res5"]
    # The backbone sees the image at each of these scales; the maps are brought to the size of that
    # of scale 1.0, which must be among them, and concatenated. The paper has [0.25, 0.5, 1.0, 2.0];
    # scale 2.0 costs four times as much as scale 1.0.
    _C.MODEL.DEEP_METRIC.INPUT_SCALES = [0.5, 1.0]
    # Learning rate of the backbone, in units of that of the heads.
    _C.MODEL.DEEP_METRIC.BACKBONE_LR_MULT = 1.0
    # Channels to which a 1x1 convolution, the same for all scales, reduces each map before they are
    # concatenated; 0 = none.
    _C.MODEL.DEEP_METRIC.REDUCE_DIM = 256

    # ---- heads ----
    # 3x3 convolutions of each head before its 1x1 predictor.
    _C.MODEL.DEEP_METRIC.HEAD_CONVS = 0
    # Their channels.
    _C.MODEL.DEEP_METRIC.HEAD_DIM = 256
    # Their normalisation: GN (32 groups), BN, SyncBN, FrozenBN, or "" for none.
    _C.MODEL.DEEP_METRIC.HEAD_NORM = "GN"
    # Numbers of a cell's embedding (D in the paper).
    _C.MODEL.DEEP_METRIC.EMBED_DIM = 64
    # The predictor of embeddings also sees where a cell is, x and y in units of this many pixels of
    # the network input; 0.0 = it does not, as in the paper. Without it only context tells objects
    # that look alike from each other.
    _C.MODEL.DEEP_METRIC.COORD_UNIT = 0.0
    # Similarities from which on cells belong to the mask of a seed (tau); a class is predicted for
    # each of them.
    _C.MODEL.DEEP_METRIC.TAUS = [0.25, 0.5, 0.75, 0.9]

    # ---- losses ----
    # Cells drawn from each object, and from the background, in each image (K). Objects with fewer
    # cells repeat them.
    _C.MODEL.DEEP_METRIC.PIXELS_PER_INSTANCE = 10
    # Cells drawn from the background; 0 = as many as from an object.
    _C.MODEL.DEEP_METRIC.PIXELS_OF_BACKGROUND = 0
    # What the background is to the loss of the embeddings. instance: one more object.
    # negative_only: its cells are only kept away from those of objects. none: not in the loss.
    _C.MODEL.DEEP_METRIC.BACKGROUND = "instance"
    # Weight of a pair of cells, for objects of n and m cells. uniform: equal for each pair of
    # objects, as the cells are drawn evenly. product: 1 / (n m). sum: 1 / (n + m). Weights of an
    # image add up to 1.
    _C.MODEL.DEEP_METRIC.PAIR_WEIGHT = "uniform"
    # True: the loss of the embeddings is divided once more by the number of cells drawn, as the
    # paper's formula has it.
    _C.MODEL.DEEP_METRIC.LEGACY_DIV_S = False
    # Weight of the class loss (lambda) at the end of its ramp.
    _C.MODEL.DEEP_METRIC.LAMBDA = 0.2
    # The weight is 0 up to this part of SOLVER.MAX_ITER and then rises evenly ...
    _C.MODEL.DEEP_METRIC.LAMBDA_START = 0.1
    # ... until this part of it.
    _C.MODEL.DEEP_METRIC.LAMBDA_END = 0.3
    # The mask of a cell has the class of an object that it overlaps by this IoU, in cells, else
    # that of the background.
    _C.MODEL.DEEP_METRIC.CLS_IOU = 0.5

    # ---- seeds ----
    # How the next seed is chosen. log: largest log S + ALPHA log D, where S is the best class
    # probability of a cell and D its squared distance to the nearest seed. sim: largest
    # S - SIM_WEIGHT * similarity to the nearest seed.
    _C.MODEL.DEEP_METRIC.SEED_RULE = "log"
    # Weight of diversity (alpha); the paper tries 0.1 to 0.6.
    _C.MODEL.DEEP_METRIC.ALPHA = 0.3
    # The same for SEED_RULE sim.
    _C.MODEL.DEEP_METRIC.SIM_WEIGHT = 0.7
    # Most seeds of an image.
    _C.MODEL.DEEP_METRIC.NUM_SEEDS = 100
    # Lowest S of a seed.
    _C.MODEL.DEEP_METRIC.SEED_MIN = 0.05

    # ---- masks ----
    # Masks of fewer cells are dropped.
    _C.MODEL.DEEP_METRIC.MIN_CELLS = 16
    # Which parts of a mask stay. all: as in the paper. largest: the largest connected one. seed:
    # the one that holds the seed.
    _C.MODEL.DEEP_METRIC.PARTS = "all"
    # A mask is dropped whose IoU, in cells, with a better one of its class is higher; 1.0 = off, as
    # in the paper.
    _C.MODEL.DEEP_METRIC.MASK_NMS = 0.5
    # True: each mask that is left is averaged, by scores, with all masks of its class, dropped ones
    # too, that overlap it by MERGE_IOU or more.
    _C.MODEL.DEEP_METRIC.MASK_MERGE = False
    # See MASK_MERGE.
    _C.MODEL.DEEP_METRIC.MERGE_IOU = 0.4
    # Averages above this belong to the merged mask.
    _C.MODEL.DEEP_METRIC.MERGE_THRESH = 0.2
    # How masks get the size of the image. similarity: similarities are resized, then compared with
    # tau. centred: the same, but first stretched so that tau is in the middle: the border between
    # cells of similarity 1 and 0 is then halfway, whatever tau is. nearest: masks in cells are
    # resized.
    _C.MODEL.DEEP_METRIC.UPSAMPLE = "centred"


def check_settings(node: CN) -> None:
    """Refuse settings of ``MODEL.DEEP_METRIC`` that no model can have.

    Raises:
        ValueError: naming the key.
    """
    prefix = "MODEL.DEEP_METRIC."
    choices = {
        "BACKGROUND": ("instance", "negative_only", "none"),
        "PAIR_WEIGHT": ("uniform", "product", "sum"),
        "SEED_RULE": ("log", "sim"),
        "PARTS": ("all", "largest", "seed"),
        "UPSAMPLE": ("centred", "similarity", "nearest"),
    }
    for key, allowed in choices.items():
        check_choice(prefix + key, node[key], allowed)
    ranges = {
        "NUM_CLASSES": "[1, inf)",
        "BACKBONE_LR_MULT": "[0, inf)",
        "REDUCE_DIM": "[0, inf)",
        "HEAD_CONVS": "[0, inf)",
        "HEAD_DIM": "[1, inf)",
        "EMBED_DIM": "[1, inf)",
        "COORD_UNIT": "[0, inf)",
        "PIXELS_PER_INSTANCE": "[1, inf)",
        "PIXELS_OF_BACKGROUND": "[0, inf)",
        "LAMBDA": "[0, inf)",
        "LAMBDA_START": "[0, 1]",
        "LAMBDA_END": "[0, 1]",
        "CLS_IOU": "[0.5, 1]",
        "ALPHA": "[0, inf)",
        "SIM_WEIGHT": "[0, inf)",
        "NUM_SEEDS": "[1, inf)",
        "SEED_MIN": "[0, 1)",
        "MIN_CELLS": "[0, inf)",
        "MASK_NMS": "[0, 1]",
        "MERGE_IOU": "[0, 1]",
        "MERGE_THRESH": "(0, 1)",
    }
    for key, allowed in ranges.items():
        check_range(prefix + key, node[key], allowed)
    if node.LAMBDA_END < node.LAMBDA_START:
        raise ValueError(
            f"{prefix}LAMBDA_END {node.LAMBDA_END} must not be below {prefix}LAMBDA_START "
            f"{node.LAMBDA_START}."
        )
    if not node.TAUS or min(node.TAUS) <= 0 or max(node.TAUS) >= 1:
        raise ValueError(
            f"{prefix}TAUS must be similarities between 0 and 1, both excluded, not "
            f"{list(node.TAUS)}."
        )
    try:
        get_norm(node.HEAD_NORM, node.HEAD_DIM)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{prefix}HEAD_NORM {node.HEAD_NORM!r} cannot be used with {prefix}HEAD_DIM "
            f"{node.HEAD_DIM}: {error}."
        ) from error
