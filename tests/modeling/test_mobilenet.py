"""MobileNetV2 against torchvision's."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone

import instseg_ext
from instseg_ext.modeling.mobilenet import (
    STAGES,
    InvertedResidual,
    MobileNetV2,
    build_mobilenetv2_backbone,
    scaled_channels,
)

# Number of torchvision's layer after which each stage ends.
STAGE_ENDS = {1: "stage1", 3: "stage2", 6: "stage3", 10: "stage4", 13: "stage5", 16: "stage6"}
STAGE_ENDS[17] = "stage7"
SMALL = ["MODEL.BACKBONE.NAME", "build_mobilenetv2_backbone", "MODEL.MOBILENET.WIDTH_MULTIPLIER"]


def config(*opts):
    return instseg_ext.get_config(
        "MaskRCNN/nuclei_mask_rcnn_R_18_FPN", ["MODEL.DEVICE", "cpu", *SMALL, 0.25, *opts]
    )


def with_uneven_statistics(net):
    """Fill the norms' tensors so that no two channels are alike."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize("multiplier", [1.0, 0.35])
def test_features_are_torchvisions(multiplier):
    theirs = torchvision.models.mobilenet_v2(width_mult=multiplier, num_classes=2)
    with_uneven_statistics(theirs).eval()
    ours = MobileNetV2(multiplier=multiplier, norm="BN", out_features=STAGES).eval()
    # Both list their layers in the order of the data's way, which makes names unnecessary here.
    trunk = theirs.features[:18].state_dict()
    ours.load_state_dict(dict(zip(ours.state_dict(), trunk.values(), strict=True)))
    x = torch.randn(1, 3, 64, 64)
    expected = {}
    with torch.inference_mode():
        found = ours(x)
        for i, layer in enumerate(theirs.features):
            x = layer(x)
            if i in STAGE_ENDS:
                expected[STAGE_ENDS[i]] = x
    assert list(found) == list(STAGES)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-5, rtol=1e-5)


def test_names_strides_and_channels():
    with torch.device("meta"):
        net = MobileNetV2(out_features=STAGES)
    channels = (16, 24, 32, 64, 96, 160, 320)
    strides = (2, 4, 8, 16, 16, 32, 32)
    assert net.output_shape() == {
        name: ShapeSpec(channels=c, stride=s)
        for name, c, s in zip(STAGES, channels, strides, strict=True)
    }
    assert net.size_divisibility == 0
    layers = {name.removesuffix(".weight") for name in net.state_dict() if "norm" not in name}
    assert {"stem.conv1", "stage1.0.depthwise", "stage1.0.project", "stage6.2.expand"} <= layers
    assert "stage1.0.expand" not in layers
    buffers = dict(net.named_buffers())
    assert {"stem.conv1.norm.running_mean", "stage7.0.project.norm.running_var"} <= set(buffers)


def test_default_features_are_those_at_strides_8_16_32():
    net = build_backbone(config())
    assert {n: s.stride for n, s in net.output_shape().items()} == {
        "stage3": 8,
        "stage4": 16,
        "stage6": 32,
    }
    assert not hasattr(net, "stage7")
    shapes = {n: tuple(v.shape[-2:]) for n, v in net(torch.randn(1, 3, 50, 65)).items()}
    assert shapes == {"stage3": (7, 9), "stage4": (4, 5), "stage6": (2, 3)}


def test_builder_freezes_the_stem_and_the_first_stages():
    net = build_backbone(config("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.MOBILENET.NORM", "BN"))
    for part in (net.stem, net.stage1):
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in part.modules())
        assert any(isinstance(m, FrozenBatchNorm2d) for m in part.modules())
        assert not any(p.requires_grad for p in part.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in net.stage2.modules())
    features = net(torch.randn(2, 3, 64, 64))
    sum(f.square().sum() for f in features.values()).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
    assert all(p.requires_grad for p in net.stage2.parameters())


def test_nothing_frozen_at_zero():
    net = build_backbone(config("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.MOBILENET.NORM", ""))
    assert all(p.requires_grad for p in net.parameters())
    assert net.stem.conv1.bias is not None


def test_the_input_of_a_block_survives():
    block = InvertedResidual(in_channels=8, out_channels=8, stride=1, expansion=6, norm="BN")
    x = torch.randn(1, 8, 8, 8)
    before = x.clone()
    out = block(x)
    assert torch.equal(x, before)
    assert torch.allclose(out - x, block.project(block.depthwise(block.expand(x))), atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "multiplier", "expected"),
    [(32, 1.0, 32), (16, 0.35, 8), (24, 0.75, 24), (160, 0.35, 56), (96, 1.4, 136), (8, 1.4, 16)],
)
def test_channel_counts_are_multiples_of_eight(channels, multiplier, expected):
    assert scaled_channels(channels, multiplier) == expected


@pytest.mark.parametrize("names", [["res2"], []])
def test_unknown_features_are_refused(names):
    cfg = config("MODEL.MOBILENET.OUT_FEATURES", names)
    with pytest.raises(ValueError, match=r"MODEL\.MOBILENET\.OUT_FEATURES must be one of stage1"):
        build_mobilenetv2_backbone(cfg, ShapeSpec(channels=3))
