"""Deformable backbones against detectron2's plain ones."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn
from torch.nn import functional as F

import instseg_ext.modeling.deform_resnet as module
from instseg_ext.config import add_shared_config
from instseg_ext.layers.deform_conv import split_offset_mask
from instseg_ext.modeling.deform_resnet import DeformBottleneckBlock

RGB = ShapeSpec(channels=3)


def config(**resnets):
    """R-50 of an eighth of the width."""
    cfg = get_cfg()
    add_shared_config(cfg)
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


@pytest.mark.parametrize(
    ("depth", "interval", "counts", "blocks"),
    [
        # the two trunks of YOLACT++
        (50, 1, (3, 4, 6, 3), {3: range(4), 4: range(6), 5: range(3)}),
        (101, 3, (3, 4, 23, 3), {3: (0, 3), 4: range(0, 23, 3), 5: (0,)}),
        # further apart than a stage is long: the first block alone
        (50, 7, (3, 4, 6, 3), {3: (0,), 4: (0,), 5: (0,)}),
    ],
)
def test_interval_chooses_the_blocks(depth, interval, counts, blocks):
    cfg = config(
        DEPTH=depth, DEFORM_ON_PER_STAGE=[False, True, True, True], DEFORM_INTERVAL=interval
    )
    with torch.device("meta"):
        net = build("build_instseg_resnet_backbone", cfg)
    for stage, count in zip((2, 3, 4, 5), counts, strict=True):
        kinds = [isinstance(b, DeformBottleneckBlock) for b in getattr(net, f"res{stage}")]
        assert kinds == [i in blocks.get(stage, ()) for i in range(count)]


def block_with_bias():
    """A strided modulated block; no two channels have the same bias and norm."""
    cfg = config(
        DEFORM_ON_PER_STAGE=[False, False, False, True],
        DEFORM_MODULATED=True,
        DEFORM_BIAS=True,
        STRIDE_IN_1X1=False,
        NORM="BN",
    )
    block = build("build_instseg_resnet_backbone", cfg).res5[0]
    norm = block.conv2.norm
    for tensor in (norm.weight, norm.bias, norm.running_mean, block.conv2.bias):
        tensor.data.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 1.5)
    return block.eval()


def test_bias_is_learned_and_starts_at_zero():
    on = {"DEFORM_ON_PER_STAGE": [False, False, False, True], "NORM": "BN"}
    net = build("build_instseg_resnet_backbone", config(DEFORM_BIAS=True, **on))
    names = {n for n, _ in net.named_parameters() if n.endswith("conv2.bias")}
    assert names == {f"res5.{b}.conv2.bias" for b in range(3)}
    assert all(not net.get_parameter(n).any() for n in names)
    assert all(net.get_parameter(n).requires_grad for n in names)
    plain = build("build_instseg_resnet_backbone", config(**on)).state_dict()
    assert not [n for n in plain if n.endswith("conv2.bias")]


def test_zero_offsets_give_half_of_a_plain_convolution_plus_the_bias():
    block = block_with_bias()
    conv = block.conv2
    x = torch.randn(2, conv.in_channels, 7, 9)
    offset, mask = split_offset_mask(block.conv2_offset(x), modulated=True)
    assert not offset.any()
    assert torch.equal(mask, torch.full_like(mask, 0.5))
    half = F.conv2d(x, conv.weight, stride=2, padding=1) / 2
    torch.testing.assert_close(conv(x, offset, mask), conv.norm(half + conv.bias[:, None, None]))


def test_bias_folds_into_the_norms_mean():
    block = block_with_bias()
    nn.init.normal_(block.conv2_offset.weight, std=0.1)
    x = torch.randn(2, block.in_channels, 7, 9)
    with torch.no_grad():
        expected = block(x)
        block.conv2.norm.running_mean -= block.conv2.bias
        block.conv2.bias.zero_()
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_frozen_stages_stay_frozen(bias):
    cfg = config(DEFORM_ON_PER_STAGE=[True, True, False, False], DEFORM_BIAS=bias)
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
        ({"DEFORM_INTERVAL": 0}, "DEFORM_INTERVAL must be at least 1"),
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
