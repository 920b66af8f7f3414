"""Config keys of MNC."""

from __future__ import annotations

from dataclasses import dataclass

from detectron2.config import CfgNode as CN  # noqa: N817

from instseg_ext.config import check_choice, check_range

__all__ = ["MNCOptions", "add_mnc_config", "check_mnc_config"]

STAGES = (3, 5)
TOWERS = ("fc", "res5")
WARP_MODES = ("single", "maxsample")
EXT_WARPS = ("same", "direct14")
_RANGES = {
    "MASK_CONV_DIM": "[0, inf)",
    "MASK_INIT_STD": "[0, inf)",
    "FG_SEG_THRESH": "[0, 1]",
    "MIN_SIDE": "[0, inf)",
    "MASK_LOSS_WEIGHT": "[0, inf)",
    "BINARY_THRESH": "(0, 1)",
}


@dataclass(frozen=True)
class MNCOptions:
    """What the cascade does, as opposed to its layers.

    Attributes:
        num_stages: 3 or 5, at inference.
        train_stages: 3 or 5, in training.
        mask_threshold: lower bound of a mask pixel.
        seg_iou: IoU from which a predicted mask keeps its region's class.
        mask_weight: of the mask loss.
        beta: where the box loss turns from quadratic to linear.
        box_gradient: bound of each component of the gradient through the boxes for one image; 0
            cuts it off.
        denormalize: decode deltas at their scale before stage 4 in training.
        legacy: boxes as in the authors' code.
    """

    num_stages: int = 5
    train_stages: int = 5
    mask_threshold: float = 0.4
    seg_iou: float = 0.5
    mask_weight: float = 2.0
    beta: float = 1.0
    box_gradient: float = 1 / 512
    denormalize: bool = True
    legacy: bool = False

    @classmethod
    def from_config(cls, cfg: CN) -> MNCOptions:
        """Read ``MODEL.MNC``."""
        node = cfg.MODEL.MNC
        return cls(
            num_stages=node.NUM_STAGES,
            train_stages=node.TRAIN_STAGES,
            mask_threshold=node.BINARY_THRESH,
            seg_iou=node.FG_SEG_THRESH,
            mask_weight=node.MASK_LOSS_WEIGHT,
            beta=cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA,
            box_gradient=node.BOX_GRAD_CLIP if node.BOX_GRAD else 0.0,
            denormalize=node.BRIDGE_DENORM_TRAIN,
            legacy=node.LEGACY_BOXES,
        )


def add_mnc_config(cfg: CN) -> None:
    """Add ``MODEL.MNC`` with the settings of the published model.

    Keys of detectron2 that hold too: ``MODEL.ROI_HEADS`` for classes, the size of the sample, its
    share of foreground and the IoU that makes it; ``MODEL.ROI_BOX_HEAD.FC_DIM`` for the towers,
    ``BBOX_REG_WEIGHTS`` and ``SMOOTH_L1_BETA`` for boxes; ``TEST.DETECTIONS_PER_IMAGE``.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.MNC = CN()
    # 3 or 5: stages at inference. 5 runs masks and classes again on the boxes that stage 3 found.
    _C.MODEL.MNC.NUM_STAGES = 5
    # The same in training. The stages share their weights, so that either can be tested with 5.
    _C.MODEL.MNC.TRAIN_STAGES = 5
    # Side of the predicted masks, m; the paper has 28, the published model 21.
    _C.MODEL.MNC.MASK_SIZE = 21
    # Lower bound of a mask pixel, everywhere: targets, labels of stage 3, voted masks.
    _C.MODEL.MNC.BINARY_THRESH = 0.4
    # Outputs of the first layer of the mask head.
    _C.MODEL.MNC.MASK_FC_DIM = 256
    # Channels to which a 1x1 convolution brings the regions before that layer; 0: none, as
    # published. With 1024 channels the layer has 51 M weights, with 256 a quarter of them.
    _C.MODEL.MNC.MASK_CONV_DIM = 0
    # Standard deviation of the initial weights of its fully connected layers, 0.001 as published,
    # which suits features of ImageNet models; 0.0: by their number of inputs, for a fresh backbone.
    _C.MODEL.MNC.MASK_INIT_STD = 0.001
    # What classifies a region: "fc" (two layers of MODEL.ROI_BOX_HEAD.FC_DIM) or "res5" (the last
    # stage of the ResNet). There are two of them, on the region and on the region times its mask.
    _C.MODEL.MNC.TOWER = "fc"
    # Side of the grid that RoI warping samples.
    _C.MODEL.MNC.WARP_SIZE = 28
    # Side of the map that max pooling makes of it, the features of the region.
    _C.MODEL.MNC.POOL_SIZE = 14
    # "single": one sample per cell of the grid. "maxsample": the first published code, the largest
    # of as many samples as a bin has feature pixels; then WARP_SIZE does not count.
    _C.MODEL.MNC.WARP_MODE = "single"
    # True, as published: boxes are rounded to whole feature pixels. The paper does not round.
    _C.MODEL.MNC.WARP_QUANTIZE = True
    # How stage 4 pools at inference: "same" as stage 2, or "direct14", as the last published test
    # network does, a grid of POOL_SIZE without max pooling.
    _C.MODEL.MNC.EXT_WARP = "same"
    # False: no gradient reaches boxes through RoI warping, so that the cascade is not trained end
    # to end.
    _C.MODEL.MNC.BOX_GRAD = True
    # Largest absolute value of each component of that gradient with respect to the box deltas, for
    # one image.
    _C.MODEL.MNC.BOX_GRAD_CLIP = 1.0 / 512
    # True: box deltas are brought to their scale before stage 4 in training too. False, as
    # published: they are not, and boxes move 10 times as far, sizes 5 times.
    _C.MODEL.MNC.BRIDGE_DENORM_TRAIN = True
    # True: anchors whose proposals stage 3 samples take that sample's label in the RPN loss.
    _C.MODEL.MNC.MIX_INDEX = True
    # A sampled object of this IoU of predicted mask and object, or more, keeps its class in the
    # classifier of masked regions; others are background there.
    _C.MODEL.MNC.FG_SEG_THRESH = 0.5
    # Shortest side of a proposal in pixels of the original image, 16 as published; 0: what
    # MODEL.PROPOSAL_GENERATOR.MIN_SIZE says, in pixels of the network input.
    _C.MODEL.MNC.MIN_SIDE = 0.0
    # Background of a sample: the share taken from boxes that overlap an object, the rest comes from
    # the others.
    _C.MODEL.MNC.BG_NEAR_FRACTION = 0.85
    # IoU from which a box overlaps an object in that sense.
    _C.MODEL.MNC.BG_SPLIT_IOU = 0.1
    # Weight of the mask loss beside the losses of class and box, which have 1.
    _C.MODEL.MNC.MASK_LOSS_WEIGHT = 2.0
    # True: masks of overlapping candidates are averaged. False: each detection has its own.
    _C.MODEL.MNC.VOTE = True
    # IoU above which the lower of two boxes of a class is dropped before masks are voted.
    _C.MODEL.MNC.VOTE_NMS = 0.3
    # IoU with a detection from which any candidate votes for its mask.
    _C.MODEL.MNC.VOTE_IOU = 0.5
    # Detections below this score are not considered. 0.0 as published; what drops out with 0.001
    # counts only where fewer than TEST.DETECTIONS_PER_IMAGE are left.
    _C.MODEL.MNC.VOTE_MIN_SCORE = 0.001
    # True, as published: voters are drawn by their corners, half a cell further up and left, and a
    # voted mask is brought back to MASK_SIZE cells of its box, cut and enlarged again.
    _C.MODEL.MNC.VOTE_REENCODE = False
    # True: boxes end in their last pixel and grow by one in decoding, as in the authors' code.
    _C.MODEL.MNC.LEGACY_BOXES = False


def check_mnc_config(cfg: CN) -> None:
    """Make sure that the values of ``MODEL.MNC`` are allowed.

    Raises:
        ValueError: naming the first key whose value is not.
    """
    node = cfg.MODEL.MNC
    for key in ("NUM_STAGES", "TRAIN_STAGES"):
        if node[key] not in STAGES:
            raise ValueError(f"MODEL.MNC.{key} must be 3 or 5, not {node[key]}.")
    check_choice("MODEL.MNC.TOWER", node.TOWER, TOWERS)
    check_choice("MODEL.MNC.WARP_MODE", node.WARP_MODE, WARP_MODES)
    check_choice("MODEL.MNC.EXT_WARP", node.EXT_WARP, EXT_WARPS)
    for key in ("MASK_SIZE", "POOL_SIZE", "MASK_FC_DIM"):
        if node[key] < 1:
            raise ValueError(f"MODEL.MNC.{key} must be positive, not {node[key]}.")
    if node.POOL_SIZE % 2:
        raise ValueError(
            f"MODEL.MNC.POOL_SIZE must be even, not {node.POOL_SIZE}: the towers halve it."
        )
    if node.WARP_SIZE < 1 or node.WARP_SIZE % node.POOL_SIZE:
        raise ValueError(
            f"MODEL.MNC.WARP_SIZE must be a multiple of POOL_SIZE {node.POOL_SIZE}, not "
            f"{node.WARP_SIZE}."
        )
    if (node.EXT_WARP, node.WARP_MODE) == ("direct14", "maxsample"):
        raise ValueError(
            "MODEL.MNC.EXT_WARP direct14 changes nothing with MODEL.MNC.WARP_MODE maxsample, which "
            "has no grid: set EXT_WARP to same."
        )
    for key, allowed in _RANGES.items():
        check_range(f"MODEL.MNC.{key}", node[key], allowed)
    if node.MIN_SIDE and cfg.INPUT.CROP.ENABLED:
        raise ValueError(
            "MODEL.MNC.MIN_SIDE is in pixels of the whole original image, which a crop does not "
            "tell: set INPUT.CROP.ENABLED to False, or MIN_SIDE to 0 and use "
            "MODEL.PROPOSAL_GENERATOR.MIN_SIZE."
        )
    if node.BOX_GRAD_CLIP <= 0:
        raise ValueError(f"MODEL.MNC.BOX_GRAD_CLIP must be positive, not {node.BOX_GRAD_CLIP}.")
    if cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: MNC has boxes of each class.")
