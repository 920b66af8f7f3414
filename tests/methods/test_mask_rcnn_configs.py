"""The configs of the R-CNN family: detectron2's model zoo in this project's frame."""

from __future__ import annotations

import copy
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from methods.project import Project, build, count
from torch import nn

from instseg_ext.modeling.poolers import POOLER_KINDS

PROJECT = Project("MaskRCNN")
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
FOLDERS = {
    "faster_rcnn": "COCO-Detection",
    "mask_rcnn": "COCO-InstanceSegmentation",
    "keypoint_rcnn": "COCO-Keypoints",
}
# What stands for detectron2's classes and builders here.
OURS = {
    "GeneralizedRCNN": "InstSegRCNN",
    "StandardROIHeads": "InstSegROIHeads",
    "Res5ROIHeads": "InstSegRes5ROIHeads",
    "build_resnet_backbone": "build_instseg_resnet_backbone",
    "build_resnet_fpn_backbone": "build_instseg_resnet_fpn_backbone",
    # the mapper draws all masks
    "polygon": "bitmask",
}
# A sixteenth of the width.
NARROW = """MODEL.DEVICE cpu MODEL.WEIGHTS ""
MODEL.PIXEL_STD [58.0,57.0,57.0] MODEL.RESNETS.RES2_OUT_CHANNELS 16
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.BACKBONE.FREEZE_AT 0
MODEL.ROI_HEADS.NUM_CLASSES 3 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.RPN.PRE_NMS_TOPK_TRAIN 60
MODEL.RPN.POST_NMS_TOPK_TRAIN 30 MODEL.RPN.PRE_NMS_TOPK_TEST 60 MODEL.RPN.POST_NMS_TOPK_TEST 20
MODEL.ROI_MASK_HEAD.CONV_DIM 8 TEST.DETECTIONS_PER_IMAGE 8"""


# Data sets that a config's name ends with, to the zoo's folders.
DATA_FOLDERS = {
    "_cityscapes": "Cityscapes",
    "_lvis_v0.5": "LVISv0.5-InstanceSegmentation",
    "_lvis_v1": "LVISv1-InstanceSegmentation",
}
LVIS = [f"mask_rcnn_{n}_FPN_1x_lvis_" for n in ("R_50", "R_101", "X_101_32x8d")]


def zoo_file(name):
    folder = next(FOLDERS[kind] for kind in FOLDERS if name.startswith(kind))
    for ending, data_folder in DATA_FOLDERS.items():
        if name.endswith(ending):
            name, folder = name.removesuffix(ending), data_folder
    path = ZOO / folder / f"{name}.yaml"
    if not path.is_file():
        pytest.skip("this detectron2 ships no model zoo")
    return path


def leaves(node, prefix=""):
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_promised_models_are_there():
    expected = {f"mask_rcnn_R_50_{neck}_{s}" for neck in ("C4", "DC5", "FPN") for s in ("1x", "3x")}
    for kind in FOLDERS:
        expected |= {f"{kind}_R_50_FPN_1x", f"{kind}_R_50_FPN_3x", f"{kind}_R_101_FPN_3x"}
        expected.add(f"{kind}_X_101_32x8d_FPN_3x")
    expected |= {name + version for name in LVIS for version in ("v0.5", "v1")}
    expected.add("mask_rcnn_R_50_FPN_cityscapes")
    assert expected <= set(PROJECT.published)


@pytest.mark.parametrize("name", PROJECT.published)
def test_config_is_that_of_the_zoo(name):
    """All keys of detectron2 have the zoo's values, but for the names of classes and builders."""
    path = zoo_file(name)
    theirs = get_cfg()
    theirs.merge_from_file(str(path))
    ours = dict(leaves(PROJECT.config(name)))
    for key, value in leaves(theirs):
        if key != "MODEL.DEVICE":
            assert ours[key] == (OURS.get(value, value) if isinstance(value, str) else value), key


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("faster_rcnn_R_50_FPN_1x", 41.7),
        ("mask_rcnn_R_50_C4_1x", 35.9),
        ("mask_rcnn_R_50_DC5_1x", 172.4),
        ("mask_rcnn_R_50_FPN_1x", 44.3),
        ("mask_rcnn_R_101_FPN_3x", 63.3),
        ("mask_rcnn_X_101_32x8d_FPN_3x", 107.4),
        ("keypoint_rcnn_R_50_FPN_1x", 59.1),
        ("mask_rcnn_R_50_FPN_cityscapes", 44.0),
        ("mask_rcnn_R_50_FPN_1x_lvis_v0.5", 50.5),
        ("mask_rcnn_R_50_FPN_1x_lvis_v1", 50.4),
    ],
)
def test_state_dict_is_that_of_the_zoo(name, millions):
    """The zoo's files load: the same names and shapes."""
    model = build(PROJECT.config(name))
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.05)
    theirs = get_cfg()
    theirs.merge_from_file(str(zoo_file(name)))
    expected = build(theirs).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }


@pytest.mark.parametrize("neck", ["FPN", "C4", "DC5"])
@pytest.mark.parametrize("kind", POOLER_KINDS)
def test_pooler_comparison_is_one_line(neck, kind):
    """RoIPool, RoIWarp and both RoIAligns, as the page says."""
    line = f"MODEL.ROI_BOX_HEAD.POOLER_TYPE {kind} MODEL.ROI_MASK_HEAD.POOLER_TYPE {kind}"
    assert line.replace(kind, "KIND") in PROJECT.text
    assert f"| `{kind}` |" in PROJECT.text
    heads = build(PROJECT.config(f"mask_rcnn_R_50_{neck}_1x", *line.split())).roi_heads
    poolers = [heads.pooler] if neck == "C4" else [heads.box_pooler, heads.mask_pooler]
    wanted = {"ROIAlign": "RowROIAlign", "ROIAlignV2": "RowROIAlign", "ROIPool": "RoIPool"}
    layers = [layer for pooler in poolers for layer in pooler.level_poolers]
    assert {type(layer).__name__ for layer in layers} == {wanted.get(kind, kind)}
    if kind.startswith("ROIAlign"):
        assert {layer.aligned for layer in layers} == {kind == "ROIAlignV2"}


def batch():
    y, x = torch.arange(64)[:, None], torch.arange(80)
    target = Instances((64, 80))
    target.gt_boxes = Boxes(torch.tensor([[8.0, 8, 40, 40], [30, 20, 70, 60]]))
    target.gt_classes = torch.tensor([0, 2])
    masks = [(y >= b) & (y < d) & (x >= a) & (x < c) for a, b, c, d in target.gt_boxes.tensor]
    target.gt_masks = BitMasks(torch.stack(masks))
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    return [{"image": image, "instances": target, "height": 100, "width": 130}]


def c4(*opts):
    return PROJECT.config("mask_rcnn_R_50_C4_1x", *NARROW.split(), *opts)


def c4_pair():
    """Our narrow C4 model and detectron2's with the same weights."""
    cfg = c4("INSTSEG.MEMORY_FORMAT", "contiguous")
    theirs = copy.deepcopy(cfg)
    theirs.defrost()
    theirs.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    theirs.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    torch.manual_seed(0)
    ours, theirs = build_model(cfg), build_model(theirs)
    nn.init.normal_(ours.roi_heads.box_predictor.cls_score.weight, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_c4_equals_detectron2():
    ours, theirs = c4_pair()
    inputs = batch()
    for model in (ours, theirs):
        torch.manual_seed(1)
        model.losses = model(inputs)
        sum(model.losses.values()).backward()
    assert ours.losses.keys() == theirs.losses.keys()
    for name, value in theirs.losses.items():
        assert ours.losses[name].item() == pytest.approx(value.item(), rel=1e-5), name
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        found, expected = (
            model.eval().inference(inputs, do_postprocess=False)[0] for model in (ours, theirs)
        )
    assert len(found) == len(expected) > 1
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    torch.testing.assert_close(found.pred_masks, expected.pred_masks, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", POOLER_KINDS)
def test_c4_in_bf16_with_every_pooler(kind):
    torch.manual_seed(0)
    model = build_model(c4("INSTSEG.PRECISION", "bf16", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind))
    losses = model(batch())
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        assert model.eval()(batch())[0]["instances"].pred_masks.dtype == torch.bool


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ("MODEL.KEYPOINT_ON True", "turn MODEL.KEYPOINT_ON off"),
        ("INSTSEG.LOSS_NORMALIZER global", "LOSS_NORMALIZER of a C4 model must be 'local'"),
        ("MODEL.ROI_HEADS.IN_FEATURES ['res4','res5']", "is one name"),
        ("MODEL.ROI_BOX_HEAD.POOLER_TYPE ROICrop", "POOLER_TYPE must be one of"),
    ],
)
def test_what_c4_models_cannot_do_is_said(opts, message):
    with pytest.raises(ValueError, match=message):
        build(c4(*opts.split()))
