"""Config keys of PointRend: names and defaults of detectron2's own project."""

from __future__ import annotations

from detectron2.config import CfgNode as CN  # noqa: N817

__all__ = ["add_pointrend_config"]


def add_pointrend_config(cfg: CN) -> None:
    """Add the keys of detectron2's project, and ``MODEL.POINT_HEAD.TRAIN_SAMPLING``.

    The point head is on only where ``MODEL.ROI_MASK_HEAD.POINT_HEAD_ON`` says so, as it does in
    every published yaml file.

    Args:
        cfg: changed in place.
    """
    _C = cfg
    # Semantic segmentation: a random crop is drawn again (at most ten times) while one class fills
    # more than this part of it. 1.0: never.
    _C.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # Semantic segmentation: the colour jitter of SSD during training.
    _C.INPUT.COLOR_AUG_SSD = False

    # ---- coarse head ----
    # Feature maps that the coarse head reads; each must be in MODEL.ROI_HEADS.IN_FEATURES. Of
    # several the channels are put one behind the other.
    _C.MODEL.ROI_MASK_HEAD.IN_FEATURES = ("p2",)
    # Width of its fully connected layers.
    _C.MODEL.ROI_MASK_HEAD.FC_DIM = 1024
    # Number of its fully connected layers before the prediction.
    _C.MODEL.ROI_MASK_HEAD.NUM_FC = 2
    # Side of the coarse mask.
    _C.MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION = 7
    # False: the coarse mask is the result, and there is no point head.
    _C.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = False

    # ---- point head ----
    _C.MODEL.POINT_HEAD = CN()
    # StandardPointHead, or ImplicitPointHead with MODEL.ROI_MASK_HEAD.NAME ImplicitPointRendHead.
    _C.MODEL.POINT_HEAD.NAME = "StandardPointHead"
    # Foreground classes, equal to MODEL.ROI_HEADS.NUM_CLASSES. Semantic segmentation: all classes,
    # equal to MODEL.SEM_SEG_HEAD.NUM_CLASSES.
    _C.MODEL.POINT_HEAD.NUM_CLASSES = 80
    # Feature maps whose values at the points the point head reads; each must be in
    # MODEL.ROI_HEADS.IN_FEATURES. Semantic segmentation: any of the backbone's.
    _C.MODEL.POINT_HEAD.IN_FEATURES = ("p2",)
    # Points of each region (semantic segmentation: of each image) during training; N in the paper.
    _C.MODEL.POINT_HEAD.TRAIN_NUM_POINTS = 14 * 14
    # How training points are chosen (Sec. 3.1 of arXiv:1912.08193). importance: of k N random
    # points the beta N most uncertain ones, and (1 - beta) N random ones. uniform: N random ones.
    # grid: N points of a regular grid; N must be a square number. Implicit PointRend always draws
    # uniformly.
    _C.MODEL.POINT_HEAD.TRAIN_SAMPLING = "importance"
    # k of TRAIN_SAMPLING importance: 3 in the published models, 10 where the paper calls it heavily
    # biased.
    _C.MODEL.POINT_HEAD.OVERSAMPLE_RATIO = 3
    # beta of TRAIN_SAMPLING importance, in [0, 1]: 0.75 in the published models, 1.0 where the
    # paper calls it heavily biased.
    _C.MODEL.POINT_HEAD.IMPORTANCE_SAMPLE_RATIO = 0.75
    # How often the side of the mask, or of the label map, doubles during inference. A label map
    # begins at MODEL.SEM_SEG_HEAD.COMMON_STRIDE: at stride 4, 2 is the most.
    _C.MODEL.POINT_HEAD.SUBDIVISION_STEPS = 5
    # Cells of the mask, the most uncertain ones, that are predicted anew after each doubling.
    # Doublings after which all cells would be are made before the first prediction. Implicit
    # PointRend starts with a mask of so many cells; the number must be square.
    _C.MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS = 28 * 28
    # Width of the layers of the point head.
    _C.MODEL.POINT_HEAD.FC_DIM = 256
    # Number of layers of the point head before the prediction.
    _C.MODEL.POINT_HEAD.NUM_FC = 3
    # True: the point head predicts one mask for all classes. The coarse head still has one for
    # each.
    _C.MODEL.POINT_HEAD.CLS_AGNOSTIC_MASK = False
    # True: every layer of the point head reads the coarse logits. False: only the first.
    _C.MODEL.POINT_HEAD.COARSE_PRED_EACH_LAYER = True
    # Semantic segmentation: registered head that makes the coarse prediction.
    _C.MODEL.POINT_HEAD.COARSE_SEM_SEG_HEAD_NAME = "SemSegFPNHead"

    # ---- implicit PointRend ----
    _C.MODEL.IMPLICIT_POINTREND = CN()
    # Whether the point head reads the feature maps.
    _C.MODEL.IMPLICIT_POINTREND.IMAGE_FEATURE_ENABLED = True
    # Whether the point head reads an encoding of the point's position in the box.
    _C.MODEL.IMPLICIT_POINTREND.POS_ENC_ENABLED = True
    # Weight of the mean square of the predicted parameters in the loss.
    _C.MODEL.IMPLICIT_POINTREND.PARAMS_L2_REGULARIZER = 0.00001
