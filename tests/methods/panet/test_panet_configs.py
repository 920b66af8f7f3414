"""The published configs: the authors' architectures, parameter counts and recipe."""

from __future__ import annotations

import pytest
from detectron2.layers import FrozenBatchNorm2d
from methods.project import Project, build, count
from torch import nn

import instseg_ext
from instseg_ext.engine.optim import build_optimizer, build_scheduler, effective_rate

PROJECT = Project("PANet")
DET, DET_2FC, MASK = (f"panet_R_50_FPN_{kind}" for kind in ("1x_det", "1x_det_2fc", "2x_mask"))
# Parameters of the box heads; the mask head's without its predictor.
BOX_HEADS = {DET: 16_978_432, DET_2FC: 52_444_160, MASK: 16_978_432}
MASK_HEAD = 24_950_032
TRUNK, PYRAMID, PATH = 23_454_912, 3_346_432, 3_543_552
NUCLEI = "nuclei_panet_R_18_FPN"


def test_no_published_model_is_forgotten():
    assert set(PROJECT.published) == set(BOX_HEADS)
    assert NUCLEI in PROJECT.configs


@pytest.mark.parametrize("name", BOX_HEADS)
def test_architecture(name):
    model = build(PROJECT.config(name))
    trunk, heads = model.backbone.bottom_up, model.roi_heads
    assert count(trunk) == TRUNK
    assert count(model.backbone) == TRUNK + PYRAMID + PATH
    assert count(heads.box_head) == BOX_HEADS[name]
    assert heads.mask_on == (name == MASK)
    if heads.mask_on:
        assert count(heads.mask_head) - count(heads.mask_head.predictor) == MASK_HEAD
        assert heads.mask_head.predictor.out_channels == 80
    assert [s[0].conv1.stride[0] for s in (trunk.res2, trunk.res3, trunk.res5)] == [1, 2, 2]
    norms = {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}
    assert norms == {FrozenBatchNorm2d}
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


@pytest.mark.parametrize("name", BOX_HEADS)
def test_recipe(name):
    cfg = PROJECT.config(name)
    model, solver, given = cfg.MODEL, cfg.SOLVER, cfg.INPUT
    twice = 2 if name == MASK else 1
    assert (*solver.STEPS, solver.MAX_ITER) == (60_000 * twice, 80_000 * twice, 90_000 * twice)
    assert (solver.IMS_PER_BATCH, effective_rate(cfg)) == (16, 0.02)
    assert (solver.GAMMA, solver.MOMENTUM, solver.NESTEROV) == (0.1, 0.9, False)
    assert (solver.WARMUP_METHOD, solver.LR_SCHEDULER_NAME) == ("linear", "WarmupMultiStepLR")
    assert not solver.CLIP_GRADIENTS.ENABLED
    assert cfg.INSTSEG.CLIP_GRAD_NORM == 0.0

    assert given.MIN_SIZE_TRAIN == (1200, 1200, 1000, 800, 600, 400)
    assert (given.MIN_SIZE_TRAIN_SAMPLING, given.RANDOM_FLIP) == ("choice", "horizontal")
    assert (given.MAX_SIZE_TRAIN, given.MIN_SIZE_TEST, given.MAX_SIZE_TEST) == (1400, 1000, 1400)
    assert (given.FORMAT, model.PIXEL_STD) == ("BGR", [1.0, 1.0, 1.0])
    assert model.PIXEL_MEAN == [102.9801, 115.9465, 122.7717]
    assert model.WEIGHTS.endswith("MSRA/R-50.pkl")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
    assert cfg.DATASETS.TEST == ("coco_2017_val",)

    rpn, heads, box = model.RPN, model.ROI_HEADS, model.ROI_BOX_HEAD
    assert (rpn.BATCH_SIZE_PER_IMAGE, rpn.POSITIVE_FRACTION, rpn.BOUNDARY_THRESH) == (256, 0.5, 0)
    assert (rpn.IOU_THRESHOLDS, rpn.NMS_THRESH) == ([0.3, 0.7], 0.7)
    assert (rpn.PRE_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TRAIN) == (2000, 1000)
    assert (rpn.PRE_NMS_TOPK_TEST, rpn.POST_NMS_TOPK_TEST) == (1000, 1000)
    assert pytest.approx((1 / 9, 1 / 3)) == (rpn.SMOOTH_L1_BETA, box.SMOOTH_L1_BETA)
    assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION) == (512, 0.25)
    assert (heads.IOU_THRESHOLDS, heads.PROPOSAL_APPEND_GT) == ([0.5], True)
    assert (heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST) == (0.05, 0.5)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100
    for node, side in ((box, 7), (model.ROI_MASK_HEAD, 14)):
        assert (side, 2) == (node.POOLER_RESOLUTION, node.POOLER_SAMPLING_RATIO)
        assert node.POOLER_TYPE == "ROIAlignV2"


@pytest.mark.parametrize("name", [DET_2FC, MASK])
def test_acceptance_check_13_groups_of_the_optimiser(name):
    """Biases learn twice as fast; neither they nor norms decay."""
    cfg = PROJECT.config(name)
    model = build(cfg)
    norms = {
        f"{module_name}.weight"
        for module_name, module in model.named_modules()
        if isinstance(module, nn.GroupNorm)
    }
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(trained.values())
    assert len(norms) > 10
    for name_of, parameter in trained.items():
        if name_of.endswith("bias"):
            expected = (0.04, 0.0)
        else:
            expected = (0.02, 0.0 if name_of in norms else 1e-4)
        assert found[parameter] == expected, name_of


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [(0, 0.02 / 3), (250, 0.04 / 3), (500, 0.02), (120_000, 0.002), (160_000, 0.0002)],
)
def test_learning_rate(iteration, rate):
    cfg = PROJECT.config(MASK)
    scheduler = build_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1, bias=False)))
    scheduler.last_epoch = iteration
    assert scheduler.get_lr() == pytest.approx([rate])


def test_nuclei_config_is_the_baseline_with_the_parts_of_panet():
    cfg = PROJECT.config(NUCLEI)
    baseline = instseg_ext.get_config("MaskRCNN/nuclei_mask_rcnn_R_18_FPN")
    for key in ("SOLVER", "INPUT", "DATASETS", "TEST", "DATALOADER"):
        assert cfg[key] == baseline[key]
    changed = {
        "BACKBONE": {"NAME"},
        "ROI_HEADS": {"NAME"},
        "ROI_BOX_HEAD": {
            *("NAME", "NUM_CONV", "CONV_DIM", "NUM_FC", "NORM", "POOLER_SAMPLING_RATIO")
        },
        "ROI_MASK_HEAD": {"NAME", "NORM", "POOLER_SAMPLING_RATIO"},
    }
    for node, keys in changed.items():
        ours, theirs = cfg.MODEL[node], baseline.MODEL[node]
        assert {key for key in ours if ours[key] != theirs[key]} == keys
    assert cfg.MODEL.META_ARCHITECTURE == "PANetRCNN"
    differing = {k for k in cfg.MODEL if cfg.MODEL[k] != baseline.MODEL[k]}
    assert differing == {*changed, "META_ARCHITECTURE"}
    heads = build(cfg).roi_heads
    assert heads.mask_head.mask_size == (28, 28)
    assert len(heads.box_head.conv1) == len(heads.mask_head.conv1) == 4
