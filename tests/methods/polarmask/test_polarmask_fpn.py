"""PolarMask's pyramid: levels, padding, deformable trunks, and what it refuses."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn
from torch.nn import functional as F

import instseg_ext
from instseg_ext.layers.deform_conv import DeformConv
from instseg_ext.methods.polarmask.fpn import PolarMaskFPN
from instseg_ext.modeling.deform_resnet import DeformBottleneckBlock

LEVELS = ("p3", "p4", "p5", "p6", "p7")


def config(*, depth=50, groups=1, width=64, deform=None):
    """The published backbones; ``deform`` is None, ``v1`` or ``v2``."""
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_polarmask_resnet_fpn_backbone"
    node = cfg.MODEL.RESNETS
    node.DEPTH, node.NUM_GROUPS, node.WIDTH_PER_GROUP = depth, groups, width
    node.STRIDE_IN_1X1 = groups == 1
    node.OUT_FEATURES = ["res3", "res4", "res5"]
    if deform:
        node.DEFORM_ON_PER_STAGE = [False, True, True, True]
        node.DEFORM_MODULATED = deform == "v2"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    return cfg


def narrow(**options):
    """The same with a sixteenth of the channels."""
    cfg = config(**{"width": 4, **options})
    node = cfg.MODEL.RESNETS
    node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS = 8, 16
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    return cfg


def count(module):
    return sum(p.numel() for p in module.parameters())


# --- structure ------------------------------------------------------------------------------------


# Convolutions of the plain trunks: torchvision's counts less classifier and norms.
TRUNKS = {(50, 1): 23_454_912, (101, 1): 42_394_816, (101, 64): 81_203_392}
BLOCKS = {50: (4, 6, 3), 101: (4, 23, 3)}


@pytest.mark.parametrize("deform", [None, "v1", "v2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"depth": 101}, {"depth": 101, "groups": 64, "width": 4}],
    ids=["R50", "R101", "X101"],
)
def test_published_backbones(options, deform):
    cfg = config(**options, deform=deform)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    depth, groups = options.get("depth", 50), options.get("groups", 1)
    trunk, blocks = TRUNKS[depth, groups], []
    if deform:
        blocks = [m for m in backbone.bottom_up.modules() if isinstance(m, DeformBottleneckBlock)]
        assert len(blocks) == sum(BLOCKS[depth])
        widths = [(128 if groups == 1 else 512) * 2**i for i in range(3)]
        out = 27 if deform == "v2" else 18
        trunk += sum(n * out * (9 * w + 1) for n, w in zip(BLOCKS[depth], widths, strict=True))
    assert all(isinstance(block.conv2, DeformConv) for block in blocks)
    assert all(block.conv2.groups == groups for block in blocks)
    assert count(backbone.bottom_up) == trunk
    # Laterals of 512, 1024 and 2048 channels, and five 3x3 convolutions.
    assert count(backbone) - trunk == 3584 * 256 + 3 * 256 + 5 * (9 * 256 * 256 + 256)
    # The published trunks differ in where a stage halves its maps.
    first = backbone.bottom_up.res3[0]
    strides = (first.conv1.stride, first.conv2.stride)
    assert strides == (((2, 2), (1, 1)) if groups == 1 else ((1, 1), (2, 2)))


def test_names_and_sizes():
    backbone = build_backbone(narrow())
    assert isinstance(backbone, PolarMaskFPN)
    assert backbone.size_divisibility == 128
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == {
        name: 2 ** int(name[1:]) for name in LEVELS
    }
    names = {name for name, _ in backbone.named_parameters() if "bottom_up" not in name}
    layers = [f"fpn_{kind}{level}" for kind in ("lateral", "output") for level in (3, 4, 5)]
    layers += ["top_block.p6", "top_block.p7"]
    assert names == {f"{layer}.{key}" for layer in layers for key in ("weight", "bias")}
    assert not any(
        p.any() for name, p in backbone.named_parameters() if name in names and "bias" in name
    )
    features = backbone(torch.randn(1, 3, 128, 256))
    assert {name: tuple(x.shape) for name, x in features.items()} == {
        name: (1, 8, 128 // stride, 256 // stride)
        for name, stride in zip(LEVELS, (8, 16, 32, 64, 128), strict=True)
    }


def test_levels_of_a_batch_padded_to_32_only():
    cfg = narrow()
    cfg.MODEL.POLARMASK.SIZE_DIVISIBILITY = 32
    backbone = build_backbone(cfg)
    assert backbone.size_divisibility == 32
    sizes = [tuple(x.shape[2:]) for x in backbone(torch.randn(1, 3, 96, 160)).values()]
    assert sizes == [(12, 20), (6, 10), (3, 5), (2, 3), (1, 2)]


def conv(layer, x, **options):
    return F.conv2d(x, layer.weight, layer.bias, **options)


def test_acceptance_check_10_coarse_levels_come_from_p5():
    backbone = build_backbone(narrow()).eval()
    x = torch.randn(1, 3, 128, 256)
    trunk, levels = backbone.bottom_up(x), backbone(x)
    merged = conv(backbone.fpn_lateral5, trunk["res5"])
    p5 = conv(backbone.fpn_output5, merged, padding=1)
    p6 = conv(backbone.top_block.p6, p5, stride=2, padding=1)
    p7 = conv(backbone.top_block.p7, p6.relu(), stride=2, padding=1)
    up = F.interpolate(merged, scale_factor=2, mode="nearest")
    p4 = conv(backbone.fpn_output4, conv(backbone.fpn_lateral4, trunk["res4"]) + up, padding=1)
    assert p6.min() < 0  # or the ReLU before p7 would not show
    for name, expected in (("p4", p4), ("p5", p5), ("p6", p6), ("p7", p7)):
        torch.testing.assert_close(levels[name], expected, rtol=1e-4, atol=1e-5)

    # res5 reaches p6 through p5 alone.
    nn.init.zeros_(backbone.fpn_output5.weight)
    backbone.fpn_output5.bias.data.fill_(1.0)
    other = backbone(torch.randn(1, 3, 128, 256))
    again = backbone(x)
    assert torch.equal(other["p6"], again["p6"])
    assert not torch.equal(other["p4"], again["p4"])


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_a_grouped_deformable_trunk_starts_as_the_plain_one(modulated):
    options = {"depth": 50, "groups": 64, "width": 1}
    cfg = narrow(**options, deform="v2" if modulated else "v1")
    deformable, plain = build_backbone(cfg), build_backbone(narrow(**options))
    found = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(".conv2_offset." in name for name in found.missing_keys)
    if modulated:  # every sample counts half before training
        for module in deformable.modules():
            if isinstance(module, DeformConv):
                module.weight.data.mul_(2)
    x = torch.randn(1, 3, 64, 64)
    expected = plain(x)
    for name, level in deformable(x).items():
        torch.testing.assert_close(level, expected[name], rtol=1e-4, atol=1e-4)


# --- which levels there are -----------------------------------------------------------------------


def levels_config(head, trunk=("res3", "res4", "res5")):
    cfg = narrow()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.POLARMASK.IN_FEATURES = list(head)
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = list(trunk)
    return cfg


@pytest.mark.parametrize(
    ("head", "trunk"),
    [
        (LEVELS, ("res3", "res4", "res5")),
        (("p3", "p4", "p5"), ("res3", "res4", "res5")),
        (("p3", "p4", "p6", "p7"), ("res3", "res4", "res5")),
        (("p4", "p5", "p7"), ("res4", "res5")),
        (("p2", "p3"), ("res2", "res3")),
    ],
)
def test_every_parameter_is_reached_from_the_levels_that_are_read(head, trunk):
    backbone = build_backbone(levels_config(head, trunk))
    levels = backbone(torch.randn(1, 3, 64, 64))
    assert set(head) <= set(levels)
    assert ("p7" in levels) == ("p7" in head)
    sum(levels[name].sum() for name in head).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("head", "trunk", "message"),
    [
        (("p3", "p4", "p5", "p6"), ("res3", "res4", "res5"), "must name p7 when it names p6"),
        (("p4", "p5", "p6", "p7"), ("res3", "res4", "res5"), "leaves out p3, .*FPN.IN_FEATURES"),
        (("p3", "p4"), ("res3", "res4", "res5"), "leaves out p5"),
        (("p3", "p4", "p7"), ("res3", "res4"), r"stride 32 as the last of MODEL.FPN.IN_FEATURES"),
    ],
)
def test_levels_that_would_not_be_trained_are_refused(head, trunk, message):
    with pytest.raises(ValueError, match="MODEL.POLARMASK.IN_FEATURES .*" + message):
        build_backbone(levels_config(head, trunk))


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "must name the features"), (["res3", "res9"], "must be one of res3, .*'res9'")],
)
def test_features_that_the_trunk_lacks_are_refused(names, message):
    cfg = narrow()
    cfg.MODEL.FPN.IN_FEATURES = names
    with pytest.raises(ValueError, match="MODEL.FPN.IN_FEATURES " + message):
        build_backbone(cfg)


@pytest.mark.parametrize("value", [0, -32, 16, 48])
def test_padding_that_does_not_fit_the_trunk_is_refused(value):
    cfg = narrow()
    cfg.MODEL.POLARMASK.SIZE_DIVISIBILITY = value
    message = f"MODEL.POLARMASK.SIZE_DIVISIBILITY must be a multiple of 32, .* not {value}"
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)
