"""The published configs: detectron2's architectures, parameter names and recipes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from contract.cases import CASES, blobs
from detectron2.config import get_cfg
from detectron2.modeling import (
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    build_model,
)
from methods.pointrend.pointrend_heads import oracle
from methods.project import Project, build, count

import instseg_ext

PROJECT = Project("PointRend")
NUCLEI = "nuclei_pointrend_R_18_FPN"
BASELINE = Project("MaskRCNN").config("nuclei_mask_rcnn_R_18_FPN")
# What stands for our classes in detectron2.
THEIRS = {
    "PointRendHead": "PointRendMaskHead",
    "ImplicitPointRendHead": "ImplicitPointRendMaskHead",
}
MSRA = "detectron2://ImageNetPretrained/MSRA/R-{}.pkl"


@dataclass(frozen=True)
class Model:
    """What a config of detectron2's project says.

    Attributes:
        params: in all; None where nobody says it.
        depth: of the ResNet.
        weights: initial ones.
        steps: iterations after which the rate falls.
        iterations: in all.
        head: the mask head.
    """

    params: int | None
    depth: int = 50
    weights: str = MSRA.format(50)
    steps: tuple = (60000, 80000)
    iterations: int = 90000
    head: str = "PointRendHead"


LONG = {"steps": (210000, 250000), "iterations": 270000}
IMPLICIT = {"params": 346_416_816, "head": "ImplicitPointRendHead"}
X101 = "detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl"

PUBLISHED = {
    "pointrend_rcnn_R_50_FPN_1x_coco": Model(60_161_792),
    "pointrend_rcnn_R_50_FPN_3x_coco": Model(60_161_792, **LONG),
    "pointrend_rcnn_R_101_FPN_3x_coco": Model(None, 101, MSRA.format(101), **LONG),
    "pointrend_rcnn_X_101_32x8d_FPN_3x_coco": Model(None, 101, X101, **LONG),
    "pointrend_rcnn_R_50_FPN_1x_cityscapes": Model(None, steps=(18000,), iterations=24000),
    "implicit_pointrend_R_50_FPN_1x_coco": Model(**IMPLICIT),
    "implicit_pointrend_R_50_FPN_3x_coco": Model(**IMPLICIT, **LONG),
}


def as_detectron2(cfg):
    """The same model of detectron2's own classes."""
    cfg = cfg.clone()
    cfg.merge_from_list(
        [
            "MODEL.META_ARCHITECTURE", "GeneralizedRCNN",
            "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
            "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
        ]
    )  # fmt: skip
    return cfg


def test_every_published_config_is_there():
    """Label maps have a test file of their own."""
    instances = {name for name in PROJECT.published if "semantic" not in name}
    assert set(PUBLISHED) == instances
    assert set(PROJECT.published) - instances == {"pointrend_semantic_R_101_FPN_1x_cityscapes"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_is_the_published_one(name):
    cfg, model = PROJECT.config(name), PUBLISHED[name]
    assert model.depth == cfg.MODEL.RESNETS.DEPTH
    assert model.weights == cfg.MODEL.WEIGHTS
    assert (model.steps, model.iterations) == (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)
    assert model.head == cfg.MODEL.ROI_MASK_HEAD.NAME
    assert (model.head == "PointRendHead") == cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES
    assert cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE == ""
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    caffe2 = model.weights != X101
    resnets = cfg.MODEL.RESNETS
    groups = (resnets.STRIDE_IN_1X1, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP)
    assert groups == ((True, 1, 64) if caffe2 else (False, 32, 8))
    assert ([1.0] * 3 if caffe2 else [57.375, 57.12, 58.395]) == cfg.MODEL.PIXEL_STD


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("coco")])
def test_data_and_batch_are_those_of_coco(name):
    cfg = PROJECT.config(name)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == (1333, 800)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.POINT_HEAD.NUM_CLASSES == 80


def test_data_and_batch_are_those_of_cityscapes():
    cfg = PROJECT.config("pointrend_rcnn_R_50_FPN_1x_cityscapes")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (8, 0.01)
    assert tuple(range(800, 1025, 32)) == cfg.INPUT.MIN_SIZE_TRAIN
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (1024, 2048)
    assert cfg.INPUT.MAX_SIZE_TRAIN == 2048
    assert cfg.DATASETS.TRAIN == ("cityscapes_fine_instance_seg_train",)
    assert cfg.DATASETS.TEST == ("cityscapes_fine_instance_seg_val",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.POINT_HEAD.NUM_CLASSES == 8


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "3x" not in name or "101" in name])
def test_state_dict_is_detectron2s(name):
    """The published files load: the same names and shapes."""
    oracle()
    cfg = PROJECT.config(name)
    model = build(cfg)
    if PUBLISHED[name].params:
        assert count(model) == PUBLISHED[name].params
    theirs = as_detectron2(cfg)
    theirs.MODEL.ROI_MASK_HEAD.NAME = THEIRS[cfg.MODEL.ROI_MASK_HEAD.NAME]
    expected = {name: value.shape for name, value in build(theirs).state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == expected


def test_head_works_within_detectron2s_classes():
    """A config file of detectron2 needs the name of our head, and nothing else."""
    (case,) = (case for case in CASES if case.name == "PointRend")
    model = build_model(as_detectron2(case.cfg("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)))
    assert type(model).__name__ == "GeneralizedRCNN"
    inputs = [blobs(64, 96, [(4, 4, 30, 30), (40, 20, 80, 60)])]
    losses = model(inputs)
    assert {"loss_mask", "loss_mask_point"} < set(losses)
    sum(losses.values()).backward()
    masks = model.eval()(inputs)[0]["instances"].pred_masks
    assert masks.shape[1:] == (64, 96)


def test_defaults_are_those_of_the_published_heads():
    """The yaml files of detectron2 spell these out; ours leave them to the defaults."""
    cfg, plain = PROJECT.config("pointrend_rcnn_R_50_FPN_1x_coco"), get_cfg()
    oracle().add_pointrend_config(plain)
    plain.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
    point_head = dict(cfg.MODEL.POINT_HEAD)
    assert point_head.pop("TRAIN_SAMPLING") == "importance"
    assert point_head == plain.MODEL.POINT_HEAD
    for key in ("IN_FEATURES", "FC_DIM", "NUM_FC", "OUTPUT_SIDE_RESOLUTION", "POINT_HEAD_ON"):
        assert cfg.MODEL.ROI_MASK_HEAD[key] == plain.MODEL.ROI_MASK_HEAD[key]


def test_nuclei_config_is_the_baseline_with_another_mask_head():
    cfg = PROJECT.config(NUCLEI)
    expected = BASELINE.clone()
    expected.merge_from_list(
        [
            "MODEL.ROI_HEADS.NAME", "PointRendHeads",
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True,
            "MODEL.ROI_MASK_HEAD.NAME", "PointRendHead",
            "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "",
            "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", True,
            "MODEL.ROI_MASK_HEAD.FC_DIM", 128,
            "MODEL.POINT_HEAD.NUM_CLASSES", 1,
            "MODEL.POINT_HEAD.FC_DIM", 128,
            "INSTSEG.CONFIG", cfg.INSTSEG.CONFIG,
        ]
    )  # fmt: skip
    assert cfg == expected
    assert count(build(cfg)) == pytest.approx(count(build(BASELINE.clone())), rel=0.05)


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("ROI_MASK_HEAD", "PointRendMaskHead", "PointRendHead"),
        ("ROI_MASK_HEAD", "ImplicitPointRendMaskHead", "ImplicitPointRendHead"),
        ("ROI_HEADS", "PointRendROIHeads", "PointRendHeads"),
        ("SEM_SEG_HEAD", "PointRendSemSegHead", "PointRendSemanticHead"),
    ],
)
def test_detectron2s_names_are_answered_with_ours(key, old, new, monkeypatch):
    for registry in (ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY, SEM_SEG_HEADS_REGISTRY):
        monkeypatch.delitem(registry._obj_map, old, raising=False)
    message = f"MODEL.{key}.NAME {old} is not registered here: set it to {new}"
    with pytest.raises(ValueError, match=message):
        instseg_ext.get_config(f"PointRend/{NUCLEI}", [f"MODEL.{key}.NAME", old])
    # with detectron2's project imported its own parts are meant
    monkeypatch.setitem(ROI_MASK_HEAD_REGISTRY._obj_map, "PointRendMaskHead", object)
    instseg_ext.get_config(f"PointRend/{NUCLEI}", ["MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead"])
