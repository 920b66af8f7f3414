"""Deformable convolution: the gather form against torchvision's operator and a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import deform_conv2d as torchvision_op

from instseg_ext.layers import deform_conv as module
from instseg_ext.layers.deform_conv import DeformConv, DeformConvPack, deform_conv2d

CASES = {
    # channels, out, kernel, stride, padding, dilation, groups, offset groups, size
    "3x3": (6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, (7, 9)),
    "stride 2, odd size": (4, 6, (3, 3), (2, 2), (1, 1), (1, 1), 1, 1, (11, 8)),
    "dilated": (4, 4, (3, 3), (1, 1), (2, 2), (2, 2), 1, 2, (9, 7)),
    "groups": (8, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2, 1, (6, 6)),
    "groups and offset groups": (8, 8, (3, 3), (2, 1), (0, 1), (1, 2), 4, 2, (8, 10)),
    "1x1": (4, 4, (1, 1), (1, 1), (0, 0), (1, 1), 1, 4, (5, 5)),
    "5x3": (4, 2, (5, 3), (1, 2), (2, 0), (1, 1), 2, 2, (9, 9)),
}


def make(case, modulated, dtype=torch.float32, spread=2.0, seed=0):
    channels, out, kernel, stride, padding, dilation, groups, offset_groups, size = CASES[case]
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=gen, dtype=dtype)

    geometry = zip(size, kernel, stride, padding, dilation, strict=True)
    out_hw = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry]
    taps = offset_groups * kernel[0] * kernel[1]
    tensors = [
        rand(2, channels, *size),
        rand(2, 2 * taps, *out_hw) * spread,
        rand(out, channels // groups, *kernel),
        rand(out),
        rand(2, taps, *out_hw).sigmoid() if modulated else None,
    ]
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}


def run(op, tensors, upstream=None, **kwargs):
    """Return the output and the gradients of all tensor inputs."""
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
    *most, mask = leaves
    out = op(*most, mask=mask, **kwargs)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * upstream).sum().backward()
    return out.detach(), [t.grad for t in leaves if t is not None]


def loop_value(x, offset, weight, bias, mask, image, channel, row, col, stride, padding, dilation):
    """One output number, spelled out."""
    _, in_channels, height, width = x.shape
    out_channels, depth, kernel_h, kernel_w = weight.shape
    taps = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * taps)
    first = channel // (out_channels // (in_channels // depth)) * depth
    total = float(bias[channel])
    for d in range(depth):
        group = (first + d) // (in_channels // offset_groups)
        for tap in range(taps):
            k = 2 * (group * taps + tap)
            y = row * stride[0] - padding[0] + tap // kernel_w * dilation[0]
            z = col * stride[1] - padding[1] + tap % kernel_w * dilation[1]
            y, z = y + float(offset[image, k, row, col]), z + float(offset[image, k + 1, row, col])
            value, y0, z0 = 0.0, math.floor(y), math.floor(z)
            for yy, zz in ((y0, z0), (y0, z0 + 1), (y0 + 1, z0), (y0 + 1, z0 + 1)):
                if 0 <= yy < height and 0 <= zz < width:
                    share = (1 - abs(y - yy)) * (1 - abs(z - zz))
                    value += share * float(x[image, first + d, yy, zz])
            if mask is not None:
                value *= float(mask[image, group * taps + tap, row, col])
            total += value * float(weight[channel, d, tap // kernel_w, tap % kernel_w])
    return total


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("case", CASES)
def test_gather_equals_torchvision_forward_and_backward(case, modulated):
    tensors, geometry = make(case, modulated)
    ours, our_grads = run(deform_conv2d, tensors, method="gather", **geometry)
    theirs, their_grads = run(torchvision_op, tensors, **geometry)
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    for a, b in zip(our_grads, their_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", ["gather", "torchvision"])
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_loop(case, method):
    tensors, geometry = make(case, True, seed=1)
    *most, mask = tensors
    out = deform_conv2d(*most, mask=mask, method=method, **geometry)
    corners = [(0, 0), (out.shape[2] - 1, out.shape[3] - 1), (out.shape[2] // 2, 0)]
    for channel in (0, out.shape[1] - 1):
        for row, col in corners:
            expected = loop_value(*tensors, 1, channel, row, col, **geometry)
            assert float(out[1, channel, row, col]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_integer_and_border_samples_have_torchvision_gradients(modulated):
    # at whole pixels and exactly one pixel outside, the one-sided slopes must be the same ones
    tensors, geometry = make("3x3", modulated)
    tensors[1] = tensors[1].round()
    assert (tensors[1].abs() >= 3).any()
    _, ours = run(deform_conv2d, tensors, method="gather", **geometry)
    _, theirs = run(torchvision_op, tensors, **geometry)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-4)


def test_gradcheck_in_double():
    tensors, geometry = make("groups and offset groups", True, torch.float64)
    leaves = [t[:1].clone() if t.dim() == 4 and len(t) == 2 else t.clone() for t in tensors]
    leaves = [t.requires_grad_() for t in leaves]
    leaves[1] = (leaves[1].detach().floor() + 0.37).requires_grad_()  # away from the kinks

    def call(x, offset, weight, bias, mask):
        return deform_conv2d(x, offset, weight, bias, mask=mask, method="gather", **geometry)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("groups", ["3x3", "groups and offset groups"])
def test_pieces_equal_the_whole(groups, monkeypatch):
    tensors, geometry = make(groups, True)
    whole = run(deform_conv2d, tensors, method="gather", **geometry)
    monkeypatch.setattr(module, "_COLUMN_BYTES", 10 * 9 * 8 * 4)
    parts = run(deform_conv2d, tensors, method="gather", **geometry)
    assert torch.allclose(whole[0], parts[0], atol=1e-6)
    for a, b in zip(whole[1], parts[1], strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with torch.no_grad():
        *most, mask = tensors
        out = deform_conv2d(*most, mask=mask, method="gather", **geometry)
    assert torch.allclose(out, whole[0], atol=1e-6)


def test_auto_gathers_on_the_cpu(monkeypatch):
    def refuse(*args):
        raise AssertionError("torchvision's operator was called on the CPU")

    monkeypatch.setattr(module, "_torchvision_deform_conv2d", refuse)
    tensors, geometry = make("3x3", False)
    deform_conv2d(*tensors[:4], **geometry)
    with pytest.raises(ValueError, match="fast"):
        deform_conv2d(*tensors[:4], method="fast", **geometry)


@pytest.mark.parametrize("method", ["gather", "torchvision"])
def test_half_precision_and_autocast(method):
    tensors, geometry = make("3x3", True)
    *most, mask = tensors
    expected = deform_conv2d(*most, mask=mask, method=method, **geometry)
    with torch.autocast("cpu", torch.bfloat16):
        low = deform_conv2d(
            most[0].bfloat16(), *most[1:], mask=mask.bfloat16(), method=method, **geometry
        )
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), expected, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("modulated", [False, True], ids=["v1", "v2"])
def test_pack_starts_as_a_plain_convolution(modulated):
    conv = DeformConvPack(
        6, 4, 3, padding=1, stride=2, modulated=modulated, norm=torch.nn.GroupNorm(2, 4), bias=True
    )
    x = torch.randn(2, 6, 9, 9).contiguous(memory_format=torch.channels_last)
    plain = F.conv2d(x, conv.weight, None, stride=2, padding=1) * (0.5 if modulated else 1)
    assert torch.allclose(conv(x), conv.norm(plain), atol=1e-5)
    names = {"weight", "bias", "norm.weight", "norm.bias", "offset.weight", "offset.bias"}
    assert set(conv.state_dict()) == names
    conv(x).square().sum().backward()
    assert all(p.grad is not None for p in conv.parameters())


def test_empty_batch_keeps_every_parameter_connected():
    conv = DeformConvPack(6, 4, 3, padding=1, stride=2, modulated=True)
    out = conv(torch.zeros(0, 6, 9, 9))
    assert out.shape == (0, 4, 5, 5)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in conv.parameters())


def test_indivisible_groups_are_named():
    with pytest.raises(ValueError, match="deformable_groups=4"):
        DeformConv(6, 4, 3, deformable_groups=4)
