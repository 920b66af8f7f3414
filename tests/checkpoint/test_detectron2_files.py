"""Files as detectron2's model zoo and its PointRend project publish them."""

from __future__ import annotations

import pickle

import pytest
import torch
from detectron2.modeling import build_model

import instseg_ext
from instseg_ext import zoo
from instseg_ext.checkpoint import InstSegCheckpointer, find_family, model_shapes, read_weights
from instseg_ext.cli.main import main

TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.PIXEL_STD", [58.0, 57.0, 57.0],
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
]  # fmt: skip
WITH_FPN = [*TINY, "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 16]
POINTS = [
    *WITH_FPN, "MODEL.ROI_MASK_HEAD.FC_DIM", 8, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.POINT_HEAD.FC_DIM", 8,
]  # fmt: skip
POINTREND = "PointRend/pointrend_rcnn_R_50_FPN_1x_coco"
SEMANTIC = "PointRend/pointrend_semantic_R_101_FPN_1x_cityscapes"


def first_names(name):
    """Names of the first PointRend models: heads beside the mask head."""
    name = name.replace("mask_head.coarse_head.fc", "mask_coarse_head.coarse_mask_fc")
    name = name.replace("mask_head.coarse_head.", "mask_coarse_head.")
    return name.replace("mask_head.point_head.", "mask_point_head.")


def second_names(name):
    """Names of the models after them: layers of the coarse head with names of their own."""
    return name.replace("coarse_head.fc", "coarse_head.coarse_mask_fc")


def new_names(name):
    return name


FILES = {
    "Mask R-CNN, FPN": (
        "MaskRCNN/mask_rcnn_R_50_FPN_1x",
        [*WITH_FPN, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8],
        new_names,
    ),
    "Mask R-CNN, C4": (
        "MaskRCNN/mask_rcnn_R_50_C4_1x",
        [*TINY, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8],
        new_names,
    ),
    "Keypoint R-CNN": (
        "MaskRCNN/keypoint_rcnn_R_50_FPN_1x",
        [*WITH_FPN, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8, 8)],
        new_names,
    ),
    "PointRend": (POINTREND, POINTS, new_names),
    "PointRend, first names": (POINTREND, POINTS, first_names),
    "PointRend, second names": (POINTREND, POINTS, second_names),
    "implicit PointRend": (
        "PointRend/implicit_pointrend_R_50_FPN_1x_coco",
        POINTS,
        new_names,
    ),
    "semantic PointRend": (
        SEMANTIC,
        [*TINY, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
         "MODEL.POINT_HEAD.FC_DIM", 8],
        new_names,
    ),
}  # fmt: skip


def publish(path, model, rename):
    """Write a file as detectron2 publishes them: arrays of numpy, without metadata of names."""
    torch.manual_seed(1)
    weights = {
        rename(name): (value + torch.rand_like(value)).numpy()
        for name, value in model.state_dict().items()
    }
    with open(path, "wb") as file:
        pickle.dump({"model": weights, "__author__": "someone"}, file)
    return {name: torch.from_numpy(value) for name, value in weights.items()}


@pytest.mark.parametrize("case", FILES)
def test_published_file(case, tmp_path, capsys):
    """As MODEL.WEIGHTS and through ``instseg convert`` every tensor of the file finds its place."""
    name, opts, rename = FILES[case]
    cfg = instseg_ext.get_config(name, opts)
    model = build_model(cfg)
    source = tmp_path / "model_final.pkl"
    weights = publish(source, model, rename)
    expected = {new: weights[rename(new)] for new in model.state_dict()}

    checkpointer = InstSegCheckpointer(model, num_classes=zoo.class_count(cfg))
    found = []
    load = checkpointer._load_model
    checkpointer._load_model = lambda content: found.append(load(content)) or found[0]
    checkpointer.load(str(source))
    (result,) = found
    assert [*result.missing_keys, *result.unexpected_keys, *result.incorrect_shapes] == []
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key

    typed = [str(word) for word in opts]
    out = tmp_path / "ours.pth"
    words = ["--from", "auto", str(source), str(out), "--config", name]
    assert main(["convert", *words, *typed]) == 0
    assert "family      detectron2" in capsys.readouterr().out
    converted = read_weights(str(out))["model"]
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], value) for key, value in expected.items())


@pytest.mark.parametrize("rename", [new_names, first_names, second_names])
def test_another_class_count_is_seen_under_every_name(rename, tmp_path):
    few = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.POINT_HEAD.NUM_CLASSES", 3]
    publish(tmp_path / "a.pkl", build_model(instseg_ext.get_config(POINTREND, POINTS)), rename)
    model = build_model(instseg_ext.get_config(POINTREND, [*POINTS, *few]))
    with pytest.raises(ValueError, match="trained for another number of classes"):
        InstSegCheckpointer(model, num_classes=3).load(str(tmp_path / "a.pkl"))
    before = model.roi_heads.mask_head.coarse_head.fc1.weight.clone()
    checkpointer = InstSegCheckpointer(model, num_classes=3, reset_classifier=True)
    checkpointer.load(str(tmp_path / "a.pkl"))
    assert not torch.equal(model.roi_heads.mask_head.coarse_head.fc1.weight, before)


X101 = [
    "MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NUM_GROUPS", 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8, "MODEL.RESNETS.STRIDE_IN_1X1", False,
]  # fmt: skip
AGNOSTIC = [
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True,
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("MaskRCNN/mask_rcnn_R_50_C4_1x", ["MODEL.RESNETS.DEPTH", 101]),
        ("MaskRCNN/mask_rcnn_R_50_DC5_1x", []),
        ("MaskRCNN/mask_rcnn_R_50_C4_1x", ["MODEL.MASK_ON", False]),
        ("MaskRCNN/faster_rcnn_R_50_FPN_1x", X101),
        ("MaskRCNN/keypoint_rcnn_R_50_FPN_1x", ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5]),
        ("MaskRCNN/mask_rcnn_R_50_FPN_1x", AGNOSTIC),
        ("MaskRCNN/faster_rcnn_R_50_FPN_1x", AGNOSTIC[:2]),
        ("MaskRCNN/mask_rcnn_R_50_C4_1x", AGNOSTIC),
        ("MaskRCNN/mask_rcnn_R_50_FPN_cityscapes", []),
        ("MaskRCNN/mask_rcnn_R_50_FPN_1x_lvis_v0.5", []),
        ("MaskRCNN/mask_rcnn_R_50_FPN_1x_lvis_v1", []),
        (POINTREND, []),
        ("PointRend/pointrend_rcnn_R_50_FPN_1x_cityscapes", []),
        ("PointRend/implicit_pointrend_R_50_FPN_1x_coco", []),
        (SEMANTIC, []),
    ],
)
def test_the_right_config_is_named(name, opts):
    wanted = instseg_ext.get_config(name, opts)
    variant = find_family("detectron2").describe(model_shapes(wanted))
    assert variant.config == name
    cfg = instseg_ext.get_config(variant.config, variant.opts)
    assert variant.num_classes == zoo.class_count(cfg)
    if opts == X101:
        wanted.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    assert cfg.MODEL == wanted.MODEL
    taken = any("classes are taken for those of" in note for note in variant.notes)
    assert taken == (name.endswith(("cityscapes", "v0.5", "v1")) and name != SEMANTIC)


def test_a_model_that_no_config_describes():
    shapes = {
        "backbone.fpn_output2.weight": (8, 8, 3, 3),
        "roi_heads.box_predictor.cls_score.bias": (4,),
        "sem_seg_head.predictor.weight": (3, 8, 1, 1),
    }
    describe = find_family("detectron2").describe
    assert describe(shapes).config == ""
    assert "semantic FPN" in describe(shapes).text
    del shapes["sem_seg_head.predictor.weight"]
    assert describe(shapes).config == ""
    assert describe(shapes).num_classes == 3


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("faster_rcnn_R_50_FPN_1x", ["BOX"]),
        ("mask_rcnn_R_50_FPN_1x", ["BOX", "MASK"]),
        ("keypoint_rcnn_R_50_FPN_1x", ["BOX", "KEYPOINT"]),
    ],
)
def test_files_without_their_own_names(name, nodes):
    """Fast R-CNN is no R-CNN with an RPN; Detectron1-Comparisons look like the others."""
    describe = find_family("detectron2").describe
    shapes = model_shapes(instseg_ext.get_config(f"MaskRCNN/{name}"))
    (note,) = [n for n in describe(shapes).notes if "Detectron1-Comparisons" in n]
    for node in nodes:
        key = f"MODEL.ROI_{node}_HEAD.POOLER"
        assert f"{key}_TYPE ROIAlign {key}_SAMPLING_RATIO 2" in note
    assert note.count("POOLER_TYPE") == len(nodes)
    fast = {key: shape for key, shape in shapes.items() if "proposal_generator" not in key}
    assert describe(fast).config == ""
