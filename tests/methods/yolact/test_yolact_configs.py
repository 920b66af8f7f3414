"""The published configs: the authors' architectures, parameter counts and recipes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import ResNet
from methods.project import Project, assert_nuclei_protocol, build, count
from torch import nn

from instseg_ext.engine.optim import build_optimizer, build_scheduler
from instseg_ext.methods.yolact.anchors import AnchorGrid

PROJECT = Project("YOLACT")

COCO = ((24,), (48,), (96,), (192,), (384,))
OF_400 = ((17,), (34,), (69,), (139,), (279,))
OF_700 = ((30,), (61,), (122,), (244,), (488,))
PASCAL = ((32,), (64,), (128,), (256,), (512,))
COCO_AND_BETWEEN = tuple(tuple(s * 2 ** (i / 3) for i in range(3)) for (s,) in COCO)

# Parameters of each part. Statistics of norms do not count.
PROTONET, SEMANTIC, MASK_IOU = 2_368_544, 20_560, 108_560
HEAD = PROTONET + SEMANTIC + 1_399_135
PLUS_HEAD = PROTONET + SEMANTIC + MASK_IOU + 3_017_245
# 60 classes fewer in the class predictor and the semantic branch.
PASCAL_HEAD = HEAD - 60 * (3 * (9 * 256 + 1) + 256 + 1)
R50, R101, D53, M_V2 = 23_508_032, 42_500_160, 40_584_928, 1_337_792
# Offset convolutions and biases of the deformable ones.
R50_DCN, R101_DCN = R50 + 874_847, R101 + 687_401


def pyramid(channels):
    """Return the parameters of the pyramid on features of so many channels."""
    return sum(256 * c + 256 for c in channels) + 5 * (9 * 256 * 256 + 256)


@dataclass(frozen=True)
class Model:
    """What a published model is.

    Attributes:
        trunk: parameters of the backbone without the pyramid.
        channels: of the features that the pyramid takes.
        head: parameters of the head.
        size: side of the network input.
        scales: of the anchors, per level.
        square: heights of anchors equal their widths.
        anchors: of all levels.
        deform: blocks with deformable convolution, per stage from res2.
        classes: of the data set.
        masks: masks trained per image.
    """

    trunk: int = R50
    channels: tuple = (512, 1024, 2048)
    head: int = HEAD
    size: int = 550
    scales: tuple = COCO
    square: bool = True
    anchors: int = 19248
    deform: tuple = ((), (), (), ())
    classes: int = 80
    masks: int = 100

    @property
    def is_resnet(self):
        return self.channels == (512, 1024, 2048)


PLUS = {"head": PLUS_HEAD, "scales": COCO_AND_BETWEEN, "square": False, "anchors": 57744}
FULL_R50 = ((), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5), (0, 1, 2))
EVERY_THIRD_R101 = ((), (0, 3), (0, 3, 6, 9, 12, 15, 18, 21), (0,))

PUBLISHED = {
    "yolact_R_50_550": Model(),
    "yolact_R_101_550": Model(R101),
    "yolact_R_101_400": Model(R101, size=400, scales=OF_400, anchors=10077),
    "yolact_R_101_700": Model(R101, size=700, scales=OF_700, anchors=30963, masks=300),
    "yolact_D_53_550": Model(D53, (256, 512, 1024)),
    "yolact_R_50_550_sbd": Model(head=PASCAL_HEAD, scales=PASCAL, square=False, classes=20),
    "yolact_plus_R_50_550": Model(R50_DCN, deform=FULL_R50, **PLUS),
    "yolact_plus_R_101_550": Model(R101_DCN, deform=EVERY_THIRD_R101, **PLUS),
    "yolact_edge_R_50_550": Model(),
    "yolact_edge_R_101_550": Model(R101),
    "yolact_edge_M_V2_550": Model(M_V2, (32, 64, 160)),
}
# Of whole models, as counted on the authors' layers.
TOTALS = {
    "yolact_R_50_550": 31_164_943,
    "yolact_R_101_550": 50_157_071,
    "yolact_plus_R_50_550": 33_766_460,
    "yolact_plus_R_101_550": 52_571_142,
}
# Sides of P3 to P7.
LEVELS = {400: (50, 25, 13, 7, 4), 550: (69, 35, 18, 9, 5), 700: (88, 44, 22, 11, 6)}


def norms(model):
    return [
        parameter
        for module in model.backbone.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    ]


def deformable_blocks(stage):
    """Return the numbers of a stage's deformable blocks, which are modulated and biased."""
    found = tuple(i for i, block in enumerate(stage) if hasattr(block, "conv2_offset"))
    for i in found:
        assert stage[i].conv2_offset.weight.shape[0] == 27
        assert stage[i].conv2.bias is not None
    return found


def test_no_published_model_is_forgotten():
    assert set(PROJECT.published) == set(PUBLISHED)
    assert "nuclei_yolact_R_18" in PROJECT.configs


@pytest.mark.parametrize("name", PUBLISHED)
def test_architecture(name):
    expected = PUBLISHED[name]
    model = build(PROJECT.config(name))
    trunk = model.backbone.bottom_up
    assert count(trunk) == expected.trunk
    assert count(model.backbone) - count(trunk) == pyramid(expected.channels)
    assert count(model.head) == expected.head
    assert count(model) == TOTALS.get(name, count(model))
    assert (model.head.mask_iou is not None) == name.startswith("yolact_plus")
    assert model.num_classes == expected.classes
    assert model.stretch_size == (expected.size, expected.size)
    assert norms(model)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())

    assert isinstance(trunk, ResNet) == expected.is_resnet
    if expected.is_resnet:
        stages = [trunk.res2, trunk.res3, trunk.res4, trunk.res5]
        assert [stage[0].conv2.stride for stage in stages] == [(1, 1), *[(2, 2)] * 3]
        assert tuple(map(deformable_blocks, stages)) == expected.deform


@pytest.mark.parametrize("name", PUBLISHED)
def test_anchors(name):
    expected = PUBLISHED[name]
    node = PROJECT.config(name).MODEL.YOLACT
    assert [pytest.approx(scales, rel=1e-15) for scales in expected.scales] == node.ANCHOR_SCALES
    assert node.ASPECT_RATIOS == [1.0, 0.5, 2.0]
    assert expected.square == node.SQUARE_ANCHORS
    grid = AnchorGrid(tuple(map(tuple, node.ANCHOR_SCALES)), square=node.SQUARE_ANCHORS)
    levels = tuple((side, side) for side in LEVELS[expected.size])
    anchors = grid.anchors(levels, (expected.size, expected.size), torch.device("cpu"))
    assert anchors.shape == (expected.anchors, 4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe(name):
    cfg = PROJECT.config(name)
    expected = PUBLISHED[name]
    solver, given, node = cfg.SOLVER, cfg.INPUT, cfg.MODEL.YOLACT
    if name.endswith("sbd"):
        assert (solver.MAX_ITER, solver.STEPS) == (120000, (60000, 100000))
        assert cfg.DATASETS.TRAIN == ("pascal_sbd_train",)
        assert cfg.DATASETS.TEST == ("pascal_sbd_val",)
        assert {e["NAME"] for e in cfg.INSTSEG.DATASETS} == {"pascal_sbd_train", "pascal_sbd_val"}
    else:
        assert (solver.MAX_ITER, solver.STEPS) == (800000, (280000, 600000, 700000, 750000))
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
        assert cfg.DATASETS.TEST == ("coco_2017_val",)
    assert (solver.IMS_PER_BATCH, cfg.INSTSEG.SCALE_LR_BATCH) == (8, 8)
    assert (solver.BASE_LR, solver.MOMENTUM, solver.NESTEROV) == (0.001, 0.9, False)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (5e-4, 5e-4)
    assert solver.WEIGHT_DECAY_BIAS in (None, 5e-4)
    assert solver.BIAS_LR_FACTOR == 1.0
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.WARMUP_METHOD) == (500, 0.1, "linear")
    assert (solver.LR_SCHEDULER_NAME, solver.GAMMA) == ("WarmupMultiStepLR", 0.1)
    assert cfg.INSTSEG.OPTIMIZER == "sgd"
    assert cfg.INSTSEG.CLIP_GRAD_NORM == 0.0
    assert not solver.CLIP_GRADIENTS.ENABLED

    assert [expected.size, expected.size] == cfg.INSTSEG.STRETCH
    assert (given.MIN_SIZE_TRAIN, given.MIN_SIZE_TEST) == ((0,), 0)
    assert (given.FORMAT, given.MASK_FORMAT, given.RANDOM_FLIP) == ("RGB", "bitmask", "horizontal")
    ssd = cfg.INSTSEG.AUGMENTATIONS.SSD
    assert (ssd.ENABLED, ssd.PHOTOMETRIC, ssd.EXPAND_RATIO, ssd.CROP) == (True, True, 4.0, True)
    # The canvas has the ImageNet mean, also where the network's input is not normalised by it.
    assert (ssd.EXPAND_FILL or cfg.MODEL.PIXEL_MEAN) == [123.68, 116.78, 103.94]
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    in_0_to_1 = "D_53" in name
    assert ([0.0] * 3 if in_0_to_1 else [123.68, 116.78, 103.94]) == cfg.MODEL.PIXEL_MEAN
    assert ([255.0] * 3 if in_0_to_1 else [58.40, 57.12, 57.38]) == cfg.MODEL.PIXEL_STD
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100

    assert (cfg.MODEL.BACKBONE.FREEZE_AT, node.FREEZE_BN) == (0, "auto")
    assert cfg.MODEL.RESNETS.NORM == cfg.MODEL.DARKNET.NORM == "BN"
    assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert "torchvision" in cfg.MODEL.WEIGHTS or in_0_to_1
    assert expected.masks == node.MASKS_TO_TRAIN


def test_settings_that_every_published_model_shares():
    node = PROJECT.config("yolact_R_50_550").MODEL.YOLACT
    assert (node.POS_IOU, node.NEG_IOU, node.CROWD_IOA, node.NEG_POS_RATIO) == (0.5, 0.4, 0.7, 3)
    assert (node.LOSS_WEIGHT_CLS, node.LOSS_WEIGHT_BOX, node.LOSS_WEIGHT_MASK) == (1, 1.5, 6.125)
    assert (node.LOSS_WEIGHT_SEMANTIC, node.LOSS_WEIGHT_MASK_IOU) == (1, 25)
    assert (node.SCORE_THRESH, node.MASK_THRESH) == (0.05, 0.5)
    assert (node.NMS.TYPE, node.NMS.THRESH, node.NMS.TOPK) == ("fast", 0.5, 200)
    assert not node.NMS.SECOND_THRESHOLD
    assert (node.WIDTH, node.NUM_PROTOS) == (256, 32)
    assert node.MASK_IOU.MIN_AREA == 25


def test_weight_decay_of_every_parameter():
    cfg = PROJECT.config("yolact_R_50_550")
    model = build(cfg)
    groups = build_optimizer(cfg, model).param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert set(decay) == set(model.parameters())
    assert set(decay.values()) == {5e-4}
    assert len(norms(model)) == 2 * 53
    assert set(norms(model)) <= set(decay)


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [
        (0, 1e-4),
        (250, 5.5e-4),
        (500, 1e-3),
        (279999, 1e-3),
        (280000, 1e-4),
        (600000, 1e-5),
        (700000, 1e-6),
        (750000, 1e-7),
    ],
)
def test_learning_rate(iteration, rate):
    cfg = PROJECT.config("yolact_R_50_550")
    scheduler = build_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1)))
    scheduler.last_epoch = iteration
    assert scheduler.get_lr() == pytest.approx([rate])


def test_learning_rate_follows_the_batch():
    opts = ("SOLVER.IMS_PER_BATCH", 16, "SOLVER.WARMUP_FACTOR", 0.05)
    cfg = PROJECT.config("yolact_R_50_550", *opts)
    scheduler = build_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1)))
    # The authors double the rate but not its start.
    assert scheduler.get_lr() == pytest.approx([1e-4])
    scheduler.last_epoch = 500
    assert scheduler.get_lr() == pytest.approx([2e-3])


@pytest.mark.parametrize(
    ("batch", "key", "trained"),
    [(8, "auto", True), (5, "auto", False), (5, "never", True), (8, "always", False)],
)
def test_batch_norms_are_trained_from_6_images_on(batch, key, trained):
    opts = ("SOLVER.IMS_PER_BATCH", batch, "MODEL.YOLACT.FREEZE_BN", key)
    model = build(PROJECT.config("yolact_R_50_550", *opts))
    assert {parameter.requires_grad for parameter in norms(model)} == {trained}


def test_nuclei_config_keeps_the_protocol():
    cfg = PROJECT.config("nuclei_yolact_R_18")
    assert_nuclei_protocol(cfg)
    # Fresh norms have to be trained, whatever the batch.
    assert cfg.MODEL.YOLACT.FREEZE_BN == "never"
