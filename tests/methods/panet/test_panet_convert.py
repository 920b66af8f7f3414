"""Files of the PANet authors become our models (acceptance check 10)."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from methods.foreign import tensors
from methods.panet import panet_files as files

import instseg_ext
from instseg_ext import zoo
from instseg_ext.checkpoint import (
    ConversionError,
    check_fit,
    convert,
    convert_with_variant,
    model_shapes,
    read_metadata,
    read_weights,
)
from instseg_ext.cli import main as cli
from instseg_ext.config import find_config
from instseg_ext.methods.panet.convert import FAMILIES

UP = "backbone.bottom_up."
MASKS = "PANet/panet_R_50_FPN_2x_mask"
MASK, BOX = "roi_heads.mask_head", "roi_heads.box_head"
FULL = files.body() | files.box_head() | files.mask_head()
FLAVOURS = {
    "panet_R_50_FPN_2x_mask": FULL,
    "panet_R_50_FPN_1x_det": files.body() | files.box_head(),
    "panet_R_50_FPN_1x_det_2fc": files.body() | files.box_head_2fc(),
}
STATISTICS = (".running_mean", ".running_var")


@functools.cache
def shapes_of_config(config, opts):
    return model_shapes(instseg_ext.get_config(config, opts))


def shapes_of(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def small_weights():
    torch.manual_seed(0)
    state = tensors(files.small(), device="cpu")
    return state, *convert(state)


@pytest.mark.parametrize("config", FLAVOURS)
def test_every_flavour_is_recognised_and_maps_onto_its_model(config):
    shapes = FLAVOURS[config]
    weights, report, variant = convert_with_variant(tensors(shapes))
    assert report.family == "panet"
    assert report.config == f"PANet/{config}"
    assert (variant.num_classes, variant.backbone_only) == (80, False)
    assert shapes_of(weights) == shapes_of_config(report.config, report.opts)
    assert set(report.mapped) == set(shapes)
    added = {name for name in weights if name.endswith(STATISTICS)}
    assert sorted(report.mapped.values()) == sorted(set(weights) - added)
    assert report.leftovers == report.missing == []
    assert report.dropped == report.mismatched == {}


def test_masks_without_the_branch_are_the_same_config_with_another_key():
    shapes = files.body() | files.box_head() | files.mask_head(fusion=False)
    weights, report = convert(tensors(shapes))
    cfg = instseg_ext.get_config(report.config, report.opts)
    assert report.config == MASKS
    assert not cfg.MODEL.PANET.FC_FUSION
    check_fit(weights, model_shapes(cfg), report)


def test_heads_have_the_parameters_of_the_authors():
    """The counts were read from the authors' modules: they keep the synthetic files honest."""

    def parameters(shapes, *outs):
        return sum(t.numel() for n, t in tensors(shapes).items() if not n.startswith(outs))

    assert parameters(files.box_head(), "Box_Outs") == 16_978_432
    assert parameters(files.box_head_2fc(), "Box_Outs") == 52_444_160
    assert parameters(files.mask_head(), "Mask_Outs") == 24_950_032
    path = {n: s for n, s in FULL.items() if "panet_buttomup" in n}
    assert parameters(path, "-") == 3_543_552


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Conv_Body.conv_body.res1.conv1.weight", f"{UP}stem.conv1.weight"),
        ("Conv_Body.conv_body.res1.bn1.bias", f"{UP}stem.conv1.norm.bias"),
        ("Conv_Body.conv_body.res4.5.bn2.weight", f"{UP}res4.5.conv2.norm.weight"),
        ("Conv_Body.conv_body.res3.0.downsample.1.bias", f"{UP}res3.0.shortcut.norm.bias"),
        ("Conv_Body.conv_top.0.weight", "backbone.fpn_lateral5.weight"),
        (
            "Conv_Body.topdown_lateral_modules.0.conv_lateral.1.bias",
            "backbone.fpn_lateral4.norm.bias",
        ),
        (
            "Conv_Body.topdown_lateral_modules.2.conv_lateral.0.weight",
            "backbone.fpn_lateral2.weight",
        ),
        ("Conv_Body.posthoc_modules.0.0.weight", "backbone.fpn_output5.weight"),
        ("Conv_Body.posthoc_modules.3.1.weight", "backbone.fpn_output2.norm.weight"),
        ("Conv_Body.panet_buttomup_conv1_modules.0.0.bias", "backbone.pan_down2.bias"),
        ("Conv_Body.panet_buttomup_conv1_modules.2.1.bias", "backbone.pan_down4.norm.bias"),
        ("Conv_Body.panet_buttomup_conv2_modules.0.0.weight", "backbone.pan_out3.weight"),
        ("Conv_Body.panet_buttomup_conv2_modules.2.0.weight", "backbone.pan_out5.weight"),
        ("RPN.FPN_RPN_conv.weight", "proposal_generator.rpn_head.conv.weight"),
        ("RPN.FPN_RPN_cls_score.bias", "proposal_generator.rpn_head.objectness_logits.bias"),
        ("RPN.FPN_RPN_bbox_pred.bias", "proposal_generator.rpn_head.anchor_deltas.bias"),
        ("Box_Head.conv1_head.3.0.weight", f"{BOX}.conv1.3.weight"),
        ("Box_Head.conv1_head.0.1.weight", f"{BOX}.conv1.0.norm.weight"),
        ("Box_Head.convs.6.weight", f"{BOX}.conv4.weight"),
        ("Box_Head.convs.1.bias", f"{BOX}.conv2.norm.bias"),
        ("Box_Head.fc.weight", f"{BOX}.fc1.weight"),
        ("Mask_Head.mask_conv1.2.1.bias", f"{MASK}.conv1.2.norm.bias"),
        ("Mask_Head.conv_fcn.3.weight", f"{MASK}.conv3.weight"),
        ("Mask_Head.mask_conv4.0.weight", f"{MASK}.conv4.weight"),
        ("Mask_Head.mask_conv5_fc.1.weight", f"{MASK}.conv5_fc.norm.weight"),
        ("Mask_Head.mask_fc.0.weight", f"{MASK}.fc.weight"),
        ("Mask_Head.upconv.weight", f"{MASK}.deconv.weight"),
        ("Mask_Outs.classify.bias", f"{MASK}.predictor.bias"),
    ],
)
def test_names(old, new):
    assert convert(tensors(FULL))[1].mapped[old] == new


def test_names_of_the_head_without_convolutions():
    mapped = convert(tensors(FLAVOURS["panet_R_50_FPN_1x_det_2fc"]))[1].mapped
    assert mapped["Box_Head.fc1.3.0.weight"] == f"{BOX}.fc1.3.weight"
    assert mapped["Box_Head.fc1.1.1.bias"] == f"{BOX}.fc1_norm.1.bias"
    assert mapped["Box_Head.fc2.0.bias"] == f"{BOX}.fc2.bias"
    assert mapped["Box_Head.fc2.1.weight"] == f"{BOX}.fc2_norm.weight"


def test_nothing_changes_but_the_place_of_the_background():
    state, weights, report = small_weights()
    for old, new in report.mapped.items():
        want = state[old]
        if old.startswith("Box_Outs.cls_score"):
            want = torch.cat([want[1:], want[:1]])
        elif old.startswith("Box_Outs.bbox_pred"):
            want = want[4:]
        elif old.startswith("Mask_Outs"):
            want = want[1:]
        assert torch.equal(weights[new], want), old


def test_layers_of_scale_and_shift_become_frozen_norms_that_normalise_nothing():
    weights = small_weights()[1]
    cfg = instseg_ext.get_config(MASKS, [*files.SMALL_OPTS, "MODEL.ROI_HEADS.NUM_CLASSES", 3])
    model = build_model(cfg)
    model.load_state_dict(weights)
    norm = model.backbone.bottom_up.stem.conv1.norm
    x = torch.randn(2, 8, 4, 4)
    scale, shift = norm.weight[:, None, None], norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), x * scale + shift)
    names = {name for name in weights if name.endswith(STATISTICS)}
    assert len(names) == 2 * 53
    assert all(name.startswith(UP) for name in names)


def test_the_geometry_of_the_authors_comes_with_the_weights():
    report = convert(tensors(FULL))[1]
    assert instseg_ext.get_config(report.config, report.opts).MODEL.PANET.LEGACY_D1
    assert "MODEL.PANET.LEGACY_D1 True" in report.notes[0]


# --- what is refused -----------------------------------------------------------------------------


def test_names_without_a_place_are_refused():
    shapes = FULL | {"Keypoint_Head.conv_fcn.0.weight": (1,), "Box_Head.convs.2.weight": (1,)}
    with pytest.raises(ConversionError, match="2 names of the file have no place") as error:
        convert(tensors(shapes))
    assert error.value.report.leftovers == [
        "Keypoint_Head.conv_fcn.0.weight",
        "Box_Head.convs.2.weight",
    ]


def test_missing_names_and_other_shapes_are_refused():
    shapes = {name: shape for name, shape in FULL.items() if not name.startswith("Mask_Head.upc")}
    shapes["RPN.FPN_RPN_conv.bias"] = (8,)
    weights, report = convert(tensors(shapes))
    expected = shapes_of_config(report.config, report.opts)
    with pytest.raises(ConversionError, match="2 names of the model are missing") as error:
        check_fit(weights, expected, report)
    assert f"{MASK}.deconv.weight" in str(error.value)
    assert "rpn_head.conv.bias [8] instead of [256]" in str(error.value)


def test_boxes_without_four_rows_per_class_are_refused():
    with pytest.raises(ConversionError, match=r"bbox_pred is \[323, 1024\].*4 rows per class"):
        convert(tensors(FULL | {"Box_Outs.bbox_pred.weight": (323, 1024)}))


def test_a_trunk_nobody_published_has_no_config():
    report = convert(tensors(files.body(101) | files.box_head()))[1]
    assert (report.config, report.opts) == ("", ())
    assert report.variant == "PANet, ResNet-101, box head of convolutions and a layer"


# --- the command, the page and the door ----------------------------------------------------------


def test_the_command_writes_a_file_that_loads_whole(tmp_path, capsys):
    """The file is as the authors save it: weights beside the state of the training."""
    state = tensors(files.small(), device="cpu")
    source, out = tmp_path / "model_step179999.pth", tmp_path / "out.pth"
    torch.save({"model": state, "step": 179_999, "optimizer": {"state": {}}}, source)
    geometry = convert(tensors(FULL))[1].opts
    opts = [str(word) for word in (*geometry, *files.SMALL_OPTS)]
    words = ["--from", "auto", str(source), str(out), "--config", MASKS]
    assert cli.main(["convert", *words, *opts]) == 0
    told = capsys.readouterr().out
    assert "family      panet\n" in told
    assert "3 classes instead of the config's 80." in told
    assert "LEGACY_D1: true" in read_metadata(str(out))["config"]
    weights = read_weights(str(out))["model"]
    background = weights["roi_heads.box_predictor.cls_score.bias"][-1]
    assert background == state["Box_Outs.cls_score.bias"][0]


def test_the_page_lists_what_is_recognised():
    page = Path(__file__).parents[3] / "docs" / "checkpoints.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    named = [row for row in rows if len(row) == 3 and row[0] == "`panet`"]
    listed = {config for row in named for config in re.findall(r"`PANet/(\w+)`", row[2])}
    assert listed == set(FLAVOURS)
    assert all(find_config(f"PANet/{config}") for config in listed)


def test_the_method_brings_its_family():
    method = next(method for method in zoo.METHODS if method.name == "PANet")
    assert method.converters is FAMILIES
