"""Dilated stages, the stem without padding, norms with fixed statistics (FCIS checks 14 and 15)."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone.resnet import BasicStem, build_resnet_backbone

from instseg_ext.layers.folded_conv import fold_norms
from instseg_ext.modeling.dilated_resnet import (
    FixedBatchNorm2d,
    UnpaddedStem,
    build_instseg_dilated_resnet_backbone,
    dilate_stage,
    learn_affine,
)


def resnet(depth, dilation=1):
    cfg = get_cfg()
    node = cfg.MODEL.RESNETS
    node.DEPTH, node.OUT_FEATURES, node.RES5_DILATION = depth, ["res5"], dilation
    node.RES2_OUT_CHANNELS = 64 if depth < 50 else 16
    if depth >= 50:
        node.STEM_OUT_CHANNELS, node.WIDTH_PER_GROUP = 8, 4
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    torch.manual_seed(0)
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def test_dilated_bottlenecks_are_those_of_detectron2():
    ours, theirs = resnet(50), resnet(50, dilation=2)
    dilate_stage(ours.res5, 2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(ours(x)["res5"], theirs(x)["res5"])
    assert [block.stride for block in ours.res5] == [block.stride for block in theirs.res5]


def test_dilated_basic_blocks_keep_the_resolution():
    model = resnet(18)
    dilate_stage(model.res5, 2)
    assert model(torch.randn(1, 3, 64, 96))["res5"].shape == (1, 512, 4, 6)
    threes = [m for m in model.res5.modules() if getattr(m, "kernel_size", 0) == (3, 3)]
    assert len(threes) == 4
    assert all(m.dilation == m.padding == (2, 2) for m in threes)


def ramp_after(stem):
    """What the stem's pooling makes of 0 ... 7 along each row, its convolution left out."""
    stem.conv1 = torch.nn.Identity()
    return stem(torch.arange(8.0).repeat(1, 1, 8, 1))[0, 0, 0].tolist()


def test_acceptance_check_15_windows_begin_at_the_first_pixel():
    assert ramp_after(UnpaddedStem(1, 1, "")) == [2, 4, 6, 7]
    assert ramp_after(BasicStem(1, 1, "")) == [1, 3, 5, 7]


@pytest.mark.parametrize("size", [63, 64, 65, 66])
def test_sizes_of_the_stems_differ_by_one_cell_at_most(size):
    x = torch.zeros(1, 3, size, size)
    ours, theirs = UnpaddedStem(3, 4, "")(x).shape[-1], BasicStem(3, 4, "")(x).shape[-1]
    assert theirs - 1 <= ours <= theirs


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (4, 20), (16, 3)])
def test_images_smaller_than_a_window(size):
    stem, x = UnpaddedStem(3, 4, ""), torch.rand(1, 3, *size)
    before, found = stem.conv1(x).relu(), stem(x)
    assert torch.equal(found.amax(dim=(2, 3)), before.amax(dim=(2, 3)))
    for cells, pixels in zip(found.shape[2:], before.shape[2:], strict=True):
        assert cells == max(pixels // 2, 1)


class TestFixedBatchNorm:
    @staticmethod
    def pair():
        frozen = FrozenBatchNorm2d(3)
        for value in frozen.buffers():
            value.copy_(torch.rand(3) + 0.5)
        fixed = FixedBatchNorm2d(3)
        fixed.load_state_dict(frozen.state_dict())
        return frozen, fixed

    def test_same_names_and_values_as_the_frozen_one(self):
        frozen, fixed = self.pair()
        assert set(fixed.state_dict()) == set(frozen.state_dict())
        x = torch.randn(2, 3, 4, 5)
        torch.testing.assert_close(fixed(x), frozen(x))
        torch.testing.assert_close(fixed(x.requires_grad_()), frozen(x))

    def test_scale_and_shift_learn_and_statistics_do_not(self):
        _, fixed = self.pair()
        before = copy.deepcopy(fixed.state_dict())
        assert {name for name, _ in fixed.named_parameters()} == {"weight", "bias"}
        x = torch.randn(2, 3, 4, 5)
        fixed.train()(x).square().sum().backward()
        assert fixed.weight.grad.all()
        assert fixed.bias.grad.all()
        for name in ("running_mean", "running_var"):
            assert torch.equal(fixed.state_dict()[name], before[name])

    def test_it_replaces_frozen_norms_and_is_folded_at_inference(self):
        model = resnet(18)
        frozen = [m for m in model.modules() if type(m) is FrozenBatchNorm2d]
        learn_affine(model)
        fixed = [m for m in model.modules() if type(m) is FixedBatchNorm2d]
        assert len(fixed) == len(frozen) == 20
        assert not any(type(m) is FrozenBatchNorm2d for m in model.modules())
        x = torch.randn(1, 3, 32, 32)
        plain = model.eval()(x)["res5"]
        fold_norms(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x)["res5"], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(("dilation", "strides"), [(1, (16, 32)), (2, (16, 16)), (4, (8, 8))])
def test_builder_keeps_the_resolution_of_the_last_stages(depth, dilation, strides):
    cfg = get_cfg()
    node = cfg.MODEL.RESNETS
    node.DEPTH, node.OUT_FEATURES, node.RES5_DILATION = depth, ["res4", "res5"], dilation
    node.RES2_OUT_CHANNELS = 64 if depth < 50 else 16
    if depth >= 50:
        node.STEM_OUT_CHANNELS, node.WIDTH_PER_GROUP = 8, 4
    model = build_instseg_dilated_resnet_backbone(cfg, ShapeSpec(channels=3))
    assert tuple(shape.stride for shape in model.output_shape().values()) == strides
    maps = model(torch.zeros(1, 3, 64, 96))
    for stride, x in zip(strides, maps.values(), strict=True):
        assert x.shape[-2:] == (64 // stride, 96 // stride)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}
