"""Poolers against detectron2's, torchvision's operators and each other."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from instseg_ext.layers.roi_warp import ROIWarp, roi_warp
from instseg_ext.modeling.poolers import POOLER_KINDS, build_pooler

SCALES = [1 / 4, 1 / 8, 1 / 16]


def pyramid(dtype=torch.float32, grad=False):
    gen = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 6, 128 // s, 128 // s, generator=gen) for s in (4, 8, 16)]
    maps = [m.to(dtype).contiguous(memory_format=torch.channels_last) for m in maps]
    return [m.requires_grad_(grad) for m in maps]


def boxes():
    """Of all levels, whole and cut, one without extent."""
    first = [[3.0, 5, 20, 30], [0, 0, 128, 128], [60, 10, 60, 10]]
    second = [[10.0, 10, 50, 40], [100, 90, 128, 128]]
    return [Boxes(torch.tensor(first)), Boxes(torch.tensor(second))]


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_equals_detectron2(kind, ratio):
    ours = build_pooler(kind, 7, SCALES, ratio, canonical_box_size=56)
    theirs = ROIPooler(7, SCALES, ratio, kind, canonical_box_size=56)
    # a fixed number of samples is summed in another order
    error = 1e-5 if ratio else 0
    pooled = ours(pyramid(), boxes())
    assert torch.allclose(pooled, theirs(pyramid(), boxes()), rtol=0, atol=error)
    one = build_pooler(kind, 7, SCALES[:1], ratio)(pyramid()[:1], boxes())
    expected = ROIPooler(7, SCALES[:1], ratio, kind)(pyramid()[:1], boxes())
    assert torch.allclose(one, expected, rtol=0, atol=error)


def test_warp_takes_each_box_from_its_level():
    pooler = build_pooler("ROIWarp", 6, SCALES, 1, canonical_box_size=56, quantize=False)
    out = pooler(pyramid(), boxes())
    # sides 20.6, 128, 0, 34.6 and 32.6: levels 2.55, 5.2, low, 3.3 and 3.2 of strides 4, 8, 16
    levels, images = [0, 2, 0, 1, 1], [0, 0, 0, 1, 1]
    every = torch.cat([b.tensor for b in boxes()])
    for i, (level, image) in enumerate(zip(levels, images, strict=True)):
        roi = torch.cat([torch.tensor([image]), every[i]])[None]
        expected = roi_warp(pyramid()[level], roi, (6, 6), SCALES[level], quantize=False)
        assert torch.equal(out[i], expected[0])


def test_warp_differentiates_boxes():
    xyxy = torch.tensor([[3.0, 5, 20, 30], [10, 20, 90, 100]], requires_grad=True)
    maps = pyramid(grad=True)
    out = build_pooler("ROIWarp", 7, SCALES, 0)(maps, [Boxes(xyxy[:1]), Boxes(xyxy[1:])])
    assert out.shape == (2, 6, 7, 7)
    (out * torch.randn_like(out)).sum().backward()
    assert (xyxy.grad != 0).all()
    assert all(m.grad is not None for m in maps)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(("ratio", "mode"), [(0, "single"), (1, "single"), (0, "maxsample")])
def test_warp_gradients_are_those_of_the_level(ratio, mode, quantize):
    xyxy = torch.cat([b.tensor for b in boxes()]).requires_grad_()
    maps = pyramid(grad=True)
    pooler = build_pooler(
        "ROIWarp", 5, SCALES, ratio, canonical_box_size=56, quantize=quantize, warp_mode=mode
    )
    out = pooler(maps, [Boxes(xyxy[:3]), Boxes(xyxy[3:])])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * upstream).sum(), [xyxy, *maps])
    rois = torch.cat([torch.tensor([[0.0], [0], [0], [1], [1]]), xyxy], dim=1)
    parts = []
    for region, level in enumerate([0, 2, 0, 1, 1]):
        warp = ROIWarp((5, 5), SCALES[level], ratio or 2, quantize, mode)
        parts.append(warp(maps[level], rois[region : region + 1]))
    assert torch.equal(torch.cat(parts), out)
    expected = torch.autograd.grad((torch.cat(parts) * upstream).sum(), [xyxy, *maps])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert (found[0][[0, 1, 3, 4]] != 0).all()


@pytest.mark.parametrize("kind", POOLER_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu(kind, dtype):
    pooler = build_pooler(kind, 7, SCALES, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = pooler(pyramid(dtype), boxes())
    assert out.dtype == dtype
    expected = pooler([m.float() for m in pyramid(dtype)], boxes()).to(dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", POOLER_KINDS)
def test_no_boxes(kind):
    none = [Boxes(torch.zeros(0, 4)), Boxes(torch.zeros(0, 4))]
    assert build_pooler(kind, 7, SCALES, 2)(pyramid(), none).shape == (0, 6, 7, 7)


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match="ROIWarp, not 'RoIAlign'"):
        build_pooler("RoIAlign", 7, SCALES, 2)
    with pytest.raises(ValueError, match="single, maxsample, not 'largest'"):
        build_pooler("ROIWarp", 7, SCALES, 2, warp_mode="largest")
