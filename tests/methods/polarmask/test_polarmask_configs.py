"""The published configs: the authors' architectures, parameter counts and recipes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from detectron2.layers import FrozenBatchNorm2d
from methods.project import Project, assert_nuclei_protocol, build, count
from torch import nn

from instseg_ext.engine.optim import build_optimizer, build_scheduler, effective_rate

PROJECT = Project("PolarMask")

# Images of train2017 with annotations.
IMAGES = 117_266

# Parameters of each part; frozen norms have none.
PYRAMID = 256 * (512 + 1024 + 2048) + 5 * 9 * 256 * 256 + 8 * 256
HEAD = 7_362_947
# Twelve deformable convolutions: offsets and modulation of nine taps, and a bias.
HEAD_DCN = HEAD + 12 * (27 * (9 * 256 + 1) + 256)
FCOS_HEAD = 4_918_618
TRUNKS = {"R-50": 23_454_912, "R-101": 42_394_816, "X-101": 81_203_392}
BLOCKS = {"R-50": (3, 4, 6, 3), "R-101": (3, 4, 23, 3), "X-101": (3, 4, 23, 3)}
# Channels of the 3x3 convolutions of res3 to res5.
WIDTHS = {"R-50": (128, 256, 512), "R-101": (128, 256, 512), "X-101": (512, 1024, 2048)}


@dataclass(frozen=True)
class Model:
    """What a config of the authors says.

    Attributes:
        backbone: short name.
        batch: images on all GPUs.
        rate: learning rate of that batch.
        warmup: iterations and the factor that they begin with.
        epochs: after which the rate falls, and all.
        size: height and width of the input in tests, and in training unless ``heights`` is given.
        heights: least and greatest height in training.
        deform: offsets per tap of the backbone's deformable convolutions, 0 without them.
    """

    backbone: str
    batch: int = 16
    rate: float = 0.01
    warmup: tuple = (500, 1 / 3)
    epochs: tuple = (8, 11, 12)
    size: tuple = (768, 1280)
    heights: tuple = ()
    deform: int = 0


ON_32 = {"batch": 128, "rate": 0.08, "warmup": (2000, 1 / 24), "epochs": (10, 13, 14)}
X101_ON_32 = {"batch": 64, "rate": 0.04, "warmup": (2000, 1 / 12), "epochs": (10, 13, 14)}
TWICE = {
    "batch": 32,
    "rate": 0.02,
    "warmup": (2000, 1 / 6),
    "epochs": (18, 24, 26),
    "size": (800, 1333),
    "heights": (640, 800),
}
SIX_TIMES = {**TWICE, "epochs": (50, 68, 74)}

PUBLISHED = {
    "polarmask_R_50_768_1x": Model("R-50"),
    "polarmask_R_101_768_1x": Model("R-101"),
    "polarmask_X_101_768_1x": Model("X-101"),
    "polarmask_R_50_768_1x_32gpu": Model("R-50", **ON_32),
    "polarmask_R_101_768_1x_32gpu": Model("R-101", **ON_32),
    "polarmask_X_101_768_1x_32gpu": Model("X-101", **X101_ON_32),
    "polarmask_R_50_DCN_768_1x": Model("R-50", **ON_32, deform=18),
    "polarmask_R_101_DCN_768_1x": Model("R-101", **ON_32, deform=18),
    "polarmask_X_101_DCN_768_1x": Model("X-101", **X101_ON_32, deform=18),
    "polarmask_R_50_800_1x": Model("R-50", **ON_32, size=(800, 1333)),
    "polarmask_R_50_2x": Model("R-50", **TWICE),
    "polarmask_R_101_2x": Model("R-101", **TWICE),
    "polarmask_X_101_2x": Model("X-101", **TWICE),
    "polarmask_R_50_DCN_2x": Model("R-50", **TWICE, deform=18),
    "polarmask_R_101_DCN_2x": Model("R-101", **TWICE, deform=18),
    "polarmask_X_101_DCN_2x": Model("X-101", **TWICE, deform=18),
    "polarmask_R_101_DCN_6x": Model("R-101", **SIX_TIMES, deform=27),
}
FCOS = "fcos_R_50_FPN_1x"
# One name for each architecture; schedules and sizes of images do not change it.
ARCHITECTURES = {(m.backbone, m.deform): name for name, m in reversed(PUBLISHED.items())}


def groups_of(cfg, model):
    """Return rate and weight decay of each trained parameter by name."""
    settings = {
        parameter: (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(settings) == set(trained.values())
    return {name: settings[parameter] for name, parameter in trained.items()}


def test_no_published_model_is_forgotten():
    assert set(PROJECT.published) == {*PUBLISHED, FCOS}
    assert "nuclei_polarmask_R_18_FPN" in PROJECT.configs


@pytest.mark.parametrize("name", ARCHITECTURES.values())
def test_architecture(name):
    expected = PUBLISHED[name]
    model = build(PROJECT.config(name))
    trunk = model.backbone.bottom_up
    stages = [trunk.res2, trunk.res3, trunk.res4, trunk.res5]
    blocks = BLOCKS[expected.backbone]
    deformable = [[hasattr(block, "conv2_offset") for block in stage] for stage in stages]
    assert deformable == [
        [i > 0 and expected.deform > 0] * length for i, length in enumerate(blocks)
    ]
    offsets = sum(
        length * expected.deform * (9 * width + 1)
        for length, width in zip(blocks[1:], WIDTHS[expected.backbone], strict=True)
    )
    assert count(trunk) == TRUNKS[expected.backbone] + offsets
    assert count(model.backbone) - count(trunk) == PYRAMID
    assert count(model.head) == (HEAD_DCN if expected.deform else HEAD)
    assert (model.num_classes, model.stretch_size) == (80, expected.size)
    assert model.backbone.size_divisibility == 128

    in_1x1 = expected.backbone != "X-101"
    assert [s[0].conv1.stride[0] for s in stages] == ([1, 2, 2, 2] if in_1x1 else [1] * 4)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert {type(norm) for norm in norms} == {FrozenBatchNorm2d}
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe(name):
    cfg = PROJECT.config(name)
    expected = PUBLISHED[name]
    assert PROJECT.config(ARCHITECTURES[expected.backbone, expected.deform]).MODEL == cfg.MODEL
    solver, given = cfg.SOLVER, cfg.INPUT
    assert expected.batch == solver.IMS_PER_BATCH
    assert effective_rate(cfg) == pytest.approx(expected.rate)
    assert expected.warmup[0] == solver.WARMUP_ITERS
    assert pytest.approx(expected.warmup[1]) == solver.WARMUP_FACTOR
    iterations = [round(epoch * IMAGES / expected.batch) for epoch in expected.epochs]
    assert [*solver.STEPS, solver.MAX_ITER] == iterations
    assert (solver.WARMUP_METHOD, solver.LR_SCHEDULER_NAME) == ("linear", "WarmupMultiStepLR")
    assert (solver.GAMMA, solver.MOMENTUM, solver.NESTEROV) == (0.1, 0.9, False)
    assert (cfg.INSTSEG.OPTIMIZER, cfg.INSTSEG.CLIP_GRAD_NORM) == ("sgd", 35.0)
    assert not solver.CLIP_GRADIENTS.ENABLED

    assert list(expected.size) == cfg.INSTSEG.STRETCH
    assert list(expected.heights) == cfg.INSTSEG.STRETCH_HEIGHTS
    assert (given.MIN_SIZE_TRAIN, given.MIN_SIZE_TEST) == ((0,), 0)
    assert (given.MASK_FORMAT, given.RANDOM_FLIP) == ("bitmask", "horizontal")
    if expected.backbone == "X-101":
        assert given.FORMAT == "RGB"
        assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
        assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
        assert "resnext101_64x4d" in cfg.MODEL.WEIGHTS
    else:
        assert given.FORMAT == "BGR"
        assert cfg.MODEL.PIXEL_MEAN == [102.9801, 115.9465, 122.7717]
        assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
        assert cfg.MODEL.WEIGHTS.endswith(f"MSRA/{expected.backbone}.pkl")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS


def test_settings_that_every_published_model_shares():
    nodes = [PROJECT.config(name).MODEL.POLARMASK for name in PUBLISHED]
    node = nodes[0]
    assert (node.NUM_RAYS, node.RAY_ORIGIN, node.RAY_TARGET) == (36, "down", "bins")
    assert (node.SIZE_RANGES, node.CENTER, node.CENTER_RADIUS) == ([64, 128, 256, 512], "mass", 1.5)
    assert (node.CENTERNESS, node.CENTERNESS_BIAS, node.MASK_LOSS) == ("polar", 0.5, "polar_iou")
    assert (node.WITH_BOX, node.WITH_MASK, node.NMS_ON) == (True, True, "box")
    assert (node.MIN_AREA, node.MIN_SIZE) == (15, 10)
    assert (node.SCORE_THRESH, node.NMS_PRE, node.NMS_THRESH) == (0.05, 1000, 0.5)
    assert (node.NUM_CONVS, node.WIDTH, node.NORM, node.PRIOR_PROB) == (4, 256, "GN", 0.01)
    weights = [value for key, value in node.items() if key.startswith("LOSS_WEIGHT_")]
    assert weights == [1.0] * 4
    for other in nodes:
        other.DEFORM = node.DEFORM
    assert all(other == node for other in nodes)


@pytest.mark.parametrize("name", ["polarmask_R_50_768_1x", "polarmask_R_50_DCN_2x"])
def test_groups_of_the_optimiser(name):
    """Biases learn twice as fast and do not decay; those of norms do only in deformable towers."""
    cfg = PROJECT.config(name)
    rate, plain_bias = effective_rate(cfg), (2 * effective_rate(cfg), 0.0)
    found = groups_of(cfg, build(cfg))
    norm_biases = {name for name in found if name.endswith("norm.bias")}
    assert len(norm_biases) == 12
    for name, settings in found.items():
        if name in norm_biases and not PUBLISHED[cfg.INSTSEG.CONFIG.partition("/")[2]].deform:
            assert settings == (rate, 1e-4), name
        elif name.endswith("bias"):
            assert settings == plain_bias, name
        else:
            assert settings == (rate, 1e-4), name


@pytest.mark.parametrize(
    ("name", "iteration", "rate"),
    [
        ("polarmask_R_50_768_1x", 0, 0.01 / 3),
        ("polarmask_R_50_768_1x", 250, 0.02 / 3),
        ("polarmask_R_50_768_1x", 500, 0.01),
        ("polarmask_R_50_768_1x", 58633, 0.001),
        ("polarmask_R_50_768_1x", 80620, 0.0001),
        ("polarmask_R_50_768_1x_32gpu", 0, 0.01 / 3),
        ("polarmask_R_50_768_1x_32gpu", 2000, 0.08),
        (FCOS, 499, 0.01 / 3),
        (FCOS, 500, 0.01),
    ],
)
def test_learning_rate(name, iteration, rate):
    cfg = PROJECT.config(name)
    scheduler = build_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1, bias=False)))
    scheduler.last_epoch = iteration
    assert scheduler.get_lr() == pytest.approx([rate])


def test_fcos_is_the_same_model_without_rays():
    cfg = PROJECT.config(FCOS)
    model = build(cfg)
    node, solver = cfg.MODEL.POLARMASK, cfg.SOLVER
    assert count(model.head) == FCOS_HEAD
    assert count(model.backbone) == TRUNKS["R-50"] + PYRAMID
    assert (node.WITH_MASK, node.CENTER, node.CENTERNESS) == (False, "none", "fcos")
    assert (node.CENTERNESS_BIAS, node.MIN_AREA, node.MIN_SIZE) == (0.0, 0, 1)
    assert (solver.IMS_PER_BATCH, effective_rate(cfg), solver.WARMUP_ITERS) == (16, 0.01, 500)
    assert (solver.STEPS, solver.MAX_ITER) == ((58633, 80620), 87950)
    assert cfg.INSTSEG.CLIP_GRAD_NORM == 0.0
    assert model.stretch_size == (0, 0)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ((800,), 1333)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert model.backbone.size_divisibility == 32


def test_nuclei_config_keeps_the_protocol():
    assert_nuclei_protocol(PROJECT.config("nuclei_polarmask_R_18_FPN"))
