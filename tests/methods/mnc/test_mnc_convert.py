"""The MNC authors' file becomes our model."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from checkpoint.caffe_writer import write_caffemodel, write_hdf5
from detectron2.modeling import build_model
from methods.foreign import tensors
from methods.mnc import mnc_files as files

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
)
from instseg_ext.cli import main as cli
from instseg_ext.config import find_config
from instseg_ext.methods.mnc.convert import FAMILIES

CONFIG = "MNC/mnc_VGG_16_sbd"
HEADS = "roi_heads."


@functools.cache
def published_shapes():
    return model_shapes(instseg_ext.get_config(CONFIG))


def small_file():
    torch.manual_seed(0)
    return tensors(files.small(), device="cpu")


def test_every_layer_of_the_file_maps_onto_the_published_model():
    weights, report, variant = convert_with_variant(tensors(files.FULL))
    assert report.family == "mnc-caffe"
    assert report.config == CONFIG
    assert (variant.num_classes, variant.backbone_only) == (20, False)
    assert {n: tuple(t.shape) for n, t in weights.items()} == published_shapes()
    assert len(report.mapped) == len(files.FULL) == 50
    assert report.dropped == report.mismatched == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("conv1_1/0", "backbone.conv1_1.weight"),
        ("conv5_3/1", "backbone.conv5_3.bias"),
        ("rpn_conv_3x3/0", "proposal_generator.rpn_head.conv.weight"),
        ("rpn_cls_score/1", "proposal_generator.rpn_head.objectness_logits.bias"),
        ("rpn_bbox_pred/0", "proposal_generator.rpn_head.anchor_deltas.weight"),
        ("fc6_maskest/0", f"{HEADS}mask_head.fc1.weight"),
        ("mask_pred/1", f"{HEADS}mask_head.predictor.bias"),
        ("fc6/0", f"{HEADS}box_tower.fc1.weight"),
        ("fc7/1", f"{HEADS}box_tower.fc2.bias"),
        ("fc6_mask/0", f"{HEADS}mask_tower.fc1.weight"),
        ("fc7_mask/0", f"{HEADS}mask_tower.fc2.weight"),
        ("cls_score/0", f"{HEADS}cls_score.weight"),
        ("seg_cls_score/0", f"{HEADS}seg_cls_score.weight"),
        ("bbox_pred/0", f"{HEADS}bbox_pred.weight"),
    ],
)
def test_names(old, new):
    assert convert(tensors(files.FULL))[1].mapped[old] == new


def test_only_the_predictors_change():
    state = small_file()
    weights, report = convert(state)
    stds = torch.tensor([0.1, 0.1, 0.2, 0.2])
    for old, new in report.mapped.items():
        layer, got, want = old.split("/")[0], weights[new], state[old]
        if layer in ("cls_score", "seg_cls_score"):
            want = torch.cat([want[1:], want[:1]])
        elif layer == "bbox_pred":
            want = torch.cat([want[4:], want[:4]])
            got = got * stds.repeat(4).view(-1, *[1] * (want.dim() - 1))
        elif layer.startswith(("rpn_cls", "rpn_bbox")):
            continue  # tests/checkpoint/test_rpn_rules.py
        torch.testing.assert_close(got, want, msg=old)


def test_boxes_decode_as_the_authors_decode_them():
    """Their layer gives deltas of scale 1; ours are multiplied by the scale of the targets."""
    state = small_file()
    cfg = instseg_ext.get_config(CONFIG)
    scale = 1 / torch.tensor(cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)
    weights = convert(state)[0]
    x = torch.randn(3, 16)
    theirs = x @ state["bbox_pred/0"].T + state["bbox_pred/1"]
    ours = x @ weights[f"{HEADS}bbox_pred.weight"].T + weights[f"{HEADS}bbox_pred.bias"]
    theirs, ours = theirs.view(3, 4, 4), ours.view(3, 4, 4) * scale
    torch.testing.assert_close(ours, theirs.roll(-1, dims=1))


def test_the_boxes_of_the_authors_come_with_the_weights():
    report = convert(tensors(files.FULL))[1]
    assert instseg_ext.get_config(report.config, report.opts).MODEL.MNC.LEGACY_BOXES
    assert any("MODEL.MNC.LEGACY_BOXES True" in note for note in report.notes)


# --- what is refused -----------------------------------------------------------------------------


def test_names_without_a_place_are_refused():
    with pytest.raises(ConversionError, match=r"1 names .* no place .* mnc-caffe: fc8_mask/0"):
        convert(tensors(files.FULL | {"fc8_mask/0": (1,)}))


def test_missing_names_and_other_shapes_are_refused():
    shapes = files.FULL | {"mask_pred/0": (784, 256), "mask_pred/1": (784,)}
    del shapes["fc7_mask/1"]
    weights, report = convert(tensors(shapes))
    with pytest.raises(ConversionError, match="1 names of the model are missing") as error:
        check_fit(weights, published_shapes(), report)
    assert f"{HEADS}mask_tower.fc2.bias" in str(error.value)
    assert f"{HEADS}mask_head.predictor.weight [784, 256] instead of [441, 256]" in str(error.value)


def test_boxes_without_four_rows_per_class_are_refused():
    with pytest.raises(ConversionError, match=r"bbox_pred is \[83, 8192\].*4 rows per class"):
        convert(tensors(files.FULL | {"bbox_pred/0": (83, 8192)}))


# --- the command, initial weights, the page and the door ------------------------------------------


def of_layers(state):
    arrays = {}
    for name, value in state.items():
        arrays.setdefault(name.split("/")[0], []).append(value.numpy())
    return arrays


def command(source, out):
    opts = [str(word) for word in ("MODEL.MNC.LEGACY_BOXES", True, *files.SMALL_OPTS)]
    words = ["--from", "auto", str(source), str(out), "--config", CONFIG]
    return cli.main(["convert", *words, *opts])


def test_the_published_file_loads_whole(tmp_path, capsys):
    """HDF5, with groups for all layers of the net."""
    state = small_file()
    source, out = tmp_path / "mnc_model.caffemodel.h5", tmp_path / "out.pth"
    empty = {key: [] for key in (*files.WITHOUT, *files.SECOND_PASS)}
    write_hdf5(source, of_layers(state) | empty)
    assert command(source, out) == 0
    assert "3 classes instead of the config's 20." in capsys.readouterr().out
    metadata = read_metadata(str(out))
    assert "LEGACY_BOXES: true" in metadata["config"]
    opts = [*files.SMALL_OPTS, "MODEL.ROI_HEADS.NUM_CLASSES", 3]
    model = build_model(instseg_ext.get_config(CONFIG, opts))
    InstSegCheckpointer(model, num_classes=3).load(str(out))
    weights = convert(state)[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_caffemodel_repeats_the_shared_layers(tmp_path, capsys):
    state = small_file()
    arrays = of_layers(state)
    arrays |= {name: arrays[name.removesuffix("_ext")] for name in files.SECOND_PASS}
    source, out = tmp_path / "mnc.caffemodel", tmp_path / "out.pth"
    write_caffemodel(source, {name: ("InnerProduct", blobs) for name, blobs in arrays.items()})
    assert command(source, out) == 0
    assert "18 the second pass, which shares" in capsys.readouterr().out
    weights, expected = read_weights(str(out))["model"], convert(state)[0]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("copies", [False, True])
def test_both_towers_start_from_the_layers_of_imagenet(tmp_path, copies):
    """A converted VGG-16 has fc6 and fc7 once, or their copies for masks beside them."""
    heads = ("fc6", "fc7", "fc6_mask", "fc7_mask") if copies else ("fc6", "fc7")
    state = {
        re.sub("/0", ".weight", re.sub("/1", ".bias", name)): value
        for name, value in small_file().items()
        if name.split("/")[0] in heads or name.startswith("conv")
    }
    path = tmp_path / "vgg16_caffe.pth"
    torch.save({"model": state, "__author__": "vgg-caffe", "matching_heuristics": True}, path)
    model = build_model(instseg_ext.get_config(CONFIG, files.SMALL_OPTS))
    InstSegCheckpointer(model, num_classes=20).load(str(path))
    loaded = model.state_dict()
    assert torch.equal(loaded["backbone.conv5_3.weight"], state["conv5_3.weight"])
    for kind in ("weight", "bias"):
        for number in (1, 2):
            box, mask = f"fc{number + 5}", f"fc{number + 5}{'_mask' if copies else ''}"
            tower = loaded[f"{HEADS}box_tower.fc{number}.{kind}"]
            assert torch.equal(tower, state[f"{box}.{kind}"])
            tower = loaded[f"{HEADS}mask_tower.fc{number}.{kind}"]
            assert torch.equal(tower, state[f"{mask}.{kind}"])


def test_the_config_names_the_file_that_the_page_makes():
    page = (Path(__file__).parents[3] / "docs" / "backbones.md").read_text()
    weights = instseg_ext.get_config(CONFIG).MODEL.WEIGHTS
    assert f"--from vgg-caffe VGG_ILSVRC_16_layers.caffemodel {weights}\n" in page


def test_the_page_lists_what_is_recognised():
    page = Path(__file__).parents[3] / "docs" / "checkpoints.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    named = [row for row in rows if len(row) == 3 and row[0] == "`mnc-caffe`"]
    listed = {config for row in named for config in re.findall(r"`(MNC/\w+)`", row[2])}
    assert listed == {CONFIG}
    assert find_config(CONFIG)


def test_the_method_brings_its_family():
    method = next(method for method in zoo.METHODS if method.name == "MNC")
    assert method.converters is FAMILIES
