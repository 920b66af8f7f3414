"""Configs, page and initial weights."""

import re

import pytest
import torch
from methods.project import (
    Project,
    assert_initial_weights_have_their_command,
    assert_key_table_equals_the_config,
    build,
    count,
)

from instseg_ext import checkpoint
from instseg_ext.methods.sds.config import add_sds_config
from instseg_ext.methods.sds.mapper import build_sds_mapper
from instseg_ext.methods.sds.towers import CaffeNet

PROJECT = Project("SDS")
PAPER, RESNET, NUCLEI = "sds_CaffeNet_sbd", "sds_R_50_sbd", "nuclei_sds_R_18"


def test_no_published_model_is_forgotten():
    assert set(PROJECT.published) == {PAPER, RESNET}
    assert NUCLEI in PROJECT.configs


def test_the_paper():
    cfg = PROJECT.config(PAPER)
    assert cfg.SOLVER.IMS_PER_BATCH * (cfg.MODEL.SDS.FOREGROUND + cfg.MODEL.SDS.BACKGROUND) == 128
    assert (cfg.MODEL.SDS.WINDOW, cfg.MODEL.SDS.CONTEXT) == (227, 16)
    model = build(cfg)
    assert count(model.backbone.box) == count(model.backbone.region) == 56_868_224
    assert model.head.classifier.weight.shape == (21, 8192)
    assert model.head.svm_weight.shape == (20, 8192)
    assert model.head.refiner.coarse_weight.shape == (20, 100, 8292)
    assert model.head.refiner.margin == pytest.approx(16 / 195)


def test_resnet():
    model = build(PROJECT.config(RESNET))
    assert count(model.backbone.box) == 23_454_912
    assert model.head.svm_weight.shape == (20, 4096)


def test_nuclei():
    cfg = PROJECT.config(NUCLEI)
    assert cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH == 960
    assert count(build(cfg)) < 15e6


def test_images_may_not_move_where_regions_come_from_files(tmp_path):
    folder = str(tmp_path)
    cfg = PROJECT.config(NUCLEI, "MODEL.SDS.REGIONS_TRAIN", folder)
    cfg.MODEL.SDS.REGIONS_TEST = folder
    for is_train in (True, False):
        assert build_sds_mapper(cfg, is_train).folder == folder
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    with pytest.raises(ValueError, match=r"INPUT\.RANDOM_FLIP must be none"):
        build_sds_mapper(cfg, True)
    cfg.INPUT.MIN_SIZE_TEST = 800
    with pytest.raises(ValueError, match=r"INPUT\.MIN_SIZE_TEST must be 0"):
        build_sds_mapper(cfg, False)
    cfg.MODEL.SDS.REGIONS_TRAIN = f"{folder}/gone"
    with pytest.raises(FileNotFoundError, match=r"gone \(MODEL\.SDS\.REGIONS_TRAIN\)"):
        build_sds_mapper(cfg, True)


def test_key_table_equals_the_config():
    assert_key_table_equals_the_config(PROJECT, add_sds_config, "SDS")


def test_initial_weights_have_their_command():
    assert_initial_weights_have_their_command(PROJECT, ["resnet50"], ["weights/caffenet.pth"])
    assert re.search(r"--from sds-caffe \S+ weights/caffenet\.pth\n", PROJECT.text)


def caffenet_shapes():
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in CaffeNet(227).state_dict().items()}


def caffe_file(*paths):
    """Return the weights of a Caffe file, all of them views of one number."""
    arrays = {}
    for path in paths:
        for name, shape in caffenet_shapes().items():
            layer, kind = name.split(".")
            key = f"{layer}{path}/{int(kind == 'bias')}"
            arrays[key] = torch.zeros(()).expand(shape)
    return arrays


def test_caffe_networks():
    single = caffe_file("") | {"fc8/0": torch.zeros(2, 2)}
    weights, report, variant = checkpoint.convert_with_variant(single)
    assert report.family == "sds-caffe"
    assert variant.backbone_only
    assert set(weights) == set(caffenet_shapes())
    double = caffe_file("_1", "_2") | {"fc8_pascal/0": torch.zeros(2, 2)}
    weights, report, _ = checkpoint.convert_with_variant(double)
    expected = build(PROJECT.config(PAPER)).backbone.state_dict()
    assert set(weights) == {f"backbone.{name}" for name in expected}
    del double["conv3_2/0"]
    with pytest.raises(checkpoint.ConversionError, match=r"region\.conv3\.weight is missing"):
        checkpoint.convert_with_variant(double)
