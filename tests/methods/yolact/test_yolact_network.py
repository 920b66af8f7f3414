"""The network of YOLACT: sizes, parameter counts, names, initial state and order of outputs."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import Backbone, build_backbone
from methods.project import count
from torch import nn

import instseg_ext
from instseg_ext.methods.yolact.fpn import YOLACTFPN
from instseg_ext.methods.yolact.head import YOLACTHead, YOLACTOutputs, to_reference_layout
from instseg_ext.methods.yolact.protonet import ProtoNet
from instseg_ext.modeling.deform_resnet import DeformBottleneckBlock
from instseg_ext.modeling.mobilenet import MobileNetV2

LEVELS = ("p3", "p4", "p5", "p6", "p7")


def backbone_config(bottom_up="resnet", *, depth=50, dcn_interval=0):
    """The published backbones; ``dcn_interval`` 0 is without deformable convolution."""
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_yolact_fpn_backbone", 0
    cfg.MODEL.YOLACT.BOTTOM_UP = bottom_up
    node = cfg.MODEL.RESNETS
    node.DEPTH, node.NORM, node.STRIDE_IN_1X1 = depth, "BN", False
    node.OUT_FEATURES = ["res3", "res4", "res5"]
    if dcn_interval:
        node.DEFORM_ON_PER_STAGE = [False, True, True, True]
        node.DEFORM_MODULATED, node.DEFORM_BIAS = True, True
        node.DEFORM_INTERVAL = dcn_interval
    return cfg


def narrow(cfg):
    """Make the backbone an eighth as wide."""
    node = cfg.MODEL.RESNETS
    node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS, node.WIDTH_PER_GROUP = 8, 32, 8
    cfg.MODEL.DARKNET.WIDTH, cfg.MODEL.MOBILENET.WIDTH_MULTIPLIER = 4, 0.25
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    return cfg


def head_of(channels=256, **options):
    shapes = {name: ShapeSpec(channels=channels, stride=2 ** int(name[1:])) for name in LEVELS}
    return YOLACTHead(shapes, in_features=LEVELS, **options)


def tiny_head(**options):
    small = {"num_anchors": 3, "num_classes": 4, "num_protos": 6, "width": 16}
    return head_of(8, **{**small, **options})


def pyramid(channels=8, sizes=((7, 9), (4, 5), (2, 3), (1, 2), (1, 1)), num=2):
    return {
        name: torch.randn(num, channels, *size) for name, size in zip(LEVELS, sizes, strict=True)
    }


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "dcn_interval", "trunk", "total"),
    [
        (50, 0, 23_508_032, 31_164_943),
        (101, 0, 42_500_160, 50_157_071),
        (50, 1, 23_508_032 + 874_847, 33_766_460),
        (101, 3, 42_500_160 + 687_401, 52_571_142),
    ],
    ids=["R50", "R101", "R50++", "R101++"],
)
def test_parameter_counts(depth, dcn_interval, trunk, total):
    plus = dcn_interval > 0
    cfg = backbone_config(depth=depth, dcn_interval=dcn_interval)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        head = head_of(num_anchors=9 if plus else 3, num_classes=80, mask_iou=plus)
    assert count(backbone.bottom_up) == trunk
    assert count(backbone) - trunk == 3_868_672
    assert count(head.protonet) == 2_368_544
    assert count(head.semantic) == 20_560
    predictors = (head.shared_conv, head.box_pred, head.class_pred, head.coefficient_pred)
    assert count(*predictors) == (3_017_245 if plus else 1_399_135)
    assert (head.mask_iou is not None) == plus
    assert not plus or count(head.mask_iou) == 108_560
    assert count(backbone, head) == total
    deformable = [m for m in backbone.modules() if isinstance(m, DeformBottleneckBlock)]
    assert len(deformable) == {0: 0, 1: 13, 3: 11}[dcn_interval]


@pytest.mark.parametrize(
    ("bottom_up", "size", "sides", "protos", "per_cell", "anchors"),
    [
        ("resnet", 400, (50, 25, 13, 7, 4), 100, 3, 10_077),
        ("resnet", 550, (69, 35, 18, 9, 5), 138, 3, 19_248),
        ("resnet", 550, (69, 35, 18, 9, 5), 138, 9, 57_744),
        ("resnet", 700, (88, 44, 22, 11, 6), 176, 3, 30_963),
        ("darknet53", 550, (69, 35, 18, 9, 5), 138, 3, 19_248),
        ("mobilenetv2", 550, (69, 35, 18, 9, 5), 138, 3, 19_248),
    ],
)
def test_sizes(bottom_up, size, sides, protos, per_cell, anchors):
    cfg = narrow(backbone_config(bottom_up))
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        head = head_of(32, num_anchors=per_cell, num_classes=2, num_protos=4, width=8).eval()
        features = backbone(torch.empty(1, 3, size, size))
        raw = head(features)
    assert list(features) == list(backbone.output_shape()) == list(LEVELS)
    assert [tuple(f.shape) for f in features.values()] == [(1, 32, side, side) for side in sides]
    assert raw.level_sizes == tuple((side, side) for side in sides)
    assert raw.prototypes.shape == (1, 4, protos, protos)
    assert raw.box_deltas.shape == (1, anchors, 4)
    assert raw.class_logits.shape == (1, anchors, 3)
    assert raw.coefficients.shape == (1, anchors, 4)
    # No padding of the batch.
    assert backbone.size_divisibility == 0
    assert not backbone.padding_constraints


# --- pyramid -------------------------------------------------------------------------------------


class Trunk(Backbone):
    """Gives the features it is told to."""

    def __init__(self, strides=(8, 16, 32)):
        super().__init__()
        self._out_features = [f"c{stride}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = {f"c{stride}": stride // 2 for stride in strides}
        self.features = None

    def forward(self, x):
        return self.features


@pytest.fixture
def fpn():
    net = YOLACTFPN(Trunk(), out_channels=6)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    net.bottom_up.features = {
        "c8": torch.randn(2, 4, 13, 18),
        "c16": torch.randn(2, 8, 7, 9),
        "c32": torch.randn(2, 16, 4, 5),
    }
    return net


def test_pyramid_equals_its_definition(fpn):
    def conv(name, x, **options):
        layer = fpn.get_submodule(name)
        return F.conv2d(x, layer.weight, layer.bias, **options)

    def grown(x, finer):
        return F.interpolate(x, size=finer.shape[-2:], mode="bilinear", align_corners=False)

    c3, c4, c5 = fpn.bottom_up.features.values()
    x5 = conv("fpn_lateral5", c5)
    x4 = conv("fpn_lateral4", c4) + grown(x5, c4)
    x3 = conv("fpn_lateral3", c3) + grown(x4, c3)
    for found, expected in zip(fpn.top_down(fpn.bottom_up.features), (x3, x4, x5), strict=True):
        torch.testing.assert_close(found, expected)
    p3, p4, p5 = (
        F.relu(conv(f"fpn_output{level}", x, padding=1)) for level, x in ((3, x3), (4, x4), (5, x5))
    )
    p6 = conv("fpn_downsample6", p5, stride=2, padding=1)
    p7 = conv("fpn_downsample7", p6, stride=2, padding=1)
    found = fpn(None)
    assert list(found) == list(LEVELS)
    for level, expected in zip(found.values(), (p3, p4, p5, p6, p7), strict=True):
        torch.testing.assert_close(level, expected)


def test_only_the_coarsest_levels_may_be_negative(fpn):
    levels = fpn(None)
    assert all(levels[name].min() == 0 for name in ("p3", "p4", "p5"))
    assert all(levels[name].min() < 0 for name in ("p6", "p7"))


def test_coarse_features_reach_the_finest_level(fpn):
    before = fpn(None)["p3"]
    fpn.bottom_up.features["c32"] = fpn.bottom_up.features["c32"] + 1
    assert (fpn(None)["p3"] != before).any()


def test_features_must_double_their_strides():
    with pytest.raises(ValueError, match=r"c8, c16, c64 are \[8, 16, 64\]"):
        YOLACTFPN(Trunk((8, 16, 64)))
    trunk = MobileNetV2(multiplier=0.25, out_features=("stage3", "stage4", "stage5"))
    with pytest.raises(ValueError, match="OUT_FEATURES of its trunk"):
        YOLACTFPN(trunk)


def test_unknown_trunks_are_refused():
    with pytest.raises(ValueError, match=r"MODEL\.YOLACT\.BOTTOM_UP must be one of resnet, dark"):
        build_backbone(backbone_config("vgg16"))


@pytest.mark.parametrize(
    ("bottom_up", "names"),
    [
        ("resnet", {"stem.conv1.weight", "res3.0.shortcut.norm.bias", "res5.2.conv3.weight"}),
        ("darknet53", {"stem.weight", "stage3.0.norm.weight", "stage5.4.conv2.weight"}),
        ("mobilenetv2", {"stem.conv1.weight", "stage6.2.project.weight"}),
    ],
)
def test_state_dict_names_of_the_backbone(bottom_up, names):
    cfg = narrow(backbone_config(bottom_up))
    with torch.device("meta"):
        found = set(build_backbone(cfg).state_dict())
    assert {f"bottom_up.{name}" for name in names} <= found
    parts = [f"fpn_{kind}{level}" for kind in ("lateral", "output") for level in (3, 4, 5)]
    parts += ["fpn_downsample6", "fpn_downsample7"]
    own = {name for name in found if not name.startswith("bottom_up.")}
    assert own == {f"{part}.{p}" for part in parts for p in ("weight", "bias")}


# --- head ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_iou", [False, True])
def test_state_dict_names_of_the_head(mask_iou):
    layers = ["shared_conv", "box_pred", "class_pred", "coefficient_pred", "semantic"]
    layers += [f"protonet.{name}" for name in ("conv1", "conv2", "conv3", "conv4", "pred")]
    if mask_iou:
        layers += [f"mask_iou.{name}" for name in ("conv1", "conv2", "conv3", "conv4", "conv5")]
        layers += ["mask_iou.pred"]
    expected = {f"{layer}.{p}" for layer in layers for p in ("weight", "bias")}
    assert set(tiny_head(mask_iou=mask_iou).state_dict()) == expected


def test_initial_state():
    backbone = YOLACTFPN(Trunk(), out_channels=64)
    head = head_of(64, num_anchors=3, num_classes=20, width=64, mask_iou=True)
    convs = [m for net in (backbone, head) for m in net.modules() if isinstance(m, Conv2d)]
    assert len(convs) == 8 + 4 + 5 + 1 + 6
    for conv in convs:
        assert not conv.bias.any()
        fan_in, fan_out = (conv.weight[0].numel(), conv.weight[:, 0].numel())
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert conv.weight.abs().max() <= bound
        if conv.weight.numel() > 1000:
            deviation = bound / math.sqrt(3)
            assert conv.weight.std().item() == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_order_of_the_outputs(memory_format):
    head = tiny_head().eval()
    features = {n: f.contiguous(memory_format=memory_format) for n, f in pyramid().items()}
    with torch.no_grad():
        raw = head(features)
        shared = {name: head.shared_conv(f) for name, f in features.items()}
        for output, layer in (
            (raw.box_deltas, head.box_pred),
            (raw.class_logits, head.class_pred),
            (raw.coefficients.atanh(), head.coefficient_pred),
        ):
            dim = output.shape[2]
            expected = [
                layer(shared[name])[:, a * dim : (a + 1) * dim, row, column]
                for name, (height, width) in zip(LEVELS, raw.level_sizes, strict=True)
                for row in range(height)
                for column in range(width)
                for a in range(3)
            ]
            torch.testing.assert_close(output, torch.stack(expected, 1), atol=1e-5, rtol=1e-5)


def test_prototypes_equal_their_definition():
    net = ProtoNet(8, width=16, num_protos=6)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    x = torch.randn(2, 8, 5, 7)
    expected = x
    for name in ("conv1", "conv2", "conv3", "double", "conv4", "pred"):
        if name == "double":
            expected = F.relu(F.interpolate(expected, size=(10, 14), mode="bilinear"))
            continue
        conv = net.get_submodule(name)
        padding = 0 if name == "pred" else 1
        expected = F.relu(F.conv2d(expected, conv.weight, conv.bias, padding=padding))
    found = net(x)
    torch.testing.assert_close(found, expected)
    assert found.min() == 0


def test_semantic_maps_are_made_in_training_only():
    head = tiny_head()
    features = pyramid()
    raw = head(features)
    semantic = F.conv2d(features["p3"], head.semantic.weight, head.semantic.bias)
    torch.testing.assert_close(raw.semantic_logits, semantic)
    assert head.eval()(features).semantic_logits is None


def test_the_head_leaves_its_inputs_alone_and_every_parameter_gets_a_gradient():
    head = tiny_head()
    features = {name: f.requires_grad_() for name, f in pyramid().items()}
    before = {name: f.detach().clone() for name, f in features.items()}
    raw = head(features)
    sum(t.square().sum() for t in raw[:5]).backward()
    assert all(p.grad.any() for p in head.parameters())
    for name, feature in features.items():
        assert torch.equal(feature, before[name])
        assert feature.grad.any()


def random_outputs():
    return YOLACTOutputs(
        box_deltas=torch.randn(2, 11, 4),
        class_logits=torch.randn(2, 11, 5),
        coefficients=torch.randn(2, 11, 6).tanh(),
        prototypes=torch.rand(2, 6, 4, 7),
        semantic_logits=None,
        level_sizes=((2, 4), (1, 3)),
    )


def test_masks_equal_one_sum_per_anchor():
    raw = random_outputs()
    selection = [torch.tensor([0, 7, 7, 10]), torch.tensor([], dtype=torch.int64)]
    head = tiny_head()
    masks = head.masks(raw, selection)
    assert [tuple(m.shape) for m in masks] == [(4, 4, 7), (0, 4, 7)]
    for anchor, mask in zip(selection[0].tolist(), masks[0], strict=True):
        weights = raw.coefficients[0, anchor]
        expected = sum(w * p for w, p in zip(weights, raw.prototypes[0], strict=True))
        torch.testing.assert_close(mask, expected.sigmoid())
    everything = head.masks(raw)
    assert [tuple(m.shape) for m in everything] == [(11, 4, 7)] * 2
    torch.testing.assert_close(everything[0][selection[0]], masks[0])


def test_half_precision_outputs_give_masks_of_full_precision():
    head = tiny_head().eval()
    with torch.autocast("cpu", torch.bfloat16):
        raw = head(pyramid())
        masks = head.masks(raw)
    assert raw.coefficients.dtype == raw.prototypes.dtype == torch.bfloat16
    assert masks[0].dtype == torch.float32


def test_reference_layout():
    raw = random_outputs()
    reference = to_reference_layout(raw)
    assert set(reference) == {"loc", "conf", "mask", "proto"}
    assert torch.equal(reference["loc"], raw.box_deltas)
    # background, the last of our classes, comes first
    assert torch.equal(reference["conf"], raw.class_logits[..., [4, 0, 1, 2, 3]])
    assert torch.equal(reference["mask"], raw.coefficients)
    assert reference["proto"].shape == (2, 4, 7, 6)
    assert torch.equal(reference["proto"][1, 2, 3], raw.prototypes[1, :, 2, 3])
    semantic = torch.randn(2, 4, 2, 4)
    assert to_reference_layout(raw._replace(semantic_logits=semantic))["segm"] is semantic
