"""The published configs: the authors' architecture and recipe."""

import pytest
from methods.project import Project, build, count
from torch import nn

import instseg_ext
from instseg_ext.engine.optim import build_optimizer, build_scheduler, effective_rate

PROJECT = Project("FCIS")
COCO, COCO_50, SBD = "fcis_R_101_ohem_coco", "fcis_R_50_ohem_coco", "fcis_R_101_sbd"
NUCLEI = "nuclei_fcis_R_18"
# Stem and res2 to res5 with scales and shifts of the norms.
TRUNKS = {COCO: 42_500_160, SBD: 42_500_160, COCO_50: 23_508_032}


def test_no_published_model_is_forgotten():
    assert set(PROJECT.published) == set(TRUNKS)
    assert NUCLEI in PROJECT.configs


@pytest.mark.parametrize("name", TRUNKS)
def test_architecture(name):
    model = build(PROJECT.config(name))
    classes, anchors = (20, 9) if name == SBD else (80, 12)
    assert count(model.backbone) == TRUNKS[name]
    shapes = model.backbone.output_shape()
    assert {k: (v.channels, v.stride) for k, v in shapes.items()} == {
        "res4": (1024, 16),
        "res5": (2048, 16),
    }
    rpn, heads = model.proposal_generator, model.roi_heads
    assert count(rpn) == 1024 * 512 * 9 + 512 + 513 * 5 * anchors
    assert rpn.rpn_head.objectness_logits.out_channels == anchors
    assert (rpn.in_features, heads.in_feature) == (["res4"], "res5")
    assert heads.cls_seg.weight.shape == (98 * (classes + 1), 1024, 1, 1)
    assert heads.bbox.weight.shape == (196, 1024, 1, 1)
    assert heads.conv_new.weight.shape == (1024, 2048, 1, 1)
    assert heads.stride == 16
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}
    assert rpn.whole_cells
    assert rpn.normalizer == "mixed"


def test_anchors_are_the_published_ones():
    """Scale 4: inclusive (-38, -16, 53, 31) and so on, around the middle of a cell."""
    cells = build(PROJECT.config(COCO)).proposal_generator.anchor_generator
    assert cells.offset == 0.5
    [sizes] = PROJECT.config(COCO).MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == [64, 128, 256, 512]
    assert PROJECT.config(SBD).MODEL.ANCHOR_GENERATOR.SIZES == [[128, 256, 512]]


@pytest.mark.parametrize("name", TRUNKS)
def test_recipe(name):
    cfg = PROJECT.config(name)
    model, solver, given = cfg.MODEL, cfg.SOLVER, cfg.INPUT
    sbd = name == SBD
    assert (solver.IMS_PER_BATCH, effective_rate(cfg)) == ((4, 0.002) if sbd else (8, 0.004))
    epoch = 2 * 5623 / 4 if sbd else 2 * 117_266 / 8
    assert pytest.approx((22 if sbd else 8) * epoch, abs=1) == solver.MAX_ITER
    assert solver.STEPS[0] == pytest.approx((14 if sbd else 5.33) * epoch, abs=2)
    assert (solver.GAMMA, solver.MOMENTUM, solver.NESTEROV) == (0.1, 0.9, False)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (0.0005, 0.0005)
    assert solver.WEIGHT_DECAY_BIAS == 0.0
    assert cfg.INSTSEG.CLIP_GRAD_NORM == 0.0
    assert (given.MIN_SIZE_TRAIN, given.MAX_SIZE_TRAIN) == ((600,), 1000)
    assert (given.MIN_SIZE_TEST, given.MAX_SIZE_TEST) == (600, 1000)
    assert (given.FORMAT, model.PIXEL_STD) == ("BGR", [1.0, 1.0, 1.0])
    assert model.PIXEL_MEAN == [103.06, 115.90, 123.15]
    assert model.WEIGHTS.endswith(f"MSRA/R-{model.RESNETS.DEPTH}.pkl")
    expected = ("sbd_sds_train", "sbd_sds_val") if sbd else ("coco_2017_train", "coco_2017_val")
    assert (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) == expected

    rpn, node = model.RPN, model.FCIS
    assert (rpn.BATCH_SIZE_PER_IMAGE, rpn.POSITIVE_FRACTION, rpn.BOUNDARY_THRESH) == (256, 0.5, 0)
    assert (rpn.IOU_THRESHOLDS, rpn.NMS_THRESH) == ([0.3, 0.7], 0.7)
    assert (rpn.PRE_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TRAIN) == (6000, 300)
    assert (rpn.PRE_NMS_TOPK_TEST, rpn.POST_NMS_TOPK_TEST) == (6000, 300)
    assert pytest.approx(1 / 9) == rpn.SMOOTH_L1_BETA
    small = 16 if sbd else 2
    assert (small, small) == (model.PROPOSAL_GENERATOR.MIN_SIZE, node.MIN_DROP_SIZE)
    assert (not sbd, [0.1, 0.5] if sbd else [0.0, 0.5]) == (node.OHEM, node.BG_IOU)
    assert (node.OHEM_ROIS, node.NUM_ROIS, node.FG_FRACTION) == (128, 128, 0.25)
    assert model.ROI_HEADS.IOU_THRESHOLDS == [0.5]
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100


def test_weight_decay_of_norms_and_biases():
    """Scales decay as weights do, no bias does."""
    cfg = PROJECT.config(COCO_50)
    model = build(cfg)
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(trained.values())
    for name, parameter in trained.items():
        rate = 0.012 if name.startswith("roi_heads.conv_new") else 0.004
        decay = 0.0 if name.endswith("bias") else 0.0005
        assert found[parameter] == pytest.approx((rate, decay)), name


@pytest.mark.parametrize(
    ("name", "iteration", "rate"),
    [
        (COCO, 0, 0.0004), (COCO, 249, 0.0004), (COCO, 250, 0.004), (COCO, 156_256, 0.0004),
        (SBD, 0, 0.002), (SBD, 39_361, 0.0002),
    ],
)  # fmt: skip
def test_learning_rate(name, iteration, rate):
    cfg = PROJECT.config(name)
    scheduler = build_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1, bias=False)))
    scheduler.last_epoch = iteration
    assert scheduler.get_lr() == pytest.approx([rate])


def test_nuclei_config_has_the_budget_and_data_of_the_baseline():
    cfg = PROJECT.config(NUCLEI)
    baseline = instseg_ext.get_config("MaskRCNN/nuclei_mask_rcnn_R_18_FPN")
    for key in ("DATASETS", "TEST", "INPUT"):
        assert cfg[key] == baseline[key]
    assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == 960
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH) == ("", 18)
    assert count(build(cfg)) < 15e6
