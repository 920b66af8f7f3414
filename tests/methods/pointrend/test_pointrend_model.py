"""PointRend within Mask R-CNN, against detectron2's."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from methods.pointrend.pointrend_heads import CLASSES, oracle

import instseg_ext
from instseg_ext.checkpoint.checkpointer import InstSegCheckpointer
from instseg_ext.methods.pointrend import METHOD


def config(ours=True, **instseg):
    """PointRend on an R-50 of an eighth of the width."""
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    if "POINT_HEAD" not in cfg.MODEL:
        METHOD.add_config(cfg)
    model = cfg.MODEL
    model.DEVICE, model.MASK_ON, model.PIXEL_STD = "cpu", True, [58.0, 57.0, 57.0]
    model.META_ARCHITECTURE = "InstSegRCNN" if ours else "GeneralizedRCNN"
    model.BACKBONE.NAME, model.BACKBONE.FREEZE_AT = "build_resnet_fpn_backbone", 0
    nets = model.RESNETS
    nets.STEM_OUT_CHANNELS, nets.RES2_OUT_CHANNELS, nets.WIDTH_PER_GROUP = 8, 16, 8
    nets.OUT_FEATURES = model.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    model.FPN.OUT_CHANNELS = 16
    model.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
    model.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    model.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    model.RPN.PRE_NMS_TOPK_TRAIN = model.RPN.PRE_NMS_TOPK_TEST = 60
    model.RPN.POST_NMS_TOPK_TRAIN = model.RPN.POST_NMS_TOPK_TEST = 30
    model.ROI_HEADS.NAME = "PointRendHeads" if ours else "PointRendROIHeads"
    model.ROI_HEADS.NUM_CLASSES = model.POINT_HEAD.NUM_CLASSES = CLASSES
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE, model.ROI_HEADS.SCORE_THRESH_TEST = 32, 0.0
    model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    model.ROI_BOX_HEAD.FC_DIM, model.ROI_BOX_HEAD.POOLER_RESOLUTION = 16, 7
    model.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    mask = model.ROI_MASK_HEAD
    mask.NAME = "PointRendHead" if ours else "PointRendMaskHead"
    mask.POOLER_TYPE, mask.POINT_HEAD_ON = "", True
    mask.CONV_DIM, mask.FC_DIM, mask.POOLER_RESOLUTION = 16, 32, 14
    model.POINT_HEAD.FC_DIM = 16
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.TEST.DETECTIONS_PER_IMAGE = 8
    for key, value in instseg.items():
        setattr(cfg.INSTSEG, key, value)
    return cfg


def batch():
    gen = torch.Generator().manual_seed(0)
    result = []
    for height, width in ((64, 80), (72, 64)):
        xyxy = torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 3.0, 60.0, 30.0]])
        y, x = torch.arange(height)[None, :, None], torch.arange(width)[None, None]
        x0, y0, x1, y1 = xyxy[:, :, None, None].unbind(1)
        truth = Instances((height, width))
        truth.gt_boxes, truth.gt_classes = Boxes(xyxy), torch.tensor([0, 3])
        truth.gt_masks = BitMasks((x >= x0) & (x < x1) & (y >= y0) & (y < y1) & ((x + y) % 7 > 0))
        image = torch.randint(0, 256, (3, height, width), generator=gen, dtype=torch.uint8)
        result.append(
            {"image": image, "instances": truth, "height": 2 * height - 3, "width": width + 9}
        )
    return result


def spread_model(model):
    """Give the heads weights with which detections differ."""
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.2)
    for parameter in model.roi_heads.mask_head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def models():
    oracle()
    torch.manual_seed(0)
    ours, theirs = spread_model(build_model(config())), build_model(config(ours=False))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_detections_equal_detectron2(models):
    ours, theirs = models
    with torch.no_grad():
        results, expected = ours.eval()(batch()), theirs.eval()(batch())
    for a, b in zip(results, expected, strict=True):
        a, b = a["instances"], b["instances"]
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert torch.allclose(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-2)
        assert 0 < b.pred_masks.float().mean() < 1
        assert float((a.pred_masks != b.pred_masks).float().mean()) <= 1e-4


def test_losses_equal_detectron2(models):
    ours, theirs = models
    torch.manual_seed(3)
    losses = ours.train()(batch())
    torch.manual_seed(3)
    expected = theirs.train()(batch())
    assert losses.keys() == expected.keys()
    assert losses["loss_mask_point"] > 0
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4)


@pytest.mark.parametrize("before", ["official", "moved", "renamed", "both"])
def test_names_of_every_time_load(models, before, tmp_path):
    _, theirs = models
    weights = theirs.state_dict()

    def old(name):
        if before in ("moved", "both"):
            name = name.replace("mask_head.coarse_head.", "mask_coarse_head.")
            name = name.replace("mask_head.point_head.", "mask_point_head.")
        if before in ("renamed", "both"):
            name = name.replace("coarse_head.fc", "coarse_head.coarse_mask_fc")
        return name

    fresh = build_model(config())
    result = fresh.load_state_dict({old(name): value for name, value in weights.items()})
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(value, weights[name]) for name, value in fresh.state_dict().items())

    # detectron2's config file with one line changed has its ROI heads
    cfg = config()
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    fresh = build_model(cfg)
    torch.save({"model": {old(name): value for name, value in weights.items()}}, tmp_path / "m.pth")
    InstSegCheckpointer(fresh).load(str(tmp_path / "m.pth"))
    assert all(torch.equal(value, weights[name]) for name, value in fresh.state_dict().items())


def test_detectron2s_keys_may_be_added_after_ours():
    cfg = config()
    oracle().add_pointrend_config(cfg)
    cfg.MODEL.POINT_HEAD.NUM_CLASSES, cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = CLASSES, True
    assert build_model(cfg).roi_heads.mask_head.train_points.strategy == "importance"


def test_normaliser_counts_regions_for_all_mask_losses(models):
    ours, _ = models
    sampled = Instances((64, 80), gt_classes=torch.tensor([0, 3, CLASSES, CLASSES]))
    counts = ours.roi_heads.loss_counts([sampled])
    regions = {"loss_cls": 4, "loss_box_reg": 4}
    assert counts == {**regions, "loss_mask": 2, "loss_mask_point": 2, "loss_l2": 2}


def test_bfloat16_makes_masks(models):
    ours, _ = models
    half = build_model(config(PRECISION="bf16")).eval()
    half.load_state_dict(ours.state_dict())
    with torch.no_grad():
        result = half(batch())[0]["instances"]
    assert result.pred_masks.any()


def test_empty_images_train():
    model = build_model(config())
    inputs = batch()
    for item in inputs:
        item["instances"] = item["instances"][:0]
    losses = model(inputs)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
