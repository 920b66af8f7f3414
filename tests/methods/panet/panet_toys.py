"""Small PANet models and regions for the tests."""

import torch
from contract.cases import blobs
from detectron2.config import get_cfg
from detectron2.structures import Boxes

import instseg_ext
from instseg_ext.methods.panet.config import add_panet_config
from instseg_ext.methods.panet.pooler import AllLevelPooler

STRIDES = (4, 8, 16, 32)


def config(opts=()):
    """PANet with R-50 of full width; the published heads."""
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    add_panet_config(cfg)
    model = cfg.MODEL
    model.DEVICE, model.MASK_ON, model.META_ARCHITECTURE = "cpu", True, "PANetRCNN"
    model.BACKBONE.NAME, model.BACKBONE.FREEZE_AT = "build_panet_fpn_backbone", 0
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.NORM = model.ROI_BOX_HEAD.NORM = model.ROI_MASK_HEAD.NORM = "GN"
    model.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model.ROI_HEADS.NAME = "PANetROIHeads"
    model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    box.NAME, mask.NAME = "PANetBoxHead", "PANetFusionMaskHead"
    box.NUM_CONV, box.NUM_FC, mask.NUM_CONV = 4, 1, 4
    box.POOLER_RESOLUTION, mask.POOLER_RESOLUTION = 7, 14
    box.POOLER_SAMPLING_RATIO = mask.POOLER_SAMPLING_RATIO = 2
    cfg.merge_from_list(list(opts))
    return cfg


def narrow(opts=()):
    """The same with a fraction of the channels, regions and cells."""
    cfg = config()
    model = cfg.MODEL
    nets = model.RESNETS
    nets.STEM_OUT_CHANNELS, nets.RES2_OUT_CHANNELS, nets.WIDTH_PER_GROUP = 8, 16, 8
    model.FPN.OUT_CHANNELS = 32
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.PRE_NMS_TOPK_TEST = 60
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 20
    model.ROI_HEADS.NUM_CLASSES, model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 3, 16
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    box.CONV_DIM, box.FC_DIM, box.NUM_CONV = 32, 64, 2
    mask.CONV_DIM, mask.POOLER_RESOLUTION = 64, 6
    cfg.TEST.DETECTIONS_PER_IMAGE = 6
    cfg.merge_from_list(list(opts))
    return cfg


def batch(*objects, size=(64, 96)):
    """Images with the given boxes, one list of boxes per image."""
    return [blobs(*size, boxes) for boxes in objects]


def pyramid(channels=8, height=64, width=96, num=2, dtype=torch.float32):
    return [torch.randn(num, channels, height // s, width // s).to(dtype) for s in STRIDES]


def box_lists():
    """Five regions of two images: tiny, large, beyond the border, without extent."""
    first = [[3.0, 5, 11, 13], [0, 0, 96, 64], [60, 10, 60, 10]]
    second = [[10.0, 10, 50, 40], [-20, 30, 200, 90]]
    return [Boxes(torch.tensor(first)), Boxes(torch.tensor(second))]


def regions(boxes=None, dtype=torch.float32):
    """Regions of 8 channels and 4x4 cells; ``box_lists`` unless others are given."""
    pooler = AllLevelPooler("ROIAlignV2", 4, [1 / s for s in STRIDES], 2)
    return pooler(pyramid(dtype=dtype), box_lists() if boxes is None else boxes)


def no_boxes(num=2):
    return [Boxes(torch.zeros(0, 4)) for _ in range(num)]


def randomise_norms(module):
    """Give every group norm an affine map that matters."""
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm):
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            torch.nn.init.normal_(part.bias)


def count(module):
    return sum(p.numel() for p in module.parameters())
