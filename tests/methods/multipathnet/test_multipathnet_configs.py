"""Published recipes, project choices, and what a config may not say."""

import re
import shlex

import pytest
from methods.project import Project, assert_nuclei_protocol, build

from instseg_ext.engine.optim import effective_rate

PROJECT = Project("MultiPathNet")
VGG, R_18, FPN = (
    "multipathnet_VGG_16_coco",
    "fast_rcnn_integral_R_18_coco",
    "multipathnet_R_50_FPN_1x",
)
NUCLEI, FROM_FILE = "nuclei_multipathnet_R_18_FPN", "nuclei_multipathnet_file_R_18_FPN"


def test_no_model_is_forgotten():
    assert set(PROJECT.published) == {VGG, R_18, FPN}


@pytest.mark.parametrize("name", [VGG, R_18])
def test_published_recipe(name):
    cfg = PROJECT.config(name)
    model, solver, given, node = cfg.MODEL, cfg.SOLVER, cfg.INPUT, cfg.MODEL.MULTIPATH
    assert (*solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS) == (280_000, 320_000, 0)
    assert (solver.IMS_PER_BATCH, effective_rate(cfg), solver.GAMMA) == (4, 0.001, 0.1)
    assert (solver.WEIGHT_DECAY, solver.MOMENTUM) == (0.0, 0.9)
    assert (given.MIN_SIZE_TRAIN, given.MAX_SIZE_TRAIN) == ((800,), 1000)
    assert (given.MIN_SIZE_TEST, given.MAX_SIZE_TEST) == (800, 1000)
    heads, data = model.ROI_HEADS, cfg.DATASETS
    assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION) == (64, 0.25)
    assert (heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST) == (0.0, 0.3)
    assert (data.PRECOMPUTED_PROPOSAL_TOPK_TRAIN, data.PRECOMPUTED_PROPOSAL_TOPK_TEST) == (
        1000, 400
    )  # fmt: skip
    assert (model.LOAD_PROPOSALS, cfg.INSTSEG.PROPOSAL_MASKS, node.MASK_SOURCE) == (
        True, True, "proposal"
    )  # fmt: skip
    assert node.IOU_THRESHOLDS == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    assert (node.BG_IOU_MIN, node.CROWD_OVERLAP) == (0.1, 0.7)
    assert (model.ROI_BOX_HEAD.POOLER_TYPE, model.ROI_BOX_HEAD.SMOOTH_L1_BETA) == ("ROIPoolV2", 1.0)


def test_published_network():
    cfg = PROJECT.config(VGG)
    node = cfg.MODEL.MULTIPATH
    assert (node.SCALES, node.MAPS) == ([1.0, 1.5, 2.0, 4.0], [3, 2, 2, 1])
    assert (node.HET, node.HET_SCALE, node.HET_MAPS) == (True, 1.5, 3)
    assert (node.SKIP_NORM, node.L2_SCALE, node.MIX_DIM, node.DROPOUT) == ("l2", 1000.0, 512, 0.5)
    assert not node.SHARE_TOWERS
    assert cfg.MODEL.PIXEL_MEAN == [102.9801, 115.9465, 122.7717]
    assert (cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT) == ([1.0, 1.0, 1.0], "BGR")
    model = build(cfg)
    assert model.proposal_generator is None
    assert not any(p.requires_grad for p in model.backbone.parameters())
    # 0-based boxes at strides 16, 8 and 4
    scales = [x.level_poolers[0].spatial_scale for x in model.roi_heads.box_pooler.poolers]
    assert scales == [1 / 16, 1 / 8, 1 / 4]


def test_released_model():
    cfg = PROJECT.config(R_18)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.578, 116.341, 103.500]
    assert cfg.MODEL.PIXEL_STD == [58.368, 57.239, 57.364]
    model = build(cfg)
    trained = {n.split(".")[0] for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4"}
    frozen = {n.split(".")[0] for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


@pytest.mark.parametrize(("name", "feature"), [(VGG, "conv5"), (R_18, "res4")])
def test_published_networks_with_an_rpn(name, feature):
    """With the options that the page gives."""
    (line,) = re.findall("^MODEL.PROPOSAL_GENERATOR.NAME RPN .*$", PROJECT.text, re.MULTILINE)
    model = build(PROJECT.config(name, *shlex.split(line.replace("MAP", feature))))
    assert model.proposal_generator.in_features == [feature]
    assert not model.proposal_masks


def test_laptop_size():
    heads = build(PROJECT.config(FPN)).roi_heads
    assert heads.box_head.shared.fc6.weight.shape == (1024, 256 * 49)
    assert heads.mask_head is not None
    assert [tower.mix.in_channels for tower in heads.box_head.towers] == [768, 512, 512, 256, 768]


def test_nuclei_config_has_the_whole_method():
    cfg = PROJECT.config(NUCLEI)
    assert_nuclei_protocol(cfg)
    node = cfg.MODEL.MULTIPATH
    assert (node.SCALES, node.MAPS, node.HET) == ([1.0, 1.5, 2.0, 4.0], [3, 2, 2, 1], True)
    assert (len(node.IOU_THRESHOLDS), node.INTEGRAL_MODE, node.SKIP_NORM) == (6, "joint", "l2")


def test_nuclei_config_of_a_file():
    cfg, same = PROJECT.config(FROM_FILE), PROJECT.config(NUCLEI)
    assert build(cfg).proposal_generator is None
    assert (cfg.MODEL.MULTIPATH.MASK_SOURCE, cfg.INSTSEG.PROPOSAL_MASKS) == ("proposal", True)
    for key in ("SOLVER", "INPUT", "TEST"):
        assert cfg[key] == same[key]


def test_parts_can_be_switched_off():
    """With the options that the page gives."""
    rows = PROJECT.rows("foveal crops|skip connections|the boxes' own tower|the integral loss")
    shapes = []
    for row in rows[-4:]:
        words = shlex.split(row[1].strip("`"))
        head = build(PROJECT.config(NUCLEI, *words)).roi_heads
        maps = [tower.mix.in_channels // 128 for tower in head.box_head.towers]
        shapes.append((maps, len(head.box_predictor.cls_score)))
    assert shapes == [([3, 3], 6), ([1, 1, 1, 1, 1], 6), ([3, 2, 2, 1], 6), ([3, 2, 2, 1, 3], 1)]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SKIP_NORM", "l1"], r"MULTIPATH\.SKIP_NORM must be one of l2, constant, none"),
        (["MAPS", [3, 2, 2]], r"MULTIPATH\.MAPS must have a number for each of the 4 SCALES"),
        (["MAPS", [4, 2, 2, 1]], r"from 1 to the 3 of IN_FEATURES"),
        (["HET_MAPS", 4], r"from 1 to the 3 of IN_FEATURES"),
        (["SCALES", [0.0, 1.5, 2.0, 4.0]], r"MULTIPATH\.SCALES must be positive"),
        (["IOU_THRESHOLDS", [0.7, 0.5]], r"MULTIPATH\.IOU_THRESHOLDS must rise"),
        (["IOU_THRESHOLDS", []], r"MULTIPATH\.IOU_THRESHOLDS must rise"),
        (["IN_FEATURES", ["p4", "p3", "conv3"]], r"MULTIPATH\.IN_FEATURES names 'conv3'"),
        (["TOWER", "res5"], r"TOWER res5 reads one map as it is"),
        (["MIX_DIM", 0], r"SHARE_TOWERS needs the same channels"),
        (["MASK_SOURCE", "none"], r"MASK_SOURCE none and MODEL\.MASK_ON True contradict"),
        (["TEST_NEXT_SCORES", True], r"TEST_NEXT_SCORES needs TEST_ROUNDS"),
        (["DROPOUT", 1.0], r"MULTIPATH\.DROPOUT must be in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(opts, message):
    key, value = opts
    with pytest.raises(ValueError, match=message):
        build(PROJECT.config(NUCLEI, f"MODEL.MULTIPATH.{key}", value))


def test_mistakes_outside_the_node_are_named():
    with pytest.raises(ValueError, match="set it to MultiPathROIHeads"):
        build(PROJECT.config(NUCLEI, "MODEL.ROI_HEADS.NAME", "InstSegROIHeads"))
    opts = ["MODEL.MASK_ON", False, "MODEL.MULTIPATH.MASK_SOURCE", "proposal"]
    with pytest.raises(ValueError, match=r"needs MODEL\.LOAD_PROPOSALS True"):
        build(PROJECT.config(NUCLEI, *opts))
    with pytest.raises(ValueError, match=r"KEYPOINT_ON must be False"):
        build(PROJECT.config(NUCLEI, "MODEL.KEYPOINT_ON", True))
