"""The VGG trunk against torchvision's."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch.nn import functional as F

import instseg_ext
from instseg_ext.modeling.vgg import STAGES, VGG, build_vgg16_backbone

NARROW = ["MODEL.BACKBONE.NAME", "build_vgg16_backbone", "MODEL.VGG.WIDTH", 4]


def config(*opts):
    return instseg_ext.get_config(
        "MaskRCNN/nuclei_mask_rcnn_R_18_FPN", ["MODEL.DEVICE", "cpu", *NARROW, *opts]
    )


def layers_of(net):
    return [layer for name, layer in net.named_children() if name.startswith("conv")]


def torchvision_features(model, x):
    """Features of torchvision's Sequential before each pool, as ``conv1`` to ``conv5``."""
    features = {}
    for layer in model.features:
        if isinstance(layer, torch.nn.MaxPool2d):
            features[f"conv{len(features) + 1}"] = x
        x = layer(x)
    return features


@pytest.mark.parametrize("norm", ["", "BN"])
def test_features_are_torchvisions(norm):
    with torch.device("meta"):  # without the 124 million parameters behind the trunk
        theirs = (torchvision.models.vgg16_bn if norm else torchvision.models.vgg16)()
    theirs.features.to_empty(device="cpu")
    ours = VGG(out_features=STAGES, norm=norm, ceil_mode=False).eval()
    theirs.features.load_state_dict(
        dict(
            zip(theirs.features.state_dict(), interleaved(ours, with_norm=bool(norm)), strict=True)
        )
    )
    x = torch.randn(1, 3, 45, 64)
    with torch.inference_mode():
        expected = torchvision_features(theirs.eval(), x)
        found = ours(x)
    assert list(found) == list(STAGES)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-5, rtol=1e-5)


def interleaved(net, *, with_norm):
    """Tensors of ``net`` in the order of torchvision's Sequential; norms get uneven statistics."""
    for layer in layers_of(net):
        if with_norm:
            for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean):
                tensor.data.uniform_(0.5, 1.5)
            layer.norm.running_var.uniform_(0.5, 1.5)
        yield from (layer.weight.data, layer.bias.data)
        if with_norm:
            yield from layer.norm.state_dict().values()


def test_names_strides_and_channels():
    net = VGG(out_features=("conv3", "conv5"), width=4)
    names = [name for name, _ in net.named_children()]
    counts = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
    assert names == [f"conv{s}_{i}" for s, n in counts.items() for i in range(1, n + 1)]
    assert set(net.state_dict()) == {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    assert net.output_shape() == {
        "conv3": ShapeSpec(channels=16, stride=4),
        "conv5": ShapeSpec(channels=32, stride=16),
    }
    assert net.size_divisibility == 0
    features = net(torch.randn(2, 3, 32, 48))
    assert {k: v.shape for k, v in features.items()} == {
        "conv3": (2, 16, 8, 12),
        "conv5": (2, 32, 2, 3),
    }


def test_parameter_count_is_the_published_one():
    with torch.device("meta"):
        net = VGG()
    assert sum(p.numel() for p in net.parameters()) == 14_714_688


@pytest.mark.parametrize(("ceil_mode", "size"), [(True, (3, 5)), (False, (2, 4))])
def test_odd_sizes(ceil_mode, size):
    net = VGG(width=2, ceil_mode=ceil_mode)
    assert net(torch.randn(1, 3, 37, 67))["conv5"].shape[-2:] == size


def test_builder_reads_the_config():
    net = build_backbone(config("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.VGG.NORM", "BN"))
    assert isinstance(net, VGG)
    assert net.ceil_mode
    assert net.output_shape() == {"conv5": ShapeSpec(channels=32, stride=16)}
    for layer in layers_of(net)[:4]:
        assert isinstance(layer.norm, FrozenBatchNorm2d)
        assert not any(p.requires_grad for p in layer.parameters())
    for layer in layers_of(net)[4:]:
        assert isinstance(layer.norm, torch.nn.BatchNorm2d)
        assert all(p.requires_grad for p in layer.parameters())
    net(torch.randn(2, 3, 32, 32))["conv5"].square().sum().backward()
    assert all(p.grad.any() for p in net.parameters() if p.requires_grad)


def test_stages_after_the_last_feature_are_not_built():
    net = build_backbone(config("MODEL.VGG.OUT_FEATURES", ["conv2"]))
    assert list(dict(net.named_children())) == ["conv1_1", "conv1_2", "conv2_1", "conv2_2"]


def test_vgg11_by_hand():
    net = VGG(convs_per_stage=(1, 1, 2, 2, 2), width=2)
    assert len(layers_of(net)) == 8


@pytest.mark.parametrize("names", [["conv6"], []])
def test_unknown_features_are_refused(names):
    with pytest.raises(ValueError, match=r"MODEL\.VGG\.OUT_FEATURES must be one of conv1"):
        build_vgg16_backbone(config("MODEL.VGG.OUT_FEATURES", names), ShapeSpec(channels=3))


def test_the_first_layer_reads_any_number_of_channels():
    cfg = config()
    net = build_backbone(cfg, ShapeSpec(channels=1))
    x = torch.randn(1, 1, 32, 32)
    first = F.relu(F.conv2d(x, net.conv1_1.weight, net.conv1_1.bias, padding=1))
    assert torch.equal(net.conv1_1(x), first)
