"""The FCIS authors' files become our models and backbones."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from checkpoint.mxnet_writer import write_params
from detectron2.modeling import build_model
from methods.fcis import fcis_files as files
from methods.foreign import tensors

import instseg_ext
from instseg_ext import zoo
from instseg_ext.checkpoint import (
    ConversionError,
    InstSegCheckpointer,
    check_fit,
    convert,
    convert_with_variant,
    model_shapes,
    read_metadata,
    read_weights,
    resnet_shapes,
)
from instseg_ext.cli import main as cli
from instseg_ext.config import find_config
from instseg_ext.methods.fcis import convert as fcis_convert
from instseg_ext.methods.fcis.convert import FAMILIES

SBD, COCO, R50 = (
    "FCIS/fcis_R_101_sbd",
    "FCIS/fcis_R_101_ohem_coco",
    "FCIS/fcis_R_50_ohem_coco",
)
RPN, HEADS = "proposal_generator.rpn_head.", "roi_heads."


@functools.cache
def published_shapes(config):
    return model_shapes(instseg_ext.get_config(config))


def small_file():
    torch.manual_seed(0)
    return tensors(files.small(), device="cpu")


@pytest.mark.parametrize(
    ("shapes", "config", "classes"),
    [
        (files.SBD, SBD, 20),
        (files.COCO, COCO, 80),
        (files.resnet(50) | files.heads(81, 12), R50, 80),
    ],
)
def test_every_layer_of_a_model_maps_onto_the_published_one(shapes, config, classes):
    weights, report, variant = convert_with_variant(tensors(shapes))
    assert (report.family, report.config) == ("fcis-mxnet", config)
    assert (variant.num_classes, variant.backbone_only) == (classes, False)
    assert {n: tuple(t.shape) for n, t in weights.items()} == published_shapes(config)
    assert sorted(report.dropped) == ["arg:fcis_bbox_bias_test", "arg:fcis_bbox_weight_test"]
    assert report.leftovers == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("arg:conv1_weight", "backbone.stem.conv1.weight"),
        ("arg:bn_conv1_gamma", "backbone.stem.conv1.norm.weight"),
        ("aux:bn_conv1_moving_var", "backbone.stem.conv1.norm.running_var"),
        ("arg:res2a_branch1_weight", "backbone.res2.0.shortcut.weight"),
        ("arg:bn2a_branch1_beta", "backbone.res2.0.shortcut.norm.bias"),
        ("arg:res2c_branch2b_weight", "backbone.res2.2.conv2.weight"),
        ("arg:res3b3_branch2c_weight", "backbone.res3.3.conv3.weight"),
        ("aux:bn4b22_branch2a_moving_mean", "backbone.res4.22.conv1.norm.running_mean"),
        ("arg:res5b_branch2b_weight", "backbone.res5.1.conv2.weight"),
        ("arg:rpn_conv_3x3_bias", f"{RPN}conv.bias"),
        ("arg:rpn_cls_score_weight", f"{RPN}objectness_logits.weight"),
        ("arg:rpn_bbox_pred_bias", f"{RPN}anchor_deltas.bias"),
        ("arg:conv_new_1_weight", f"{HEADS}conv_new.weight"),
        ("arg:fcis_cls_seg_bias", f"{HEADS}cls_seg.bias"),
        ("arg:fcis_bbox_weight", f"{HEADS}bbox.weight"),
    ],
)
def test_names(old, new):
    assert convert(tensors(files.SBD))[1].mapped[old] == new


def test_only_the_first_and_the_last_layers_change():
    state = small_file()
    weights, report = convert(state)
    for old, new in report.mapped.items():
        want = state[old]
        if old == "arg:conv1_weight":
            want = want[:, [2, 1, 0]]
        elif old.startswith("arg:fcis_cls_seg"):
            want = torch.cat([want[98:], want[:98]])
        elif old.startswith("arg:fcis_bbox"):
            want = want[196:]
        elif old.startswith(("arg:rpn_cls", "arg:rpn_bbox")):
            continue  # tests/checkpoint/test_rpn_rules.py
        assert torch.equal(weights[new], want), old


@pytest.mark.parametrize(("depth", "text"), [(50, "ResNet-50"), (101, "ResNet-101")])
def test_a_backbone_alone(depth, text):
    shapes = files.resnet(depth) | files.CLASSIFIER
    weights, report, variant = convert_with_variant(tensors(shapes))
    assert variant.backbone_only
    assert report.variant == f"{text} for ImageNet, without classifier"
    assert set(report.dropped) == set(files.CLASSIFIER)
    assert weights["res4.5.conv3.norm.running_var"].shape == (1024,)
    report.config = SBD if depth == 101 else R50
    check_fit(weights, published_shapes(report.config), report, backbone_only=True)
    assert any("INPUT.FORMAT BGR" in note for note in report.notes)


def test_the_boxes_of_the_authors_come_with_the_weights():
    report = convert(tensors(files.SBD))[1]
    assert instseg_ext.get_config(report.config, report.opts).MODEL.FCIS.LEGACY_BOXES
    assert any("MODEL.FCIS.LEGACY_BOXES True" in note for note in report.notes)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arg:rfcn_cls_weight": (1,)}, "no place in the key map of fcis-mxnet: arg:rfcn_cls_w"),
        ({"arg:fcis_cls_seg_bias": (99,)}, r"fcis_cls_seg is \[99\]: it must have 98 rows per cl"),
        ({"arg:fcis_bbox_bias": (196,)}, r"fcis_bbox is \[196\]: it must have 392 rows"),
        ({"arg:rpn_cls_score_bias": (20,)}, r"rpn_cls_score is \[20\]"),
    ],
)
def test_other_layers_are_refused(change, told):
    with pytest.raises(ConversionError, match=told):
        convert(tensors(files.SBD | change))


def test_a_backbone_with_other_blocks_is_refused():
    shapes = {n: s for n, s in files.resnet(50).items() if "5c_" not in n}
    with pytest.raises(ConversionError, match="the blocks of none of 18, 34, 50, 101, 152"):
        convert(tensors(shapes))
    shapes = files.resnet(50) | {"arg:bn2a_branch1_beta": (7,)}
    with pytest.raises(ConversionError, match=r"no whole ResNet-50 of MXNet: .*is \[7\] instead"):
        convert(tensors(shapes))


def test_a_model_nobody_published_has_no_config():
    report = convert(tensors(files.resnet(152) | files.heads(21, 9)))[1]
    assert (report.config, report.opts) == ("", ())
    assert report.variant == "FCIS, ResNet-152, 9 anchors per cell"


# --- the command, the page and the door ----------------------------------------------------------


def write(path, state):
    write_params(path, {name: value.numpy() for name, value in state.items()})


def test_the_command_writes_a_file_that_loads_whole(tmp_path, capsys):
    state = small_file()
    source, out = tmp_path / "fcis-0000.params", tmp_path / "out.pth"
    write(source, state)
    opts = [str(word) for word in ("MODEL.FCIS.LEGACY_BOXES", True, *files.SMALL_OPTS)]
    words = ["--from", "auto", str(source), str(out), "--config", SBD]
    assert cli.main(["convert", *words, *opts]) == 0
    told = capsys.readouterr().out
    assert "family      fcis-mxnet\n" in told
    assert "2 boxes multiplied by the scale of their targets, as decoding does:" in told
    assert "3 classes instead of the config's 20." in told
    assert "LEGACY_BOXES: true" in read_metadata(str(out))["config"]
    opts = [*files.SMALL_OPTS, "MODEL.ROI_HEADS.NUM_CLASSES", 3]
    model = build_model(instseg_ext.get_config(SBD, opts))
    InstSegCheckpointer(model, num_classes=3).load(str(out))
    weights = convert(state)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_converted_backbone_starts_a_model(tmp_path, monkeypatch):
    narrow = {"STEM_OUT_CHANNELS": 4, "WIDTH_PER_GROUP": 2, "RES2_OUT_CHANNELS": 8}
    monkeypatch.setattr(fcis_convert, "resnet_shapes", lambda keys: resnet_shapes(keys | narrow))
    state = tensors(files.resnet(50, 4, 2, 8), device="cpu")
    source, out = tmp_path / "resnet_v1_50-0000.params", tmp_path / "out.pth"
    write(source, state)
    assert cli.main(["convert", "--from", "fcis-mxnet", str(source), str(out)]) == 0
    assert read_weights(str(out))["matching_heuristics"] is True
    model = build_model(instseg_ext.get_config(R50, files.SMALL_OPTS))
    InstSegCheckpointer(model, num_classes=80).load(str(out))
    backbone = model.backbone.state_dict()
    assert torch.equal(backbone["stem.conv1.weight"], state["arg:conv1_weight"][:, [2, 1, 0]])
    wanted = state["aux:bn5c_branch2c_moving_var"]
    assert torch.equal(backbone["res5.2.conv3.norm.running_var"], wanted)


def test_the_page_lists_what_is_recognised():
    page = Path(__file__).parents[3] / "docs" / "checkpoints.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    named = [row for row in rows if len(row) == 3 and row[0] == "`fcis-mxnet`"]
    listed = {config for row in named for config in re.findall(r"`(FCIS/\w+)`", row[2])}
    assert listed == {SBD, COCO, R50}
    assert all(find_config(config) for config in listed)


def test_the_method_brings_its_family():
    method = next(method for method in zoo.METHODS if method.name == "FCIS")
    assert method.converters is FAMILIES
