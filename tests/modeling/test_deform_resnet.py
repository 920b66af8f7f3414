"""Deformable backbones against detectron2's plain ones."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY

import instseg_ext.modeling.deform_resnet as module
from instseg_ext.modeling.deform_resnet import DeformBottleneckBlock

RGB = ShapeSpec(channels=3)


def config(**resnets):
    """R-50 of an eighth of the width."""
    cfg = get_cfg()
    node = cfg.MODEL.RESNETS
    node.DEPTH, node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS, node.WIDTH_PER_GROUP = 50, 8, 16, 8
    node.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = node.OUT_FEATURES, 8
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    for key, value in resnets.items():
        setattr(node, key, value)
    return cfg


def build(name, cfg):
    torch.manual_seed(0)
    return BACKBONE_REGISTRY.get(name)(cfg, RGB)


PAIRS = [
    ("build_instseg_resnet_backbone", "build_resnet_backbone"),
    ("build_instseg_resnet_fpn_backbone", "build_resnet_fpn_backbone"),
    ("build_instseg_retinanet_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_plain_is_what_detectron2_builds(ours, theirs):
    a, b = build(ours, config()), build(theirs, config())
    assert type(a) is type(b)
    x = torch.randn(1, 3, 64, 64)
    for name, value in a(x).items():
        assert torch.equal(value, b(x)[name])


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_starts_as_the_plain_network(modulated):
    # zero offsets: v1 is the plain network; v2 samples with factor one half, undone in the weights
    keys = {"DEFORM_ON_PER_STAGE": [False, True, True, True], "DEFORM_MODULATED": modulated}
    cfg = config(**keys, RES5_DILATION=2, STRIDE_IN_1X1=False, DEFORM_NUM_GROUPS=2)
    deformable = build("build_instseg_resnet_backbone", cfg).eval()
    plain = build("build_resnet_backbone", config(RES5_DILATION=2, STRIDE_IN_1X1=False)).eval()
    state = plain.state_dict()
    missing = deformable.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(".conv2_offset." in key for key in missing.missing_keys)
    if modulated:
        with torch.no_grad():
            for block in deformable.modules():
                if isinstance(block, DeformBottleneckBlock):
                    block.conv2.weight.mul_(2)
    x = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    expected = plain(x)
    for name, value in deformable(x).items():
        assert torch.allclose(value, expected[name], atol=1e-4, rtol=1e-4)
    assert deformable.output_shape() == plain.output_shape()


def test_fpn_finds_its_bottom_up():
    net = build(
        "build_instseg_resnet_fpn_backbone", config(DEFORM_ON_PER_STAGE=[False, False, True, False])
    )
    kinds = {type(block) for block in net.bottom_up.res4}
    assert kinds == {DeformBottleneckBlock}
    assert set(net(torch.randn(1, 3, 64, 64))) == {"p2", "p3", "p4", "p5", "p6"}


def test_parameter_names_are_detectron2s():
    cfg = config(DEFORM_ON_PER_STAGE=[False, False, False, True], DEFORM_MODULATED=True)
    net = build("build_instseg_resnet_backbone", cfg)
    names = {n for n in net.state_dict() if n.startswith("res5.0.")}
    layers = {n.split(".")[2] for n in names}
    assert layers == {"shortcut", "conv1", "conv2_offset", "conv2", "conv3"}
    assert {"res5.0.conv2.weight", "res5.0.conv2.norm.weight", "res5.0.conv2_offset.bias"} <= names
    assert net.res5[0].conv2_offset.weight.shape == (27, 64, 3, 3)
    assert not any("conv2_offset" in n for n in net.state_dict() if n.startswith("res4"))


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_trains_on_the_cpu(modulated):
    cfg = config(
        DEFORM_ON_PER_STAGE=[True] * 4, DEFORM_MODULATED=modulated, NORM="GN", NUM_GROUPS=1
    )
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 64, 32
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2"]
    net = build("build_instseg_resnet_backbone", cfg)
    assert not hasattr(net, "res3")
    out = net(torch.randn(1, 3, 32, 32))["res2"]
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert any(p.grad.any() for n, p in net.named_parameters() if "conv2_offset.weight" in n)


def test_frozen_stages_stay_frozen():
    cfg = config(DEFORM_ON_PER_STAGE=[True, True, False, False])
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    net = build("build_instseg_resnet_backbone", cfg)
    assert not any(p.requires_grad for p in net.res2.parameters())
    assert all(p.requires_grad for n, p in net.res3.named_parameters() if "conv2_offset" in n)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {
                "DEPTH": 18,
                "RES2_OUT_CHANNELS": 64,
                "DEFORM_ON_PER_STAGE": [False, False, False, True],
            },
            "DEFORM_ON_PER_STAGE needs bottleneck",
        ),
        ({"DEPTH": 34, "RES2_OUT_CHANNELS": 256}, "RES2_OUT_CHANNELS must be 64"),
        ({"DEFORM_ON_PER_STAGE": [True]}, "four values"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        build("build_instseg_resnet_fpn_backbone", config(**keys))


def test_the_config_is_left_alone():
    cfg = config(DEFORM_ON_PER_STAGE=[False, False, False, True])
    cfg.freeze()
    build("build_instseg_resnet_fpn_backbone", cfg)
    assert cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE == [False, False, False, True]


def test_every_name_is_registered():
    assert all(ours in BACKBONE_REGISTRY for ours, _ in PAIRS)
    assert {ours for ours, _ in PAIRS} <= set(module.__all__)
