"""The ``MODEL.YOLACT`` node, shared by YOLACT, YOLACT++ and the image models of YolactEdge."""

from detectron2.config import CfgNode as CN  # noqa: N817

__all__ = ["add_yolact_config"]


def add_yolact_config(cfg: CN) -> None:
    """Define ``MODEL.YOLACT`` with the settings of the published 550-pixel models.

    The size of the network input is ``INSTSEG.STRETCH``; images are stretched to it.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    _C.MODEL.YOLACT = CN()

    # Foreground classes. Background is added as the last channel. Follows the training set
    # (train_net).
    _C.MODEL.YOLACT.NUM_CLASSES = 80

    # ---- backbone (build_yolact_fpn_backbone) ----
    # What lies below the pyramid: resnet, darknet53 or mobilenetv2.
    _C.MODEL.YOLACT.BOTTOM_UP = "resnet"
    # auto keeps the backbone's batch norms as they are (statistics, scale and shift) when a process
    # sees fewer than 6 images at once, as the authors do; always; never.
    _C.MODEL.YOLACT.FREEZE_BN = "auto"

    # ---- head ----
    # Pyramid levels that carry anchors, finest first. Prototypes come from the first.
    _C.MODEL.YOLACT.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Width of the shared convolution and of the prototype branch.
    _C.MODEL.YOLACT.WIDTH = 256
    # Prototype masks, and coefficients per detection (k in the paper).
    _C.MODEL.YOLACT.NUM_PROTOS = 32

    # ---- anchors ----
    # Per level, in pixels of the network input: one scale (YOLACT) or three (YOLACT++).
    _C.MODEL.YOLACT.ANCHOR_SCALES = [[24.0], [48.0], [96.0], [192.0], [384.0]]
    # Width / height. The order is that of the channels.
    _C.MODEL.YOLACT.ASPECT_RATIOS = [1.0, 0.5, 2.0]
    # True: heights equal widths, so that the ratios become further sizes. All COCO checkpoints of
    # YOLACT (not ++) were trained that way; the Pascal one and YOLACT++ were not.
    _C.MODEL.YOLACT.SQUARE_ANCHORS = True

    # ---- matching ----
    # Anchors that overlap an object at least this much are positive; so is one anchor per object,
    # whatever their overlap.
    _C.MODEL.YOLACT.POS_IOU = 0.5
    # Anchors that overlap all objects less than this are background; those in between are neutral.
    _C.MODEL.YOLACT.NEG_IOU = 0.4
    # Anchors that are not positive and lie in a crowd by more than this part of their area are
    # neutral.
    _C.MODEL.YOLACT.CROWD_IOA = 0.7
    # Objects narrower or lower than this, in pixels of the network input, are left out of training.
    # The authors' value, meant as 4 pixels, removes empty boxes only.
    _C.MODEL.YOLACT.MIN_BOX_SIZE = 4 / 550

    # ---- losses ----
    # Hardest background anchors per positive one that enter the class loss.
    _C.MODEL.YOLACT.NEG_POS_RATIO = 3
    # Positive anchors per image whose masks are trained; a random choice where there are more.
    _C.MODEL.YOLACT.MASKS_TO_TRAIN = 100
    # Weight of the class loss.
    _C.MODEL.YOLACT.LOSS_WEIGHT_CLS = 1.0
    # Weight of the box loss.
    _C.MODEL.YOLACT.LOSS_WEIGHT_BOX = 1.5
    # Weight of the mask loss.
    _C.MODEL.YOLACT.LOSS_WEIGHT_MASK = 6.125
    # Weight of the semantic loss, which exists in training only.
    _C.MODEL.YOLACT.LOSS_WEIGHT_SEMANTIC = 1.0
    # Weight of the loss of the predicted mask IoU.
    _C.MODEL.YOLACT.LOSS_WEIGHT_MASK_IOU = 25.0

    # ---- inference ----
    # An anchor is a candidate when its best class probability is strictly higher.
    _C.MODEL.YOLACT.SCORE_THRESH = 0.05
    # A pixel belongs to a mask when its probability is strictly higher.
    _C.MODEL.YOLACT.MASK_THRESH = 0.5
    _C.MODEL.YOLACT.NMS = CN()
    # fast (each class for itself, suppressed boxes suppress too), cross_class (the same over the
    # best class of each anchor) or traditional (greedy, each class for itself).
    _C.MODEL.YOLACT.NMS.TYPE = "fast"
    # A box is kept when its overlap with every better one is at most this (fast, cross_class), or
    # less than this (traditional).
    _C.MODEL.YOLACT.NMS.THRESH = 0.5
    # Best boxes, of each class or of all for cross_class, that enter fast NMS.
    _C.MODEL.YOLACT.NMS.TOPK = 200
    # True: fast NMS also drops (anchor, class) pairs that are not above SCORE_THRESH themselves.
    # Without it, results fill up to TEST.DETECTIONS_PER_IMAGE with weak classes of strong anchors,
    # which the authors found worth 0.2 AP.
    _C.MODEL.YOLACT.NMS.SECOND_THRESHOLD = False

    # ---- mask scoring (YOLACT++) ----
    _C.MODEL.YOLACT.MASK_IOU = CN()
    # Predict the IoU of each mask; masks are then ranked by class probability times that IoU.
    _C.MODEL.YOLACT.MASK_IOU.ENABLED = False
    # Objects of at most this many pixels on the prototypes do not train it.
    _C.MODEL.YOLACT.MASK_IOU.MIN_AREA = 25.0
