"""ImageNet models of torchvision: converted, loaded, and computing the same features."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from torch import nn

import instseg_ext
from instseg_ext.checkpoint import (
    ConversionError,
    InstSegCheckpointer,
    convert,
    recognise,
    write_converted,
)
from instseg_ext.modeling.mobilenet import MobileNetV2
from instseg_ext.modeling.vgg import VGG

STAGES = ("res2", "res3", "res4", "res5")


def on_meta(name, **options):
    with torch.device("meta"):
        return getattr(torchvision.models, name)(**options)


def random_model(name, **options):
    """A model of torchvision in which no two channels are alike."""
    model = getattr(torchvision.models, name)(num_classes=2, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model


def write(path, weights):
    metadata = {"family": "torchvision", "sha256": ""}
    write_converted(str(path), weights, metadata, backbone_only=True)
    return str(path)


@torch.inference_mode()
def resnet_features(model, x):
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    features = {}
    for i, name in enumerate(STAGES, start=1):
        x = features[name] = getattr(model, f"layer{i}")(x)
    return features


def assert_close(found, expected):
    assert set(found) <= set(expected)
    for name, value in found.items():
        spread = expected[name].std()
        assert (value - expected[name]).abs().max() <= 1e-5 * max(1.0, spread), name


# --- ResNet --------------------------------------------------------------------------------------


def test_resnet_fills_the_backbone_of_a_model_and_nothing_else(tmp_path, caplog):
    theirs = random_model("resnet18")
    weights, report = convert(theirs.state_dict())
    assert (report.family, report.variant, report.leftovers) == ("torchvision", "ResNet-18", [])
    cfg = instseg_ext.get_config(
        "SOLO/nuclei_solov2_R_18_FPN", ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "FrozenBN"]
    )
    model = build_model(cfg).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        InstSegCheckpointer(model).load(write(tmp_path / "r18.pth", weights))
    bottom_up = model.backbone.bottom_up
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert_close(bottom_up(x), resnet_features(theirs, x))
    inside = "backbone.bottom_up."
    assert {n.removeprefix(inside) for n in before if n.startswith(inside)} == set(weights)
    for name, value in model.state_dict().items():
        if name.startswith(inside):
            assert torch.equal(value, weights[name.removeprefix(inside)])
        else:
            assert torch.equal(value, before[name]), name
    text = caplog.text
    assert "matched with submodule backbone.bottom_up" in text
    assert "not used by the model" not in text
    assert "will not be loaded" not in text


def test_resnext_loads_with_detectron2_alone(tmp_path):
    theirs = random_model("resnext50_32x4d")
    weights, report = convert(theirs.state_dict(), "torchvision")
    assert "DEPTH 50, NUM_GROUPS 32, WIDTH_PER_GROUP 4" in report.notes[0]
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    node = cfg.MODEL.RESNETS
    node.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = list(STAGES)
    node.STRIDE_IN_1X1, node.NUM_GROUPS, node.WIDTH_PER_GROUP = False, 32, 4
    backbone = build_backbone(cfg).eval()
    DetectionCheckpointer(backbone).load(write(tmp_path / "x50.pth", weights))
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert_close(backbone.bottom_up(x), resnet_features(theirs, x))


def test_names_are_those_of_detectron2s_own_files():
    weights, report = convert(on_meta("resnet50").state_dict())
    norm = ("weight", "bias", "running_mean", "running_var")
    assert {n for n in weights if n.startswith(("stem.", "res2.0."))} == {
        f"{layer}.{rest}"
        for layer in (
            "stem.conv1",
            *(f"res2.0.{name}" for name in ("conv1", "conv2", "conv3", "shortcut")),
        )
        for rest in ("weight", *(f"norm.{part}" for part in norm))
    }
    assert report.dropped["fc.weight"] == report.dropped["fc.bias"] == "ImageNet classifier"
    assert {n.rpartition(".")[2] for n in report.dropped} == {
        "weight",
        "bias",
        "num_batches_tracked",
    }


def test_prefix_of_parallel_wrappers_is_taken_off():
    state = on_meta("resnet18").state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    assert list(convert(wrapped)[0]) == list(convert(state)[0])


# --- VGG and MobileNetV2 -------------------------------------------------------------------------


def test_vgg_features():
    theirs = on_meta("vgg16").eval()
    for p in theirs.features.to_empty(device="cpu").parameters():
        nn.init.normal_(p, std=(2.0 / max(p[0].numel(), 9)) ** 0.5)
    weights, report = convert(theirs.state_dict())
    assert report.variant == "VGG-16"
    trunk = {name: value for name, value in weights.items() if name.startswith("conv")}
    ours = VGG(out_features=("conv5",))
    ours.load_state_dict(trunk)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert_close(ours(x), {"conv5": theirs.features[:-1](x)})


def test_vgg_layers_of_the_head_find_their_place():
    state = on_meta("vgg16").state_dict()
    weights, report = convert(state)
    assert [n for n, reason in report.dropped.items() if reason == "ImageNet classifier"] == [
        "classifier.6.weight",
        "classifier.6.bias",
    ]
    with torch.device("meta"):
        model = nn.Module()
        model.backbone = VGG()
        model.roi_heads = nn.ModuleDict({"fc6": nn.Linear(512 * 49, 4096)})
        model.roi_heads["fc7"] = nn.Linear(4096, 4096)
    aligned = align_and_update_state_dicts(model.state_dict(), weights, c2_conversion=False)
    assert set(aligned) == set(model.state_dict())
    assert aligned["roi_heads.fc6.weight"].shape == state["classifier.0.weight"].shape


def test_mobilenet_features(tmp_path, caplog):
    theirs = random_model("mobilenet_v2")
    weights, report = convert(theirs.state_dict())
    assert report.variant == "MobileNetV2"
    ours = MobileNetV2().eval()
    with caplog.at_level(logging.INFO):
        InstSegCheckpointer(ours).load(write(tmp_path / "m.pth", weights))
    assert "stage7.0" in caplog.text  # said to be unused: the features end with stage6
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = {
            name: theirs.features[:end](x)
            for name, end in (("stage3", 7), ("stage4", 11), ("stage6", 17))
        }
        assert_close(ours(x), expected)
    whole = MobileNetV2(out_features=("stage7",))
    assert set(whole.state_dict()) == set(weights)


# --- recognising ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        (
            "resnet34",
            "ResNet-34",
            "DEPTH 34, NUM_GROUPS 1, WIDTH_PER_GROUP 64, RES2_OUT_CHANNELS 64",
        ),
        ("resnet101", "ResNet-101", "DEPTH 101, NUM_GROUPS 1, WIDTH_PER_GROUP 64"),
        ("resnet152", "ResNet-152", "RES2_OUT_CHANNELS 256, STRIDE_IN_1X1 False"),
        ("resnext101_32x8d", "ResNeXt-101 32x8d", "NUM_GROUPS 32, WIDTH_PER_GROUP 8"),
        ("resnext101_64x4d", "ResNeXt-101 64x4d", "NUM_GROUPS 64, WIDTH_PER_GROUP 4"),
        ("wide_resnet50_2", "Wide ResNet-50", "NUM_GROUPS 1, WIDTH_PER_GROUP 128"),
        ("vgg16", "VGG-16", "build_vgg16_backbone"),
        ("mobilenet_v2", "MobileNetV2", "build_mobilenetv2_backbone"),
    ],
)
def test_recognised_without_being_told(name, text, note):
    state = on_meta(name).state_dict()
    assert recognise(state).name == "torchvision"
    _, report = convert(state)
    assert report.variant == text
    assert note in report.notes[0]
    assert "INPUT.FORMAT RGB" in report.notes[-1]


@pytest.mark.parametrize("name", ["vgg16_bn", "mobilenet_v3_small", "densenet121", "alexnet"])
def test_models_that_no_backbone_here_is_for_are_not_claimed(name):
    with pytest.raises(ConversionError, match="no known family"):
        convert(on_meta(name).state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [("vgg19", "features.16.weight"), ("vgg13", "features.15.weight")],
)
def test_leftovers_are_named(name, message):
    with pytest.raises(ConversionError, match=message):
        convert(on_meta(name).state_dict(), "torchvision")


def test_a_resnet_of_another_depth_is_refused():
    block = torchvision.models.resnet.BasicBlock
    with torch.device("meta"):
        model = torchvision.models.ResNet(block, [1, 1, 1, 1])
    with pytest.raises(ConversionError, match="none of 18, 34, 50, 101, 152"):
        convert(model.state_dict())


@pytest.mark.parametrize(
    ("name", "key", "converted"),
    [
        ("resnet18", "layer2.0.downsample.1.running_var", "res3.0.shortcut.norm.running_var"),
        ("resnext50_32x4d", "bn1.bias", "stem.conv1.norm.bias"),
        ("vgg16", "features.26.bias", "conv5_2.bias"),
        ("mobilenet_v2", "features.3.conv.2.weight", "stage2.1.project.weight"),
    ],
)
def test_an_incomplete_file_is_refused(name, key, converted):
    state = on_meta(name).state_dict()
    del state[key]
    with pytest.raises(ConversionError, match=rf"of torchvision: {converted} is missing\.$"):
        convert(state)


def test_an_unknown_part_of_a_norm_is_refused():
    state = on_meta("resnet18").state_dict()
    state["bn1.momentum"] = state["bn1.bias"]
    with pytest.raises(ConversionError, match=r"stem\.conv1\.norm\.momentum is unknown"):
        convert(state)


def test_another_shape_is_refused():
    state = on_meta("mobilenet_v2", width_mult=0.5).state_dict()
    with pytest.raises(
        ConversionError, match=r"stem\.conv1\.weight is \[16, 3, 3, 3\] instead of \[32"
    ):
        convert(state)


# --- the page ------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]


def test_the_page_names_torchvisions_files_and_what_configs_look_for():
    page = (ROOT / "docs" / "backbones.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if "_torchvision.pth` |" in line]
    files = {row[0].strip("| "): row[1].strip("`") for row in rows}
    enums = {
        name.removesuffix("_Weights").replace("_", "").lower(): getattr(torchvision.models, name)
        for name in dir(torchvision.models)
        if name.endswith("_Weights")
    }
    for model, file in files.items():
        weights = enums[re.sub("[-_]", "", model).lower()]
        assert weights.IMAGENET1K_V1.url == f"https://download.pytorch.org/models/{file}"
    written = {row[3].strip("` |") for row in rows}
    configs = [*ROOT.glob("projects/*/configs/*.yaml"), *ROOT.glob("configs/*.yaml")]
    wanted = {
        w for c in configs for w in re.findall(r"weights/\w+_torchvision\.pth", c.read_text())
    }
    assert wanted
    assert wanted <= written
