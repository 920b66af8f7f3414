"""The published network and recipe, and the variants that are ours."""

from __future__ import annotations

import pytest
from methods.project import Project, build, count

import instseg_ext
from instseg_ext.engine.optim import effective_rate
from instseg_ext.methods.mnc.stages import FCTower, Res5Tower

PROJECT = Project("MNC")
VGG, VGG_3 = "mnc_VGG_16_sbd", "mnc_VGG_16_3stage_sbd"
C4, FPN = ("mnc_R_50_C4_1x", "mnc_R_101_C4_1x"), ("mnc_R_50_FPN_1x", "mnc_R_101_FPN_1x")
NUCLEI = "nuclei_mnc_R_18_FPN"


def test_no_model_is_forgotten():
    assert set(PROJECT.published) == {VGG, VGG_3, *C4, *FPN}
    assert NUCLEI in PROJECT.configs


def test_published_network():
    model = build(PROJECT.config(VGG))
    heads, rpn = model.roi_heads, model.proposal_generator
    assert count(model.backbone) == 14_714_688
    assert heads.mask_head.fc1.weight.shape == (256, 100352)
    assert heads.mask_head.predictor.out_features == 441
    for tower in (heads.box_tower, heads.mask_tower):
        assert tower.fc1.weight.shape == (4096, 25088)
        assert tower.fc2.weight.shape == (4096, 4096)
    shapes = [tuple(x.weight.shape) for x in (heads.cls_score, heads.seg_cls_score)]
    assert shapes == [(21, 8192), (21, 8192)]
    assert heads.bbox_pred.weight.shape == (84, 8192)
    assert rpn.rpn_head.objectness_logits.out_channels == 9
    pooler = heads.pooler.level_poolers[0]
    assert (pooler.samples, pooler.quantize, pooler.spatial_scale) == (2, True, 1 / 16)
    assert heads.second_pooler is heads.pooler
    frozen = {n.split(".")[1][:5] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "conv2"}
    assert (model.roi_heads.options.train_stages, model.roi_heads.options.num_stages) == (5, 5)


@pytest.mark.parametrize(("name", "stages"), [(VGG, 5), (VGG_3, 3)])
def test_published_recipe(name, stages):
    cfg = PROJECT.config(name)
    model, solver, given = cfg.MODEL, cfg.SOLVER, cfg.INPUT
    assert (*solver.STEPS, solver.MAX_ITER, solver.WARMUP_ITERS) == (20_000, 25_000, 0)
    assert (solver.IMS_PER_BATCH, effective_rate(cfg), solver.BIAS_LR_FACTOR) == (8, 0.001, 2.0)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_BIAS) == (0.0005, 0.0005)
    assert not solver.CLIP_GRADIENTS.ENABLED
    assert (given.MIN_SIZE_TRAIN, given.MAX_SIZE_TRAIN) == ((600,), 1000)
    assert (given.MIN_SIZE_TEST, given.MAX_SIZE_TEST, given.FORMAT) == (600, 1000, "BGR")
    assert model.PIXEL_MEAN == [102.9801, 115.9465, 122.7717]
    assert model.PIXEL_STD == [1.0, 1.0, 1.0]
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("sbd_sds_train",), ("sbd_sds_val",))
    rpn, heads, node = model.RPN, model.ROI_HEADS, model.MNC
    assert (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST) == (12_000, 6000)
    assert (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST, rpn.NMS_THRESH) == (300, 300, 0.7)
    assert (rpn.BATCH_SIZE_PER_IMAGE, rpn.POSITIVE_FRACTION, rpn.BOUNDARY_THRESH) == (256, 0.5, 0)
    assert rpn.IOU_THRESHOLDS == [0.3, 0.7]
    assert pytest.approx(1 / 9) == rpn.SMOOTH_L1_BETA
    assert (heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION) == (64, 0.3)
    assert model.ROI_BOX_HEAD.SMOOTH_L1_BETA == 1.0
    assert (node.BG_NEAR_FRACTION, node.BG_SPLIT_IOU, node.MIN_SIDE) == (0.85, 0.1, 16.0)
    assert (node.MASK_LOSS_WEIGHT, node.BOX_GRAD_CLIP) == (2.0, 1 / 512)
    assert stages == node.TRAIN_STAGES
    assert node.NUM_STAGES == 5


@pytest.mark.parametrize("name", C4)
def test_c4(name):
    model = build(PROJECT.config(name))
    heads = model.roi_heads
    for tower in (heads.box_tower, heads.mask_tower):
        assert isinstance(tower, Res5Tower)
        assert (len(tower.blocks), tower.out_dim) == (3, 2048)
    assert heads.cls_score.weight.shape == (81, 4096)
    assert heads.mask_head.fc1.in_features == 1024 * 14 * 14
    assert not heads.pooler.level_poolers[0].quantize


@pytest.mark.parametrize("name", FPN)
def test_fpn(name):
    model = build(PROJECT.config(name))
    heads = model.roi_heads
    assert heads.in_features == ["p2", "p3", "p4", "p5"]
    assert len(heads.pooler.level_poolers) == 4
    assert isinstance(heads.box_tower, FCTower)
    assert heads.mask_tower.fc1.weight.shape == (1024, 256 * 7 * 7)
    assert model.proposal_generator.in_features == ["p2", "p3", "p4", "p5", "p6"]


def test_nuclei_config_has_the_protocol_of_the_baseline():
    cfg = PROJECT.config(NUCLEI)
    baseline = instseg_ext.get_config("MaskRCNN/nuclei_mask_rcnn_R_18_FPN")
    for key in ("INPUT", "DATASETS", "TEST", "DATALOADER"):
        assert cfg[key] == baseline[key]
    assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == 960
    for key in ("BACKBONE", "RESNETS", "FPN", "WEIGHTS"):
        assert cfg.MODEL[key] == baseline.MODEL[key]
    node = cfg.MODEL.MNC
    assert (node.NUM_STAGES, node.TRAIN_STAGES) == (5, 5)
    assert node.BOX_GRAD
    assert node.MIX_INDEX
    assert node.VOTE
