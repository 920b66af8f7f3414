"""The published configs: the authors' architectures, parameter counts and recipes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from methods.project import Project, assert_nuclei_protocol, build, count

PROJECT = Project("SOLO")

STANDARD = [[1, 96], [48, 192], [96, 384], [192, 768], [384, 2048]]
LIGHT_512 = [[1, 64], [32, 128], [64, 256], [128, 512], [256, 2048]]
LIGHT_448 = [[1, 56], [28, 112], [56, 224], [112, 448], [224, 896]]

# (short sides in training, long side, short side in testing)
ONE_SCALE = ((800,), 1333, 800)
MULTI_SCALE = ((640, 672, 704, 736, 768, 800), 1333, 800)
SMALL_512 = ((352, 384, 416, 448, 480, 512), 852, 512)
SMALL_448 = ((352, 384, 416, 448, 480, 512), 768, 448)

# Offset convolutions: 18 outputs for version 1, 27 for version 2 (3 for a 1x1 convolution), biased.
LAST_V1 = 2 * 18 * (9 * 256 + 1)
TOWERS_V2 = 27 * (9 * (256 + 258 + 6 * 512) + 8)
MASK_FEATURES_V2 = 27 * (9 * (3 * 256 + 258 + 3 * 128) + 7) + 3 * (128 + 1)


@dataclass(frozen=True)
class Model:
    """What a published model is.

    Attributes:
        head: parameters of the head without mask features.
        mask_features: parameters of the mask features, 0 without them.
        sizes: image sizes.
        ranges: scale ranges.
        depth: of the ResNet.
        deform: ``(modulated, of all convolutions)`` or None.
        groups: of the ResNet's 3x3 convolutions.
    """

    head: int
    mask_features: int = 0
    sizes: tuple = MULTI_SCALE
    ranges: tuple = tuple(STANDARD)
    depth: int = 50
    deform: tuple | None = None
    groups: int = 1


V1, DECOUPLED, LIGHT = 9_448_816, 13_176_144, 5_501_776
V2, LIGHT_V2 = (18_081_104, 1_659_392), (2_845_392, 1_642_752)
# A third 3x3 convolution in both towers, with its normalisation.
V2_512 = (LIGHT_V2[0] + 2 * (9 * 256 * 256 + 2 * 256) + LAST_V1, LIGHT_V2[1])
V2_DCN = (V2[0] + TOWERS_V2, V2[1] + MASK_FEATURES_V2)

AUTHORS = {
    "solo_R_50_FPN_1x": Model(V1, sizes=ONE_SCALE),
    "solo_R_50_FPN_3x": Model(V1),
    "solo_R_101_FPN_3x": Model(V1, depth=101),
    "decoupled_solo_R_50_FPN_1x": Model(DECOUPLED, sizes=ONE_SCALE),
    "decoupled_solo_R_50_FPN_3x": Model(DECOUPLED),
    "decoupled_solo_R_101_FPN_3x": Model(DECOUPLED, depth=101),
    "decoupled_solo_light_R_50_FPN_3x": Model(LIGHT, 0, SMALL_512, LIGHT_512),
    "decoupled_solo_light_dcn_R_50_FPN_3x": Model(
        LIGHT + LAST_V1, 0, SMALL_512, LIGHT_512, deform=(False, False)
    ),
    "solov2_R_50_FPN_1x": Model(*V2, ONE_SCALE),
    "solov2_R_50_FPN_3x": Model(*V2),
    "solov2_R_101_FPN_3x": Model(*V2, depth=101),
    "solov2_R_101_DCN_FPN_3x": Model(*V2_DCN, depth=101, deform=(True, True)),
    "solov2_X_101_DCN_FPN_3x": Model(*V2_DCN, depth=101, deform=(True, True), groups=64),
    "solov2_light_448_R_18_FPN_3x": Model(*LIGHT_V2, SMALL_448, LIGHT_448, depth=18),
    "solov2_light_448_R_34_FPN_3x": Model(*LIGHT_V2, SMALL_448, LIGHT_448, depth=34),
    "solov2_light_448_R_50_FPN_3x": Model(*LIGHT_V2, SMALL_448, LIGHT_448),
    "solov2_light_512_dcn_R_50_FPN_3x": Model(*V2_512, SMALL_512, LIGHT_512, deform=(False, False)),
}
ADELAIDET = {
    "solov2_adelaidet_R_50_FPN_3x": Model(*V2),
    "solov2_adelaidet_R_101_FPN_3x": Model(*V2, depth=101),
}
UNPUBLISHED = {"solov2_R_18_FPN_1x", "solov2_R_34_FPN_1x"}
BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}
NUCLEI = ("solov2", "solo", "decoupled_solo", "decoupled_solo_light")


def test_no_published_model_is_forgotten():
    nuclei = {f"nuclei_{variant}_R_18_FPN" for variant in NUCLEI}
    assert set(PROJECT.configs) == {*AUTHORS, *ADELAIDET, *UNPUBLISHED, *nuclei}


@pytest.mark.parametrize("name", [*AUTHORS, *ADELAIDET])
def test_architecture(name):
    expected = {**AUTHORS, **ADELAIDET}[name]
    cfg = PROJECT.config(name)
    model = build(cfg)
    features = getattr(model.head, "mask_features", torch.nn.Identity())
    assert count(features) == expected.mask_features
    assert count(model.head) - count(features) == expected.head
    assert model.num_classes == 80
    assert model.grid.num_grids == (40, 36, 24, 16, 12)
    assert model.grid.strides == (8, 8, 16, 32, 32)
    assert [list(r) for r in model.grid.scale_ranges] == list(expected.ranges)
    assert model.grid.center_radius == 0.2

    resnet = model.backbone.bottom_up
    stages = [resnet.res2, resnet.res3, resnet.res4, resnet.res5]
    assert [len(stage) for stage in stages] == BLOCKS[expected.depth]
    assert stages[1][0].conv2.weight.shape[1] == (8 if expected.groups == 64 else 128)
    deformable = {key.rpartition(".")[0] for key in model.state_dict() if "offset.weight" in key}
    in_backbone = {key for key in deformable if key.startswith("backbone.")}
    assert len(in_backbone) == (sum(BLOCKS[expected.depth][1:]) if expected.deform else 0)
    assert not any(".res2." in key for key in in_backbone)
    if expected.deform:
        outputs = {model.state_dict()[f"{key}.weight"].shape[0] for key in in_backbone}
        assert outputs == {27 if expected.deform[0] else 18}
    in_head = len(deformable) - len(in_backbone)
    assert in_head == {None: 0, (False, False): 2, (True, True): 8 + 8}[expected.deform]


@pytest.mark.parametrize("name", AUTHORS)
def test_recipe_of_the_authors(name):
    cfg = PROJECT.config(name)
    model = AUTHORS[name]
    solver, given = cfg.SOLVER, cfg.INPUT
    if name.endswith("1x"):
        assert (solver.MAX_ITER, solver.STEPS) == (88000, (66000, 80600))
    else:
        assert (solver.MAX_ITER, solver.STEPS) == (264000, (197900, 241900))
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MOMENTUM) == (16, 0.01, 0.9)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (1e-4, 1e-4)
    assert solver.WEIGHT_DECAY_BIAS in (None, 1e-4)
    assert solver.WARMUP_ITERS == 500
    assert pytest.approx(0.01 if name.startswith("solov2") else 1 / 3) == solver.WARMUP_FACTOR
    assert solver.WARMUP_METHOD == "linear"
    assert solver.GAMMA == 0.1
    assert cfg.INSTSEG.CLIP_GRAD_NORM == 35.0
    assert not solver.CLIP_GRADIENTS.ENABLED
    assert model.sizes == (given.MIN_SIZE_TRAIN, given.MAX_SIZE_TRAIN, given.MIN_SIZE_TEST)
    assert given.MAX_SIZE_TEST == given.MAX_SIZE_TRAIN
    assert (given.FORMAT, given.MASK_FORMAT, given.RANDOM_FLIP) == ("RGB", "bitmask", "horizontal")
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert not cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN"
    assert "torchvision" in cfg.MODEL.WEIGHTS
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100


@pytest.mark.parametrize("name", ADELAIDET)
def test_recipe_of_adelaidet(name):
    cfg = PROJECT.config(name)
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.STEPS) == (270000, (210000, 250000))
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY_NORM) == (16, 0.01, 0.0)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (1000, 0.01)
    assert cfg.INSTSEG.CLIP_GRAD_NORM == 0
    assert cfg.INPUT.FORMAT == "BGR"
    assert MULTI_SCALE[0] == cfg.INPUT.MIN_SIZE_TRAIN
    assert cfg.MODEL.PIXEL_MEAN == [103.53, 116.28, 123.675]
    assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert "MSRA" in cfg.MODEL.WEIGHTS


def test_inference_settings_are_those_of_every_published_model():
    node = PROJECT.config("solo_R_50_FPN_1x").MODEL.SOLO
    assert (node.SCORE_THRESH, node.MASK_THRESH, node.UPDATE_THRESH) == (0.1, 0.5, 0.05)
    assert (node.NMS_PRE, node.NMS_KERNEL, node.NMS_SIGMA) == (500, "gaussian", 2.0)
    assert (node.LOSS_WEIGHT_CLS, node.LOSS_WEIGHT_MASK) == (1.0, 3.0)
    assert (node.FOCAL_ALPHA, node.FOCAL_GAMMA, node.PRIOR_PROB) == (0.25, 2.0, 0.01)


def test_nuclei_configs_differ_in_head_and_levels_alone():
    configs = [PROJECT.config(f"nuclei_{variant}_R_18_FPN") for variant in NUCLEI]
    assert [cfg.MODEL.META_ARCHITECTURE for cfg in configs] == ["SOLOv2", "SOLO", "SOLO", "SOLO"]
    assert [cfg.MODEL.SOLO.HEAD for cfg in configs[1:]] == [
        "vanilla",
        "decoupled",
        "decoupled_light",
    ]
    for cfg in configs:
        assert_nuclei_protocol(cfg)
        cfg.MODEL.META_ARCHITECTURE = cfg.INSTSEG.CONFIG = ""
        del cfg.MODEL["SOLO"]
    assert all(cfg == configs[0] for cfg in configs)
