"""DarkNet-53 against its published layer list."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from instseg_ext.config import add_shared_config
from instseg_ext.layers.folded_conv import fold_norms
from instseg_ext.modeling.darknet import STAGES, DarkNet, DarkNetBlock, build_darknet53_backbone


def config(**node):
    cfg = get_cfg()
    add_shared_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_darknet53_backbone", 0
    cfg.MODEL.DARKNET.WIDTH = 4
    for key, value in node.items():
        setattr(cfg.MODEL.DARKNET, key, value)
    return cfg


class Listed(nn.Module):
    """The network as the paper's table lists it: one convolution after the other."""

    def __init__(self, width):
        super().__init__()
        self.convs = nn.ModuleList()
        self.adds, self.ends = set(), []
        channels = self._append(3, width)
        for blocks in (1, 2, 8, 8, 4):
            channels = self._append(channels, 2 * channels, stride=2)
            for _ in range(blocks):
                half = self._append(channels, channels // 2, kernel_size=1)
                self._append(half, channels)
                self.adds.add(len(self.convs) - 1)
            self.ends.append(len(self.convs) - 1)

    def _append(self, a, b, kernel_size=3, stride=1):
        conv = nn.Conv2d(a, b, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.convs.append(nn.Sequential(conv, nn.BatchNorm2d(b), nn.LeakyReLU(0.1)))
        return b

    def forward(self, x):
        outputs = []
        for i, conv in enumerate(self.convs):
            outputs.append(conv(x))
            if i in self.adds:
                outputs[i] = outputs[i] + outputs[i - 2]
            x = outputs[i]
        return [outputs[i] for i in self.ends]


def with_uneven_statistics(net):
    """Fill the norms' tensors so that no two channels are alike."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.5, 0.5)
    return net


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_features_are_those_of_the_layer_list(folded):
    theirs = with_uneven_statistics(Listed(8)).eval()
    ours = DarkNet(width=8, out_features=STAGES).eval()
    # Both list their layers in the order of the data's way, which makes names unnecessary here.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    if folded:
        fold_norms(ours)
    x = torch.randn(2, 3, 45, 64)
    with torch.no_grad():
        found, expected = ours(x), theirs(x)
    assert list(found) == list(STAGES)
    for mine, wanted in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


def test_names_strides_channels_and_parameter_count():
    with torch.device("meta"):
        net, listed = DarkNet(out_features=STAGES), Listed(32)
    assert net.output_shape() == {
        name: ShapeSpec(channels=64 * 2**i, stride=2 * 2**i) for i, name in enumerate(STAGES)
    }
    assert net.size_divisibility == 0
    numbers = [sum(p.numel() for p in x.parameters()) for x in (net, listed)]
    assert numbers == [40_584_928] * 2
    layers = {name.removesuffix(".weight") for name in net.state_dict() if "norm" not in name}
    blocks = {f"stage{s}.{k}" for s, n in enumerate((1, 2, 8, 8, 4), 1) for k in range(1, n + 1)}
    assert layers == (
        {"stem"}
        | {f"{name}.0" for name in STAGES}
        | {f"{block}.conv{i}" for block in blocks for i in (1, 2)}
    )
    assert "stage1.0.norm.running_mean" in net.state_dict()


def test_default_features_are_those_at_strides_8_16_32():
    net = build_backbone(config())
    shapes = {n: tuple(v.shape) for n, v in net(torch.randn(2, 3, 50, 65)).items()}
    assert shapes == {"stage3": (2, 32, 7, 9), "stage4": (2, 64, 4, 5), "stage5": (2, 128, 2, 3)}
    assert not hasattr(build_backbone(config(OUT_FEATURES=["stage2"])), "stage3")


def test_builder_freezes_the_stem_and_the_first_stages():
    cfg = config()
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    net = build_backbone(cfg)
    for part in (net.stem, net.stage1):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in part.modules())
        assert any(isinstance(m, FrozenBatchNorm2d) for m in part.modules())
        assert not any(p.requires_grad for p in part.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in net.stage2.modules())
    assert all(p.requires_grad for p in net.stage2.parameters())
    features = net(torch.randn(2, 3, 64, 64))
    sum(f.square().sum() for f in features.values()).backward()
    assert all(p.grad.any() for p in net.parameters() if p.requires_grad)


def test_without_a_norm_there_is_a_bias():
    net = build_backbone(config(NORM=""))
    assert net.stem.bias is not None
    assert all(p.requires_grad for p in net.parameters())


def test_the_input_of_a_block_survives():
    block = DarkNetBlock(8, norm="BN")
    x = torch.randn(1, 8, 8, 8)
    before = x.clone()
    block(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("names", [["res2"], []])
def test_unknown_features_are_refused(names):
    with pytest.raises(ValueError, match=r"MODEL\.DARKNET\.OUT_FEATURES must be one of stage1"):
        build_darknet53_backbone(config(OUT_FEATURES=names), ShapeSpec(channels=3))
