"""Config keys of MultiPathNet."""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817

from instseg_ext.config import check_choice, check_range

__all__ = ["add_multipathnet_config", "check_multipathnet_config"]

TOWERS = ("fc", "res5")
SKIP_NORMS = ("l2", "constant", "none")
INTEGRAL_MODES = ("joint", "alternate")
MASK_SOURCES = ("head", "proposal", "none")
_RANGES = {
    "HET_SCALE": "(0, inf)",
    "HET_MAPS": "[1, inf)",
    "L2_SCALE": "(0, inf)",
    "MIX_DIM": "[0, inf)",
    "DROPOUT": "[0, 1)",
    "BG_IOU_MIN": "[0, 1]",
    "CROWD_OVERLAP": "[0, inf)",
    "FREEZE_TRUNK_ITERS": "[0, inf)",
    "REGIONS_PER_CHUNK": "[1, inf)",
    "TEST_ROUNDS": "[1, inf)",
    "BOX_VOTE_IOU": "[0, 1)",
}


def add_multipathnet_config(cfg: CN) -> None:
    """Add ``MODEL.MULTIPATH`` with the settings of the published network.

    Keys of detectron2 that hold too: ``MODEL.ROI_HEADS`` for classes, the size of the sample and
    its share of foreground; ``MODEL.ROI_BOX_HEAD``'s ``FC_DIM``, ``POOLER_TYPE``,
    ``POOLER_RESOLUTION``, ``BBOX_REG_WEIGHTS`` and ``SMOOTH_L1_BETA``;
    ``MODEL.ROI_HEADS.IN_FEATURES`` for the mask head only.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.MULTIPATH = CN()
    # Maps that regions are pooled from, coarse to fine; several of them are the skip connections.
    _C.MODEL.MULTIPATH.IN_FEATURES = ["conv5", "conv4", "conv3"]
    # Crops of a proposal that are classified, in units of its width and height, around its centre.
    _C.MODEL.MULTIPATH.SCALES = [1.0, 1.5, 2.0, 4.0]
    # From how many of IN_FEATURES, from the first one on, each crop is pooled.
    _C.MODEL.MULTIPATH.MAPS = [3, 2, 2, 1]
    # True: boxes have a tower of their own ("het"). False: they are read off the classes' towers.
    _C.MODEL.MULTIPATH.HET = True
    # The crop that this tower sees.
    _C.MODEL.MULTIPATH.HET_SCALE = 1.5
    # From how many of IN_FEATURES it is pooled.
    _C.MODEL.MULTIPATH.HET_MAPS = 3
    # "fc": a 1x1 convolution and two layers of MODEL.ROI_BOX_HEAD.FC_DIM, as VGG has. "res5": the
    # last stage of the ResNet, which reads a single map at stride 16.
    _C.MODEL.MULTIPATH.TOWER = "fc"
    # What makes pooled maps comparable: "l2", each crop of each map has the norm L2_SCALE;
    # "constant", maps are multiplied by SKIP_FACTORS; "none".
    _C.MODEL.MULTIPATH.SKIP_NORM = "l2"
    # 1000 as published, for features of ImageNet's VGG and layers of 4096.
    _C.MODEL.MULTIPATH.L2_SCALE = 1000.0
    # For "constant", one for each of IN_FEATURES; the 1x1 convolution then starts as a copy of the
    # first map.
    _C.MODEL.MULTIPATH.SKIP_FACTORS = [1.0, 1.0 / 30, 1.0 / 200]
    # Channels after the 1x1 convolution that mixes the maps; 0: no convolution.
    _C.MODEL.MULTIPATH.MIX_DIM = 512
    # Share of the outputs of both layers that are dropped in training.
    _C.MODEL.MULTIPATH.DROPOUT = 0.5
    # True: all towers share their two layers; each has its own 1x1 convolution. As published,
    # False: each has 120 M weights.
    _C.MODEL.MULTIPATH.SHARE_TOWERS = False
    # Thresholds of the integral loss: for each there is a classifier whose foreground begins at
    # that IoU, and their probabilities are averaged. One number: the usual loss.
    _C.MODEL.MULTIPATH.IOU_THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    # "joint": all classifiers see each sample, drawn with the first threshold. "alternate": they
    # take turns, one per iteration, with samples drawn for theirs.
    _C.MODEL.MULTIPATH.INTEGRAL_MODE = "joint"
    # Proposals that overlap all objects less than this are not trained on.
    _C.MODEL.MULTIPATH.BG_IOU_MIN = 0.1
    # Proposals with more than this share of their area in one crowd are not trained on; 1.0: off.
    _C.MODEL.MULTIPATH.CROWD_OVERLAP = 0.7
    # For so many iterations no gradient of the region heads reaches the backbone. What the RPN
    # sends is not held back; MODEL.BACKBONE.FREEZE_AT keeps stages for the whole training.
    _C.MODEL.MULTIPATH.FREEZE_TRUNK_ITERS = 0
    # Regions that are pooled at once in inference.
    _C.MODEL.MULTIPATH.REGIONS_PER_CHUNK = 500
    # Where masks come from: "head", Mask R-CNN's head on the detected boxes (with MODEL.MASK_ON);
    # "proposal", the file of proposals (with INSTSEG.PROPOSAL_MASKS); "none", boxes only.
    _C.MODEL.MULTIPATH.MASK_SOURCE = "head"
    # Rounds of inference: each one after the first classifies the boxes that the round before found
    # for the best classes; all rounds' boxes compete.
    _C.MODEL.MULTIPATH.TEST_ROUNDS = 1
    # True: the boxes of a round get the scores of the next one, so that the last round gives none.
    _C.MODEL.MULTIPATH.TEST_NEXT_SCORES = False
    # True: a detected box becomes the mean of its class's boxes around it, weighted by their score.
    _C.MODEL.MULTIPATH.BOX_VOTE = False
    # IoU above which a box takes part.
    _C.MODEL.MULTIPATH.BOX_VOTE_IOU = 0.5
    # Exponent of the weights.
    _C.MODEL.MULTIPATH.BOX_VOTE_POWER = 1.0


def check_multipathnet_config(cfg: CN) -> None:
    """Make sure that the values of ``MODEL.MULTIPATH`` are allowed and fit each other.

    Raises:
        ValueError: naming the first key whose value is not.
    """
    node = cfg.MODEL.MULTIPATH
    for key, allowed in _RANGES.items():
        check_range(f"MODEL.MULTIPATH.{key}", node[key], allowed)
    for key, choices in (
        ("TOWER", TOWERS),
        ("SKIP_NORM", SKIP_NORMS),
        ("INTEGRAL_MODE", INTEGRAL_MODES),
        ("MASK_SOURCE", MASK_SOURCES),
    ):
        check_choice(f"MODEL.MULTIPATH.{key}", node[key], choices)
    _check_regions(node)
    _check_thresholds(node)
    _check_masks(cfg)
    _check_unused(cfg)


def _check_regions(node: CN) -> None:
    maps = len(node.IN_FEATURES)
    if not node.SCALES or min(node.SCALES) <= 0:
        raise ValueError(f"MODEL.MULTIPATH.SCALES must be positive numbers, not {node.SCALES}.")
    if len(node.MAPS) != len(node.SCALES):
        raise ValueError(
            f"MODEL.MULTIPATH.MAPS must have a number for each of the {len(node.SCALES)} SCALES, "
            f"not {node.MAPS}."
        )
    wanted = [*node.MAPS, node.HET_MAPS] if node.HET else node.MAPS
    if min(wanted) < 1 or max(wanted) > maps:
        raise ValueError(
            f"MODEL.MULTIPATH.MAPS and HET_MAPS must be from 1 to the {maps} of IN_FEATURES, not "
            f"{node.MAPS} and {node.HET_MAPS}."
        )
    if node.SKIP_NORM == "constant" and len(node.SKIP_FACTORS) != maps:
        raise ValueError(
            f"MODEL.MULTIPATH.SKIP_FACTORS must have a number for each of the {maps} IN_FEATURES, "
            f"not {node.SKIP_FACTORS}."
        )
    if node.TOWER == "res5" and (max(wanted) > 1 or node.SKIP_NORM != "none" or node.SHARE_TOWERS):
        raise ValueError(
            "MODEL.MULTIPATH.TOWER res5 reads one map as it is: set MAPS and HET_MAPS to 1, "
            "SKIP_NORM to none and SHARE_TOWERS to False."
        )
    if node.SHARE_TOWERS and not node.MIX_DIM and len(set(wanted)) > 1:
        raise ValueError(
            "MODEL.MULTIPATH.SHARE_TOWERS needs the same channels from all towers: set MIX_DIM to "
            "a positive number, or MAPS and HET_MAPS to the same."
        )


def _check_thresholds(node: CN) -> None:
    steps = node.IOU_THRESHOLDS
    if not steps or min(steps) <= node.BG_IOU_MIN or max(steps) > 1 or sorted(set(steps)) != steps:
        raise ValueError(
            "MODEL.MULTIPATH.IOU_THRESHOLDS must rise, above BG_IOU_MIN "
            f"{node.BG_IOU_MIN} and up to 1, not {steps}."
        )


def _check_masks(cfg: CN) -> None:
    source = cfg.MODEL.MULTIPATH.MASK_SOURCE
    if (source == "head") != cfg.MODEL.MASK_ON:
        raise ValueError(
            f"MODEL.MULTIPATH.MASK_SOURCE {source} and MODEL.MASK_ON {cfg.MODEL.MASK_ON} "
            "contradict each other: MASK_ON builds the mask head, which is for MASK_SOURCE head."
        )
    if source == "proposal" and not (cfg.MODEL.LOAD_PROPOSALS and cfg.INSTSEG.PROPOSAL_MASKS):
        raise ValueError(
            "MODEL.MULTIPATH.MASK_SOURCE proposal needs MODEL.LOAD_PROPOSALS True and "
            "INSTSEG.PROPOSAL_MASKS True: the masks come from the file of proposals."
        )


def _check_unused(cfg: CN) -> None:
    """Refuse keys of detectron2 that would have no effect."""
    if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES or cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES and USE_SIGMOID_CE must be False for "
            "MultiPathROIHeads."
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError("MODEL.KEYPOINT_ON must be False: MultiPathROIHeads predict no keypoints.")
    if cfg.MODEL.MULTIPATH.TEST_NEXT_SCORES and cfg.MODEL.MULTIPATH.TEST_ROUNDS < 2:
        raise ValueError("MODEL.MULTIPATH.TEST_NEXT_SCORES needs TEST_ROUNDS of 2 or more.")
