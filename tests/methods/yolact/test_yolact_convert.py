"""Files of the YOLACT authors and of YolactEdge become our models, name by name."""

from __future__ import annotations

import functools
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from methods.foreign import COUNTER, tensors
from methods.yolact import foreign_files as files

import instseg_ext
from instseg_ext import zoo
from instseg_ext.checkpoint import (
    ConversionError,
    InstSegCheckpointer,
    Report,
    check_fit,
    convert,
    convert_with_variant,
    model_shapes,
    read_metadata,
    read_weights,
    write_converted,
)
from instseg_ext.cli import main as cli
from instseg_ext.config import find_config
from instseg_ext.methods.yolact.convert import FAMILIES

AUTHORS, EDGE = "yolact", "yolact-edge"
UP = "backbone.bottom_up."

FLAVOURS = [
    (AUTHORS, files.yolact(files.resnet(50)), "yolact_R_50_550"),
    (AUTHORS, files.yolact(files.resnet(101)), "yolact_R_101_550"),
    (AUTHORS, files.yolact(files.darknet()), "yolact_D_53_550"),
    (AUTHORS, files.yolact(files.resnet(50), classes=20), "yolact_R_50_550_sbd"),
    (AUTHORS, files.yolact_plus(50, interval=1), "yolact_plus_R_50_550"),
    (AUTHORS, files.yolact_plus(101, interval=3), "yolact_plus_R_101_550"),
    (EDGE, files.yolact_edge(files.resnet(50)), "yolact_edge_R_50_550"),
    (EDGE, files.yolact_edge(files.resnet(101)), "yolact_edge_R_101_550"),
    (EDGE, files.yolact_edge(files.mobilenet()), "yolact_edge_M_V2_550"),
]
OTHER_SIZES = ("yolact_R_101_400", "yolact_R_101_700")
SMALL_OPTS = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 16),
    *("MODEL.YOLACT.WIDTH", 16, "MODEL.YOLACT.NUM_PROTOS", 4),
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
)


@functools.cache
def shapes_of_config(config):
    """Shapes of a model's state dict but for the counters of batch norms, which nothing reads."""
    shapes = model_shapes(instseg_ext.get_config(f"YOLACT/{config}"))
    return {name: shape for name, shape in shapes.items() if not name.endswith(COUNTER)}


def shapes_of(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def counters(shapes):
    return {name for name in shapes if name.endswith(COUNTER)}


@pytest.mark.parametrize(
    ("family", "shapes", "config"), FLAVOURS, ids=[config for _, _, config in FLAVOURS]
)
def test_every_flavour_is_recognised_and_maps_onto_its_model(family, shapes, config):
    weights, report, variant = convert_with_variant(tensors(shapes))
    assert report.family == family
    assert report.config == f"YOLACT/{config}"
    assert variant.num_classes == (20 if "sbd" in config else 80)
    assert not variant.backbone_only
    assert shapes_of(weights) == shapes_of_config(config)
    unread = {
        name for name in shapes if name.startswith(("backbone.layers.7.", "backbone.layers.8."))
    }
    assert set(report.dropped) == counters(shapes) | unread
    assert set(report.mapped) == set(shapes) - counters(shapes) - unread
    assert sorted(report.mapped.values()) == sorted(weights)
    assert report.leftovers == report.missing == []
    assert report.mismatched == {}


@pytest.mark.parametrize(
    ("shapes", "parameters"),
    [
        (files.yolact(files.resnet(50)), 31_164_943),
        (files.yolact(files.resnet(101)), 50_157_071),
        (files.yolact(files.darknet()), 47_783_087),
        (files.yolact_plus(50, interval=1), 33_766_460),
        (files.yolact_plus(101, interval=3), 52_571_142),
    ],
)
def test_files_have_as_many_parameters_as_the_reference_has(shapes, parameters):
    """The counts were read from the authors' modules: they keep the synthetic files honest."""
    no_parameter = (COUNTER, ".running_mean", ".running_var")
    assert parameters == sum(
        math.prod(shape) for name, shape in shapes.items() if not name.endswith(no_parameter)
    )


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        (FLAVOURS[0][1], 354),
        (FLAVOURS[1][1], 660),
        (FLAVOURS[2][1], 348),
        (FLAVOURS[4][1], 405),
        (FLAVOURS[5][1], 705),
        (FLAVOURS[8][1], 348),
        (files.yolact_edge(files.resnet(101), classes=40, video=True), 697),
    ],
)
def test_files_have_as_many_names_as_the_reference_has(shapes, names):
    assert len(shapes) == names


PLUS_NAMES = {
    "backbone.conv1.weight": f"{UP}stem.conv1.weight",
    "backbone.bn1.running_var": f"{UP}stem.conv1.norm.running_var",
    "backbone.layers.0.2.conv3.weight": f"{UP}res2.2.conv3.weight",
    "backbone.layers.2.5.bn2.bias": f"{UP}res4.5.conv2.norm.bias",
    "backbone.layers.1.0.downsample.0.weight": f"{UP}res3.0.shortcut.weight",
    "backbone.layers.1.0.downsample.1.weight": f"{UP}res3.0.shortcut.norm.weight",
    "backbone.layers.3.0.conv2.bias": f"{UP}res5.0.conv2.bias",
    "backbone.layers.2.3.conv2.conv_offset_mask.bias": f"{UP}res4.3.conv2_offset.bias",
    "fpn.lat_layers.0.bias": "backbone.fpn_lateral5.bias",
    "fpn.lat_layers.2.weight": "backbone.fpn_lateral3.weight",
    "fpn.pred_layers.0.weight": "backbone.fpn_output5.weight",
    "fpn.downsample_layers.0.weight": "backbone.fpn_downsample6.weight",
    "fpn.downsample_layers.1.bias": "backbone.fpn_downsample7.bias",
    "proto_net.0.weight": "head.protonet.conv1.weight",
    "proto_net.4.weight": "head.protonet.conv3.weight",
    "proto_net.8.bias": "head.protonet.conv4.bias",
    "proto_net.10.weight": "head.protonet.pred.weight",
    "prediction_layers.0.upfeature.0.weight": "head.shared_conv.weight",
    "prediction_layers.0.bbox_layer.bias": "head.box_pred.bias",
    "prediction_layers.0.conf_layer.weight": "head.class_pred.weight",
    "prediction_layers.0.mask_layer.weight": "head.coefficient_pred.weight",
    "semantic_seg_conv.weight": "head.semantic.weight",
    "maskiou_net.maskiou_net.0.weight": "head.mask_iou.conv1.weight",
    "maskiou_net.maskiou_net.8.bias": "head.mask_iou.conv5.bias",
    "maskiou_net.maskiou_net.10.weight": "head.mask_iou.pred.weight",
}
DARKNET_NAMES = {
    "backbone._preconv.0.weight": f"{UP}stem.weight",
    "backbone._preconv.1.running_mean": f"{UP}stem.norm.running_mean",
    "backbone.layers.0.0.0.weight": f"{UP}stage1.0.weight",
    "backbone.layers.4.0.1.bias": f"{UP}stage5.0.norm.bias",
    "backbone.layers.2.8.conv1.0.weight": f"{UP}stage3.8.conv1.weight",
    "backbone.layers.3.1.conv2.1.weight": f"{UP}stage4.1.conv2.norm.weight",
}
MOBILENET_NAMES = {
    "backbone.layers.0.0.weight": f"{UP}stem.conv1.weight",
    "backbone.layers.0.1.bias": f"{UP}stem.conv1.norm.bias",
    "backbone.layers.1.0.conv.0.0.weight": f"{UP}stage1.0.depthwise.weight",
    "backbone.layers.1.0.conv.1.weight": f"{UP}stage1.0.project.weight",
    "backbone.layers.1.0.conv.2.bias": f"{UP}stage1.0.project.norm.bias",
    "backbone.layers.3.1.conv.0.0.weight": f"{UP}stage3.1.expand.weight",
    "backbone.layers.3.1.conv.1.1.weight": f"{UP}stage3.1.depthwise.norm.weight",
    "backbone.layers.6.2.conv.2.weight": f"{UP}stage6.2.project.weight",
    "backbone.layers.6.2.conv.3.running_var": f"{UP}stage6.2.project.norm.running_var",
    "fpn_phase_1.lat_layers.1.bias": "backbone.fpn_lateral4.bias",
    "fpn_phase_2.pred_layers.2.weight": "backbone.fpn_output3.weight",
    "fpn_phase_2.downsample_layers.1.weight": "backbone.fpn_downsample7.weight",
}


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        (files.yolact_plus(101, interval=3), PLUS_NAMES),
        (files.yolact(files.darknet()), DARKNET_NAMES),
        (files.yolact_edge(files.mobilenet()), MOBILENET_NAMES),
    ],
    ids=["plus", "darknet", "mobilenet"],
)
def test_names(shapes, names):
    mapped = convert(tensors(shapes))[1].mapped
    assert {old: mapped[old] for old in names} == names


def test_what_version_1_0_saved_twice_or_for_nothing_is_dropped():
    shapes = files.yolact(files.resnet(50, duplicates=True), downsample=5)
    weights, report = convert(tensors(shapes))
    assert report.config == "YOLACT/yolact_R_50_550"
    assert shapes_of(weights) == shapes_of_config("yolact_R_50_550")
    reasons = {name: why for name, why in report.dropped.items() if "version 1.0" in why}
    assert {re.sub(r"\d+\..*", "", name) for name in reasons} == {
        "backbone.layer",
        "fpn.downsample_layers.",
    }
    assert set(reasons) == set(shapes) - set(files.yolact(files.resnet(50)))


def test_values_come_from_the_names_that_the_authors_read():
    shapes = files.yolact(
        files.resnet(50, duplicates=True, sizes=files.SMALL), downsample=3, sizes=files.SMALL
    )
    state = tensors(shapes, device="cpu")
    weights, report = convert(state)
    for old, new in report.mapped.items():
        if "conf_layer" not in old:
            assert weights[new] is state[old] or torch.equal(weights[new], state[old]), old
    block = "backbone.layers.0.0.conv1.weight"
    assert not torch.equal(state[block], state[block.replace("layers.0", "layer1")])


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchors", "classes"), [(3, 80), (9, 80), (3, 20), (9, 26), (3, 242), (3, 1), (1, 1)]
)
def test_background_moves_from_the_first_to_the_last_class(anchors, classes):
    """729 channels are 9 anchors of 81 classes or 3 of 243: the boxes decide."""
    shapes = files.head(anchors=anchors, classes=classes, sizes=files.SMALL)
    state = tensors(shapes, device="cpu")
    weights, report = convert(state)
    for part in ("weight", "bias"):
        old = state[f"prediction_layers.0.conf_layer.{part}"]
        new = weights[f"head.class_pred.{part}"]
        assert new.shape == old.shape
        for anchor in range(anchors):
            first = anchor * (classes + 1)
            assert torch.equal(new[first + classes], old[first])
            for label in range(classes):
                assert torch.equal(new[first + label], old[first + 1 + label])
    assert report.mapped["prediction_layers.0.conf_layer.bias"] == "head.class_pred.bias"


def test_the_file_itself_keeps_its_order():
    state = tensors(files.head(sizes=files.SMALL), device="cpu")
    before = {name: tensor.clone() for name, tensor in state.items()}
    convert(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("classes", [1, 3, 40])
def test_the_classifier_tells_the_number_of_classes(classes):
    for shapes in (
        files.yolact(files.resnet(50), classes=classes),
        files.yolact_plus(50, interval=1, classes=classes),
        files.yolact_edge(files.mobilenet(), classes=classes),
    ):
        assert convert_with_variant(tensors(shapes))[2].num_classes == classes


# --- what weights do not tell --------------------------------------------------------------------


def test_the_size_of_images_that_weights_do_not_tell_is_said():
    shapes = files.yolact(files.resnet(101))
    weights, report = convert(tensors(shapes))
    for name in OTHER_SIZES:
        assert f"--config YOLACT/{name}" in report.notes[0]
        check_fit(weights, shapes_of_config(name), Report(AUTHORS))
    assert report.notes[0] in report.summary()


def test_twenty_classes_are_taken_for_pascals_and_that_is_said():
    report = convert(tensors(files.yolact(files.resnet(50), classes=20)))[1]
    assert "--config YOLACT/yolact_R_50_550." in report.notes[0]
    assert convert(tensors(files.yolact(files.resnet(101), classes=20)))[1].config == (
        "YOLACT/yolact_R_101_550"
    )


@pytest.mark.parametrize("config", ["yolact_R_50_550", "yolact_plus_R_101_550", "yolact_D_53_550"])
def test_models_of_one_size_have_no_note(config):
    shapes = next(shapes for _, shapes, name in FLAVOURS if name == config)
    assert convert(tensors(shapes))[1].notes == ()


def test_layers_of_videos_are_dropped_with_their_reason():
    shapes = files.yolact_edge(files.resnet(50), classes=40, video=True)
    weights, report, variant = convert_with_variant(tensors(shapes))
    assert report.config == "YOLACT/yolact_edge_R_50_550"
    assert variant.num_classes == 40
    dropped = {name.partition(".")[0] for name, why in report.dropped.items() if "video" in why}
    assert dropped == {"flow_net", "flow_net_pre_convs", "spa"}
    assert set(weights) == set(shapes_of_config("yolact_edge_R_50_550"))


def test_a_mobilenet_whose_pyramid_is_whole_is_of_yolact_edge_too():
    report = convert(tensors(files.yolact(files.mobilenet())))[1]
    assert (report.family, report.config) == (EDGE, "YOLACT/yolact_edge_M_V2_550")


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (
            files.yolact_plus(50, interval=2),
            "YOLACT++, ResNet-50 with deformable convolution at interval 2, 9 anchors per cell, "
            "32 prototypes",
        ),
        (
            files.yolact(files.resnet(101, interval=3)),
            "YOLACT, ResNet-101 with deformable convolution at interval 3, 3 anchors per cell, "
            "32 prototypes",
        ),
        (
            files.yolact(files.resnet(50, sizes=files.SMALL), sizes=files.SMALL),
            "YOLACT, ResNet-50, 3 anchors per cell, 4 prototypes",
        ),
    ],
)
def test_a_model_nobody_published_has_no_config(shapes, text):
    report = convert(tensors(shapes))[1]
    assert (report.config, report.variant) == ("", text)


def test_deformable_blocks_in_no_order_are_said_to_be_so():
    shapes = files.yolact_plus(50, interval=1)
    for part in ("weight", "bias"):
        del shapes[f"backbone.layers.1.1.conv2.conv_offset_mask.{part}"]
    report = convert(tensors(shapes))[1]
    assert report.config == ""
    assert "at no regular interval" in report.variant


# --- what is wrong is named ----------------------------------------------------------------------


@pytest.mark.parametrize("family", [AUTHORS, EDGE])
def test_a_name_too_many_is_named(family):
    shapes = next(shapes for owner, shapes, _ in FLAVOURS if owner == family)
    state = tensors(shapes) | {f"class_existence_fc.{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ConversionError, match=r"^12 names .*_fc\.0, .*_fc\.9 and 2 more") as error:
        convert(state)
    assert len(error.value.report.leftovers) == 12


def test_missing_names_and_other_shapes_are_named():
    shapes = files.yolact_plus(50, interval=1)
    for name in ("semantic_seg_conv.weight", "backbone.layers.3.0.conv2.bias"):
        del shapes[name]
    shapes["maskiou_net.maskiou_net.10.weight"] = (20, 128, 1, 1)
    weights, report = convert(tensors(shapes))
    with pytest.raises(ConversionError) as error:
        check_fit(weights, shapes_of_config("yolact_plus_R_50_550"), report)
    message = str(error.value)
    assert "2 names of the model are missing: " in message
    assert "head.semantic.weight" in message
    assert "backbone.bottom_up.res5.0.conv2.bias" in message
    assert "head.mask_iou.pred.weight [20, 128, 1, 1] instead of [80, 128, 1, 1]" in message
    assert "YOLACT/yolact_plus_R_50_550" in message


def test_a_duplicate_does_not_stand_in_for_a_missing_name():
    shapes = files.yolact(files.resnet(50, duplicates=True))
    del shapes["backbone.layers.1.2.conv1.weight"]
    weights, report = convert(tensors(shapes))
    with pytest.raises(ConversionError, match=r"missing: backbone\.bottom_up\.res3\.2\.conv1\.w"):
        check_fit(weights, shapes_of_config("yolact_R_50_550"), report)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("prediction_layers.0.bbox_layer.weight", None, "bbox_layer.weight is missing"),
        ("prediction_layers.0.bbox_layer.weight", (13, 256, 3, 3), "4 channels per anchor"),
        ("prediction_layers.0.conf_layer.weight", (244, 256, 3, 3), r"\[244, .* the 3 anchors"),
        ("prediction_layers.0.conf_layer.bias", (), r"conf_layer is \[\]"),
    ],
)
def test_classes_that_cannot_be_shared_out_among_anchors_are_refused(name, shape, told):
    shapes = files.yolact(files.resnet(50))
    del shapes[name]
    if shape is not None:
        shapes[name] = shape
    with pytest.raises(ConversionError, match=told):
        convert(tensors(shapes))


def test_the_model_of_another_variant_does_not_fit():
    weights, _ = convert(tensors(files.yolact(files.resnet(50))))
    with pytest.raises(ConversionError, match=r"head\.mask_iou\.conv1\.weight|conv2_offset"):
        check_fit(weights, shapes_of_config("yolact_plus_R_50_550"), Report(AUTHORS))


@pytest.mark.parametrize(
    ("shapes", "typed", "owner"),
    [
        (files.yolact_edge(files.resnet(50)), AUTHORS, EDGE),
        (files.yolact(files.resnet(50)), EDGE, AUTHORS),
        (files.yolact(files.darknet()), "solo-authors", AUTHORS),
        (files.yolact(files.resnet(50)), "torchvision", AUTHORS),
        (files.darknet(prefix="")[0], "torchvision", AUTHORS),
    ],
)
def test_another_family_than_typed_is_named(shapes, typed, owner):
    with pytest.raises(ConversionError, match=f"not those of {typed} .* looks like {owner}"):
        convert(tensors(shapes), typed)


# --- DarkNet-53 for ImageNet ---------------------------------------------------------------------


def test_the_darknet_of_the_authors_fills_its_backbone():
    weights, report, variant = convert_with_variant(tensors(files.darknet(prefix="")[0]))
    assert variant.backbone_only
    assert report.family == AUTHORS
    assert report.config == "YOLACT/yolact_D_53_550"
    assert "PIXEL_STD [255.0, 255.0, 255.0]" in report.notes[0]
    assert {f"{UP}{name}": shape for name, shape in shapes_of(weights).items()} == {
        name: shape
        for name, shape in shapes_of_config("yolact_D_53_550").items()
        if name.startswith(UP)
    }
    check_fit(weights, shapes_of_config("yolact_D_53_550"), report, backbone_only=True)


def test_a_darknet_that_is_not_whole_is_refused():
    shapes = files.darknet(prefix="")[0]
    del shapes["layers.3.7.conv2.1.bias"]
    weights, report = convert(tensors(shapes))
    with pytest.raises(ConversionError, match=r"missing: stage4\.7\.conv2\.norm\.bias"):
        check_fit(weights, shapes_of_config("yolact_D_53_550"), report, backbone_only=True)


def test_a_darknet_loads_into_a_model_and_leaves_the_rest_alone(tmp_path, caplog):
    state = tensors(files.darknet(prefix="", stem=2)[0], device="cpu")
    weights, _ = convert(state)
    path = str(tmp_path / "darknet.pth")
    write_converted(path, weights, {"family": AUTHORS, "sha256": ""}, backbone_only=True)
    cfg = instseg_ext.get_config("YOLACT/yolact_D_53_550", [*SMALL_OPTS, "MODEL.DARKNET.WIDTH", 2])
    model = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        InstSegCheckpointer(model).load(path)
    for name, tensor in model.state_dict().items():
        expected = weights.get(name.removeprefix(UP), before[name])
        assert torch.equal(tensor, expected), name
    assert "matched with submodule backbone.bottom_up" in caplog.text
    assert "not used by the model" not in caplog.text


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def small_plus(tmp_path):
    """A small YOLACT++ as the authors write it: a bare state dict."""
    shapes = files.yolact_plus(50, interval=1, classes=3, sizes=files.SMALL)
    state = tensors(shapes, device="cpu")
    torch.save(state, tmp_path / "yolact_plus.pth", _use_new_zipfile_serialization=False)
    return tmp_path / "yolact_plus.pth", state


def test_the_command_writes_a_file_that_loads_whole(small_plus, tmp_path, capsys):
    source, state = small_plus
    out = tmp_path / "out.pth"
    opts = map(str, SMALL_OPTS[:-2])
    config = "YOLACT/yolact_plus_R_50_550"
    assert (
        cli.main(["convert", "--from", "auto", str(source), str(out), "--config", config, *opts])
        == 0
    )
    told = capsys.readouterr().out
    assert "family      yolact\n" in told
    assert "3 classes instead of the config's 80." in told
    weights = read_weights(str(out))["model"]
    assert read_metadata(str(out))["family"] == AUTHORS
    cfg = instseg_ext.get_config(config, [*SMALL_OPTS, "MODEL.YOLACT.NUM_CLASSES", 3])
    model = build_model(cfg)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all(name.endswith(COUNTER) for name in missing)
    block = model.backbone.bottom_up.res3[0]
    there = "backbone.layers.1.0.conv2"
    assert torch.equal(block.conv2.bias, state[f"{there}.bias"])
    assert torch.equal(block.conv2_offset.weight, state[f"{there}.conv_offset_mask.weight"])


def test_a_darknet_alone_is_compared_with_its_config(tmp_path, capsys):
    state = tensors(files.darknet(prefix="", stem=2)[0], device="cpu")
    torch.save(state, tmp_path / "darknet53.pth")
    words = ["convert", "--from", "yolact", str(tmp_path / "darknet53.pth")]
    assert cli.main([*words, str(tmp_path / "out.pth")]) == 2
    assert "stem.weight [2, 3, 3, 3] instead of [32, 3, 3, 3]" in capsys.readouterr().err
    opts = ["--config", "YOLACT/yolact_D_53_550", "MODEL.DARKNET.WIDTH", "2"]
    assert cli.main([*words, str(tmp_path / "out.pth"), *opts]) == 0
    assert read_weights(str(tmp_path / "out.pth"))["matching_heuristics"]


# --- the page and the door -----------------------------------------------------------------------

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"


def test_the_page_lists_what_is_recognised():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    listed = {
        (row[0].strip("`"), config)
        for row in rows
        if len(row) == 3
        for config in re.findall(r"`YOLACT/(\w+)`", row[2])
    }
    ours = {(family, config) for family, _, config in FLAVOURS}
    assert listed == ours | {(AUTHORS, name) for name in OTHER_SIZES}
    assert all(find_config(f"YOLACT/{config}") for _, config in listed)


def test_the_method_brings_its_families():
    method = next(method for method in zoo.METHODS if method.name == "YOLACT")
    assert method.converters is FAMILIES
