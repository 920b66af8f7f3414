"""PANet's two paths: levels, recursion, norms, sizes (acceptance checks 1, 2, 3 and 7)."""

import pytest
import torch
from detectron2.modeling import FPN, build_backbone
from methods.panet.panet_toys import config, count, narrow
from torch import nn
from torch.nn import functional as F

from instseg_ext.methods.panet.fpn import PANetFPN

PATH = [
    f"pan_{kind}{level}" for kind, low in (("down", 2), ("out", 3)) for level in range(low, low + 3)
]


def backbone(norm="GN"):
    return build_backbone(narrow(["MODEL.FPN.NORM", norm]))


def plain_levels(net, x):
    """The levels of detectron2's pyramid with the same weights."""
    return FPN.forward(net, x)


def test_parameter_counts():
    cfg = config()
    with torch.device("meta"):
        net = build_backbone(cfg)
    fpn = [m for name, m in net.named_children() if name.startswith("fpn_")]
    path = [m for name, m in net.named_children() if name.startswith("pan_")]
    assert sum(map(count, fpn)) == 3_346_432
    assert sum(map(count, path)) == 3_543_552


def test_names():
    names = {n for n in backbone().state_dict() if not n.startswith("bottom_up.")}
    pyramid = [f"fpn_{kind}{level}" for kind in ("lateral", "output") for level in (2, 3, 4, 5)]
    expected = {
        f"{n}.{w}" for n in (*pyramid, *PATH) for w in ("weight", "norm.weight", "norm.bias")
    }
    assert names == expected | {f"{n}.bias" for n in PATH}


def test_acceptance_check_1_levels():
    net = backbone().eval()
    assert isinstance(net, PANetFPN)
    assert net.size_divisibility == 32
    assert {n: s.stride for n, s in net.output_shape().items()} == {
        "p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64,
    }  # fmt: skip
    assert {s.channels for s in net.output_shape().values()} == {32}
    x = torch.randn(2, 3, 64, 160)
    levels, plain = net(x), plain_levels(net, x)
    assert list(levels) == list(net.output_shape())
    assert torch.equal(levels["p2"], plain["p2"])
    assert torch.equal(levels["p6"], levels["p5"][:, :, ::2, ::2])
    assert levels["p2"].min() < 0
    for name in ("p3", "p4", "p5"):
        assert levels[name].min() >= 0
        assert not torch.equal(levels[name], plain[name])


@pytest.mark.parametrize("norm", ["", "GN", "BN", "SyncBN"])
def test_levels_equal_the_formula(norm):
    net = backbone(norm).eval()
    with torch.no_grad():
        for name in PATH:
            nn.init.normal_(net.get_submodule(name).bias)
        x = torch.randn(1, 3, 64, 96)
        levels, plain = net(x), plain_levels(net, x)
    assert all((net.get_submodule(name).norm is None) == (norm == "") for name in PATH)
    finished = plain["p2"]
    for level in (3, 4, 5):
        for name, stride in ((f"pan_down{level - 1}", 2), (f"pan_out{level}", 1)):
            conv = net.get_submodule(name)
            y = F.conv2d(finished, conv.weight, conv.bias, stride, 1)
            y = (y if conv.norm is None else conv.norm(y)).relu()
            finished = y + plain[f"p{level}"] if stride == 2 else y
        torch.testing.assert_close(levels[f"p{level}"], finished)


def test_acceptance_check_2_recursion_over_finished_levels():
    net = backbone().eval()
    x = torch.randn(1, 3, 64, 64)
    plain = plain_levels(net, x)
    with torch.no_grad():
        for level in (2, 3, 4):
            down = net.get_submodule(f"pan_down{level}")
            for p in down.parameters():
                p.zero_()
        levels = net(x)
        for level in (3, 4, 5):
            out = net.get_submodule(f"pan_out{level}")
            assert torch.equal(levels[f"p{level}"], out(plain[f"p{level}"]))

    net = backbone().eval()
    with torch.no_grad():
        before = net(x)
        net.pan_out3.weight.normal_()
        after = net(x)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["p3", "p4", "p5", "p6"]


@pytest.mark.parametrize("size", [(32, 96), (32, 32), (96, 160)])
def test_acceptance_check_3_odd_levels_line_up(size):
    sizes = [tuple(x.shape[2:]) for x in backbone("BN").eval()(torch.randn(1, 3, *size)).values()]
    strides = [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert sizes == [*strides, tuple((n + 1) // 2 for n in strides[-1])]


def test_start_of_training():
    net = backbone()
    for name in PATH:
        conv = net.get_submodule(name)
        bound = (3 / (9 * 32)) ** 0.5
        assert 0.95 * bound < conv.weight.abs().max() <= bound
        assert not conv.bias.any()


def test_every_parameter_is_trained():
    net = backbone()
    levels = net(torch.randn(2, 3, 64, 64))
    sum(levels[name].sum() for name in ("p2", "p3", "p4", "p5")).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
