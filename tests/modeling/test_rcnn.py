"""The two-stage model against detectron2's own."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances, ROIMasks
from pycocotools import mask as coco_mask

import instseg_ext
from instseg_ext.modeling import rcnn as module
from instseg_ext.modeling.features import check_features
from instseg_ext.modeling.rcnn import InstSegRCNN, paste_instances
from instseg_ext.structures.matched_masks import MatchedBitMasks


def config(ours=True, **instseg):
    """Mask R-CNN of an R-50 of an eighth of the width."""
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
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
    model.ROI_HEADS.NAME = "InstSegROIHeads" if ours else "StandardROIHeads"
    model.ROI_HEADS.NUM_CLASSES, model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 3, 32
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model.ROI_BOX_HEAD.NAME, model.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    model.ROI_BOX_HEAD.FC_DIM, model.ROI_BOX_HEAD.POOLER_RESOLUTION = 16, 7
    model.ROI_MASK_HEAD.NAME, model.ROI_MASK_HEAD.NUM_CONV = "MaskRCNNConvUpsampleHead", 1
    model.ROI_MASK_HEAD.CONV_DIM, model.ROI_MASK_HEAD.POOLER_RESOLUTION = 16, 14
    cfg.TEST.DETECTIONS_PER_IMAGE = 12
    for key, value in instseg.items():
        setattr(cfg.INSTSEG, key, value)
    return cfg


def ground_truth(height, width, seed):
    """Three rectangles; none for seed 9."""
    gen = torch.Generator().manual_seed(seed)
    num = 0 if seed == 9 else 3
    corner = torch.rand(num, 2, generator=gen) * torch.tensor([width / 2, height / 2])
    side = torch.rand(num, 2, generator=gen) * torch.tensor([width / 3, height / 3]) + 8
    xyxy = torch.cat([corner, corner + side], dim=1).floor()
    y, x = torch.arange(height)[None, :, None], torch.arange(width)[None, None]
    x0, y0, x1, y1 = xyxy[:, :, None, None].unbind(1)
    masks = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    result = Instances((height, width))
    result.gt_boxes, result.gt_masks = Boxes(xyxy), BitMasks(masks)
    result.gt_classes = torch.arange(num) % 3
    return result


def batch(sizes=((64, 80), (72, 64)), seeds=(1, 2)):
    gen = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, *size), generator=gen, dtype=torch.uint8),
            "instances": ground_truth(*size, seed),
            "height": size[0] * 2 - 3,
            "width": size[1] * 2 + 5,
        }
        for size, seed in zip(sizes, seeds, strict=True)
    ]


def pair(**instseg):
    """Our model and detectron2's with the same weights."""
    torch.manual_seed(0)
    ours, theirs = build_model(config(**instseg)), build_model(config(ours=False))
    # spread the scores, or every detection would be a tie
    torch.nn.init.normal_(ours.roi_heads.box_predictor.cls_score.weight, std=0.2)
    torch.nn.init.normal_(ours.roi_heads.mask_head.predictor.weight, std=0.5)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_state_dict_keys_are_generalized_rcnns():
    ours, theirs = pair()
    assert isinstance(ours, InstSegRCNN)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_detections_equal_detectron2(memory_format):
    ours, theirs = pair(MEMORY_FORMAT=memory_format)
    inputs = batch()
    with torch.no_grad():
        results, expected = ours.eval()(inputs), theirs.eval()(inputs)
    assert sum(len(r["instances"]) for r in results) > 5
    for a, b in zip(results, expected, strict=True):
        a, b = a["instances"], b["instances"]
        assert a.image_size == b.image_size
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert torch.allclose(a.scores, b.scores, atol=1e-5)
        assert torch.allclose(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=1e-2)
        different = (a.pred_masks != b.pred_masks).float().mean()
        assert float(different) <= (0 if memory_format == "contiguous" else 1e-4)
        assert b.pred_masks.any()


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_losses_and_gradients_equal_detectron2(memory_format):
    ours, theirs = pair(MEMORY_FORMAT=memory_format)
    torch.manual_seed(3)
    losses = ours(batch())
    torch.manual_seed(3)
    expected = theirs(batch())
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-4)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None, name
        assert float((p.grad - q.grad).abs().max()) <= 1e-4 * float(q.grad.abs().max()), name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ROI_HEADS.NUM_CLASSES", 0, r"MODEL\.ROI_HEADS\.NUM_CLASSES must be positive, not 0"),
        ("ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0), r"BBOX_REG_WEIGHTS must be four positive"),
        ("ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 0.0, 1.0), r"must be four positive numbers"),
        ("ROI_HEADS.IN_FEATURES", ["p2", "p9"], "names 'p9'; the backbone has p2, p3, p4, p5, p6"),
        ("ROI_HEADS.IN_FEATURES", [], "IN_FEATURES is empty; the backbone has p2, p3, p4, p5, p6"),
    ],
)
def test_what_no_model_can_be_trained_with_is_named(key, value, message):
    cfg = config()
    node, _, name = key.partition(".")
    cfg.MODEL[node][name] = value
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_maps_that_the_same_layers_read_have_as_many_channels():
    shapes = {"res4": ShapeSpec(channels=8), "res5": ShapeSpec(channels=16)}
    assert check_features("KEY", ["res5"], shapes) == 16
    with pytest.raises(ValueError, match=r"KEY .* those of res4, res5 are 8, 16\."):
        check_features("KEY", ["res4", "res5"], shapes)


@pytest.mark.parametrize("training", [True, False])
def test_proposals_that_nobody_makes_are_asked_for(training):
    cfg = config()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    model = build_model(cfg).train(training)
    with pytest.raises(ValueError, match=r"no proposals, and .* set MODEL\.LOAD_PROPOSALS True"):
        model(batch())


@pytest.mark.parametrize("seeds", [(9, 9), (1, 9)], ids=["none", "half"])
def test_images_without_ground_truth_train(seeds):
    model = build_model(config())
    losses = model(batch(seeds=seeds))
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_bf16_on_the_cpu():
    model = build_model(config(PRECISION="bf16"))
    losses = model(batch())
    assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        result = model.eval()(batch())[0]["instances"]
    assert result.scores.dtype == torch.float32
    assert result.pred_boxes.tensor.dtype == torch.float32
    assert result.pred_masks.dtype == torch.bool


@pytest.mark.parametrize("output", ["bool", "rle"])
def test_no_detections(output):
    cfg = config(MASK_OUTPUT=output)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 1.0
    result = build_model(cfg).eval()(batch())[0]["instances"]
    assert len(result) == 0
    assert result.pred_boxes.tensor.shape == (0, 4)
    assert result.pred_classes.dtype == torch.int64
    if output == "bool":
        assert result.pred_masks.shape == (0, 125, 165)
        assert result.pred_masks.dtype == torch.bool
    else:
        assert result.pred_masks_rle == []


def test_rle_equals_bool():
    ours, _ = pair()
    ours.eval()
    assert len(ours(batch())[0]["instances"]) > 2
    with torch.no_grad():
        masks = ours(batch())[0]["instances"].pred_masks
        ours.mask_output = "rle"
        rles = ours(batch())[0]["instances"].pred_masks_rle
    decoded = [torch.from_numpy(coco_mask.decode(r)).bool() for r in rles]
    assert torch.equal(torch.stack(decoded), masks)


def test_stretch_equals_a_stretched_image():
    model = build_model(config(STRETCH=[64, 96]))
    plain = build_model(config())
    plain.load_state_dict(model.state_dict())
    item = batch()[0]
    stretched = {**item, "image": module.stretch(item["image"], (64, 96))}
    a, b = model.preprocess_image([item]), plain.preprocess_image([stretched])
    assert torch.equal(a.tensor, b.tensor)
    assert a.image_sizes == [(64, 96)]


def test_copies_and_other_poolers():
    cfg = config()
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIWarp"
    cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIPool"
    model = copy.deepcopy(build_model(cfg))
    sum(model(batch()).values()).backward()
    assert "ROIWarp" in repr(model.roi_heads.box_pooler)
    assert "RoIPool" in repr(model.roi_heads.mask_pooler)


def test_the_box_head_needs_a_pooler():
    cfg = config()
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = ""
    with pytest.raises(ValueError, match=r"MODEL\.ROI_BOX_HEAD\.POOLER_TYPE must name a pooler"):
        build_model(cfg)


def detections(num, size, side=28):
    gen = torch.Generator().manual_seed(0)
    xy = torch.rand(num, 2, generator=gen) * torch.tensor([size[1], size[0]])
    wh = torch.rand(num, 2, generator=gen) * torch.tensor([size[1], size[0]]) / 2
    xyxy = torch.cat([xy - wh / 2, xy + wh / 2], dim=1)
    xyxy[0] = torch.tensor([size[1] + 5.0, 3, size[1] + 9, 8])  # clipped to nothing
    probs = torch.rand(num, 1, 4, 4, generator=gen)
    probs = torch.nn.functional.interpolate(probs, (side, side), mode="bicubic").clamp(0, 1)
    fields = {"pred_boxes": Boxes(xyxy), "pred_masks": probs, "scores": torch.rand(num)}
    return Instances(size, **fields, pred_keypoints=torch.rand(num, 2, 3) * 50)


@pytest.mark.parametrize("as_roi_masks", [False, True])
@pytest.mark.parametrize("budget_mb", [1e-3, 256])
def test_paste_equals_detectron2_and_changes_nothing(as_roi_masks, budget_mb):
    results = detections(8, (60, 90))
    if as_roi_masks:
        results.pred_masks = ROIMasks(results.pred_masks[:, 0])
    before = copy.deepcopy(results)
    pasted = paste_instances(results, (101, 133), budget_mb=budget_mb)
    assert torch.equal(results.pred_boxes.tensor, before.pred_boxes.tensor)
    assert torch.equal(results.pred_keypoints, before.pred_keypoints)
    expected = detector_postprocess(before, 101, 133)
    assert len(pasted) == 7
    assert torch.equal(pasted.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(pasted.pred_masks, expected.pred_masks)
    assert torch.equal(pasted.pred_keypoints, expected.pred_keypoints)
    assert torch.equal(pasted.scores, expected.scores)


def test_matched_masks_equal_copied_ones():
    truth = ground_truth(50, 60, 1).gt_masks
    index = torch.tensor([2, 0, 0, 1, 2])
    boxes = torch.tensor([[0.0, 0, 60, 50]]).repeat(5, 1) / torch.arange(1, 6)[:, None]
    shared = MatchedBitMasks(truth)[index]
    copied = BitMasks(truth.tensor[index])
    assert torch.equal(shared.crop_and_resize(boxes, 14), copied.crop_and_resize(boxes, 14))
    some = torch.tensor([True, False, True, False, True])
    kept = shared[some].to("cpu")
    assert len(kept) == 3
    assert torch.equal(kept.tensor, copied.tensor[some])
    assert kept.masks.data_ptr() == truth.tensor.data_ptr()
    assert torch.equal(kept.nonempty(), copied[some].nonempty())
    assert shared[:0].crop_and_resize(boxes[:0], 14).shape == (0, 14, 14)
    assert kept.image_size == (50, 60)
    with pytest.raises(ValueError, match="2 boxes for 3 masks"):
        kept.crop_and_resize(boxes[:2], 14)


def exhaustive(**instseg):
    """A model that drops no anchor and no region at random."""
    cfg = config(**instseg)
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 10000
    cfg.MODEL.RPN.POSITIVE_FRACTION = cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    torch.manual_seed(0)
    return build_model(cfg)


def test_global_normaliser_makes_the_mean_of_two_processes_the_whole(monkeypatch):
    sizes, seeds = ((64, 80), (64, 80)), (1, 9)
    whole = exhaustive()(batch(sizes, seeds))
    parts = [[item] for item in batch(sizes, seeds)]
    counts = []
    model = exhaustive(LOSS_NORMALIZER="global")
    real = model.roi_heads.loss_counts
    model.roi_heads.loss_counts = lambda x: counts.append(real(x)) or counts[-1]
    for part in parts:
        model(part)
    names = sorted(counts[0])
    means = {n: (counts[0][n] + counts[1][n]) / 2 for n in names}
    assert counts[0]["loss_mask"] > 0 == counts[1]["loss_mask"]

    results = []
    for part, own in zip(parts, [dict(c) for c in counts], strict=True):
        # each loss of a process asks for the mean of its own count
        by_value = {float(own[n]): means[n] for n in names}
        monkeypatch.setattr(
            module, "mean_over_processes", lambda v, t=by_value: torch.tensor(t[float(v)])
        )
        results.append(model(part))
    for name, value in whole.items():
        mean = (results[0][name] + results[1][name]) / 2
        assert float(mean) == pytest.approx(float(value), rel=1e-5), name


def test_global_normaliser_in_one_process_changes_nothing():
    local, everywhere = exhaustive()(batch()), exhaustive(LOSS_NORMALIZER="global")(batch())
    for name, value in local.items():
        assert float(value) == pytest.approx(float(everywhere[name]), rel=1e-6)
