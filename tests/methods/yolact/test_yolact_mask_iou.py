"""The network that scores masks: sizes, sign, and masks of every size and number."""

import pytest
import torch
import torch.nn.functional as F

from instseg_ext.methods.yolact.mask_iou import MaskIoUNet


def test_parameter_count():
    with torch.device("meta"):
        net = MaskIoUNet(80)
    assert sum(p.numel() for p in net.parameters()) == 108_560


@pytest.mark.parametrize(
    ("side", "sides"),
    [(138, [68, 33, 16, 7, 3, 3]), (100, [49, 24, 11, 5, 2, 2]), (176, [87, 43, 21, 10, 4, 4])],
)
def test_spatial_sizes(side, sides):
    with torch.device("meta"):
        net = MaskIoUNet(80)
        seen = []
        for layer in net.children():
            layer.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape[1:])))
        out = net(torch.empty(3, 1, side, side))
    widths = (8, 16, 32, 64, 128, 80)
    assert seen == [(width, s, s) for width, s in zip(widths, sides, strict=True)]
    assert out.shape == (3, 80)


def test_output_is_the_largest_of_never_negative_values():
    net = MaskIoUNet(5)
    torch.nn.init.normal_(net.pred.bias)
    masks = torch.rand(4, 1, 70, 130)
    x = masks
    for i in range(1, 6):
        conv = net.get_submodule(f"conv{i}")
        x = F.relu(F.conv2d(x, conv.weight, conv.bias, stride=2))
    x = F.relu(F.conv2d(x, net.pred.weight, net.pred.bias))
    assert x.shape[-2:] == (1, 3)
    out = net(masks)
    torch.testing.assert_close(out, x.flatten(2).max(dim=2).values)
    assert (out >= 0).all()
    # Without its last ReLU some would be.
    assert (out == 0).any()
    assert (out > 0).any()


@pytest.mark.parametrize("size", [(16, 24), (62, 100), (100, 30)])
def test_small_masks_are_filled_up_with_zeros(size):
    net = MaskIoUNet(3)
    masks = torch.rand(2, 1, *size)
    larger = torch.zeros(2, 1, max(63, size[0]), max(63, size[1]))
    larger[..., : size[0], : size[1]] = masks
    torch.testing.assert_close(net(masks), net(larger))


def test_no_masks():
    net = MaskIoUNet(3)
    out = net(torch.empty(0, 1, 69, 69))
    assert out.shape == (0, 3)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_gradient_reaches_the_masks():
    torch.manual_seed(0)
    masks = torch.rand(2, 1, 64, 64, requires_grad=True)
    MaskIoUNet(8)(masks).sum().backward()
    assert masks.grad.flatten(1).any(dim=1).all()
