"""RoI warping against hand-computed values, a plain loop and numeric gradients."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import ROIAlign
from torchvision.ops import RoIPool

from instseg_ext.layers import roi_warp as warp_module
from instseg_ext.layers.roi_warp import ROIWarp, roi_warp

SCALE = 1 / 16


def ramp(height=20, width=24):
    """f(y, x) = x."""
    return torch.arange(width, dtype=torch.float32).expand(1, 1, height, width).contiguous()


def loop_warp(features, roi, size, scale, quantize):
    """One region, sample by sample."""
    _, channels, height, width = features.shape
    x1, y1, x2, y2 = (float(v) * scale for v in roi[1:])
    if quantize:
        x1, y1, x2, y2 = (math.copysign(math.floor(abs(v) + 0.5), v) for v in (x1, y1, x2, y2))
    out = torch.zeros(channels, *size)
    for j in range(size[0]):
        for k in range(size[1]):
            y = y1 + j / size[0] * max(y2 - y1, 0)
            x = x1 + k / size[1] * max(x2 - x1, 0)
            if not (-0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5):
                continue
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            y0, x0 = int(y), int(x)
            for yy, wy in ((y0, 1 - y + y0), (min(y0 + 1, height - 1), y - y0)):
                for xx, wx in ((x0, 1 - x + x0), (min(x0 + 1, width - 1), x - x0)):
                    out[:, j, k] += wy * wx * features[int(roi[0]), :, yy, xx]
    return out


BOX_OF_THE_RAMP = torch.tensor([[0.0, 37, 21, 230, 181]])


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [(True, [2.0, 5.0, 8.0, 11.0]), (False, [2.3125, 5.328125, 8.34375, 11.359375])],
)
def test_ramp(quantize, expected):
    out = roi_warp(ramp().double(), BOX_OF_THE_RAMP, (4, 4), SCALE, quantize=quantize)
    assert out[0, 0, 0].tolist() == pytest.approx(expected, abs=1e-9)


def test_ramp_with_samples_up_to_the_end_of_each_bin():
    out = ROIWarp((4, 4), SCALE, mode="maxsample")(ramp(), BOX_OF_THE_RAMP)
    assert out[0, 0].tolist() == [[5, 8, 11, 14]] * 4


def test_ramp_under_other_poolers():
    pooled = RoIPool((4, 4), SCALE)(ramp(), BOX_OF_THE_RAMP)
    assert pooled[0, 0, 0].tolist() == [5, 8, 11, 14]
    aligned = ROIAlign((4, 4), SCALE, 2, aligned=True)(ramp(), BOX_OF_THE_RAMP)[0, 0, 0]
    assert aligned.tolist() == [3.3203125, 6.3359375, 9.3515625, 12.3671875]
    shifted = ROIAlign((4, 4), SCALE, 2, aligned=False)(ramp(), BOX_OF_THE_RAMP)[0, 0, 0]
    assert torch.equal(shifted, aligned + 0.5)


def test_a_region_of_7_cells_in_3_bins():
    # RoIPool reads columns 0-2, 2-4 and 4-6, RoIAlign bins of 7 / 3 cells, RoIWarp their beginnings
    whole = torch.tensor([[0.0, 0, 0, 6, 6]])
    assert RoIPool((3, 3), 1.0)(ramp(7, 7), whole)[0, 0, 0].tolist() == [2, 4, 6]
    whole = torch.tensor([[0.0, 0, 0, 7, 7]])
    aligned = ROIAlign((3, 3), 1.0, 2, aligned=True)(ramp(7, 7), whole)[0, 0, 0]
    assert aligned.tolist() == pytest.approx([2 / 3, 3, 16 / 3])
    warped = roi_warp(ramp(7, 7), whole, (3, 3), 1.0)[0, 0, 0]
    assert warped.tolist() == pytest.approx([0, 7 / 3, 14 / 3])


def test_gradient_of_the_ramp():
    roi = BOX_OF_THE_RAMP.double().requires_grad_()
    roi_warp(ramp().double(), roi, (4, 4), SCALE).sum().backward()
    assert roi.grad.tolist() == [[0, 0.625, 0, 0.375, 0]]


def test_samples_of_28_pooled_to_14():
    roi = torch.tensor([[0.0, 32, 32, 224, 224]])  # cells 2 to 14
    columns = ROIWarp((14, 14), SCALE)(ramp(), roi)[0, 0, 0]
    assert columns[[0, -1]].tolist() == pytest.approx([2 + 12 / 28, 2 + 12 * 27 / 28])


@pytest.mark.parametrize("quantize", [True, False])
def test_equals_plain_loop(quantize):
    features = torch.randn(2, 3, 9, 11)
    rois = torch.tensor(
        [
            [0.0, 8, 8, 120, 90],
            [1, -30, -20, 200, 160],  # beyond all borders
            [1, 0, 0, 176, 144],  # the whole map
            [0, 40, 40, 30, 30],  # inverted: no extent
            [0, 168, 136, 200, 170],
        ]
    )
    out = roi_warp(features, rois, (4, 6), SCALE, quantize=quantize)
    for roi, value in zip(rois, out, strict=True):
        assert torch.allclose(value, loop_warp(features, roi, (4, 6), SCALE, quantize), atol=1e-5)


def test_gradcheck_unquantised():
    features = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor(
        [[17.3, 9.1, 83.7, 71.9], [5.2, 20.8, 44.1, 60.3]], dtype=torch.float64, requires_grad=True
    )
    image = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def call(feats, xyxy):
        return roi_warp(feats, torch.cat([image, xyxy], 1), (3, 4), SCALE, quantize=False)

    assert torch.autograd.gradcheck(call, (features, boxes))


def test_box_gradient_of_the_quantised_path():
    # dL/dx1 = s * sum g f_u (1 - t), dL/dx2 = s * sum g f_u t with t = k / P, rounding passed
    # through
    features = torch.randn(1, 2, 8, 9, dtype=torch.float64)
    roi = torch.tensor([[0.0, 18, 35, 90, 101]], dtype=torch.float64, requires_grad=True)
    out = roi_warp(features, roi, (4, 4), SCALE)
    upstream = torch.randn_like(out)
    (out * upstream).sum().backward()
    x1, y1, x2, y2 = 1, 2, 6, 6
    expected = torch.zeros(4, dtype=torch.float64)
    for j in range(4):
        for k in range(4):
            q, t = j / 4, k / 4
            v, u = y1 + q * (y2 - y1), x1 + t * (x2 - x1)
            y0, x0 = int(v), int(u)
            b, a = v - y0, u - x0
            f = features[0, :, y0 : y0 + 2, x0 : x0 + 2]
            slope_u = (1 - b) * (f[:, 0, 1] - f[:, 0, 0]) + b * (f[:, 1, 1] - f[:, 1, 0])
            slope_v = (1 - a) * (f[:, 1, 0] - f[:, 0, 0]) + a * (f[:, 1, 1] - f[:, 0, 1])
            g = upstream[0, :, j, k]
            gu, gv = SCALE * (g * slope_u).sum(), SCALE * (g * slope_v).sum()
            expected += torch.stack([gu * (1 - t), gv * (1 - q), gu * t, gv * q])
    assert torch.allclose(roi.grad[0, 1:], expected, atol=1e-12)


def test_boxes_at_the_image_border_have_a_gradient():
    roi = torch.tensor([[0.0, 0, 0, 64, 64]], requires_grad=True)
    roi_warp(ramp(), roi, (4, 4), SCALE).sum().backward()
    assert roi.grad[0, 1] > 0


def test_regions_without_extent_are_their_corner_and_can_grow():
    # the second is inverted, the third rounds to nothing
    roi = torch.tensor([[0.0, 40, 56, 40, 56], [0, 40, 56, 20, 30], [0, 41, 57, 44, 60]])
    roi.requires_grad_()
    features = torch.arange(100.0).view(1, 1, 10, 10)
    out = roi_warp(features, roi, (4, 4), SCALE)
    assert out.eq(features[0, 0, 4, 3]).all()
    out.sum().backward()
    # slopes 1 and 10, the distances of the samples from the first edge
    to_first, to_second = 16 * 0.625 * SCALE, 16 * 0.375 * SCALE
    expected = [0, to_first, 10 * to_first, to_second, 10 * to_second]
    assert roi.grad.tolist() == [expected] * 3


@pytest.mark.parametrize("mode", ["single", "maxsample"])
def test_regions_off_the_map_are_zero_with_finite_gradients(mode):
    roi = torch.tensor([[0.0, -200, 20, -60, 90], [0, 20, -200, 90, -60], [0, 500, 500, 600, 600]])
    roi.requires_grad_()
    features = torch.rand(1, 2, 9, 9, requires_grad=True)
    out = ROIWarp((4, 4), SCALE, mode=mode)(features, roi)
    assert out.eq(0).all()
    out.sum().backward()
    assert roi.grad.eq(0).all()
    assert features.grad.eq(0).all()


def loop_largest(features, roi, bins, scale):
    """One region with n samples per bin and axis, both ends included, quantised."""
    _, channels, height, width = features.shape
    x1, y1, x2, y2 = (math.floor(float(v) * scale + 0.5) for v in roi[1:])
    tall, wide = max(y2 - y1, 0), max(x2 - x1, 0)
    n_y, n_x = max(math.ceil(tall / bins), 1), max(math.ceil(wide / bins), 1)
    out = features.new_zeros(channels, bins, bins)
    for j in range(bins):
        for k in range(bins):
            found = []
            for a in range(n_y + 1):
                for b in range(n_x + 1):
                    y, x = y1 + (j + a / n_y) * tall / bins, x1 + (k + b / n_x) * wide / bins
                    if not (-0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5):
                        continue
                    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    y0, x0 = int(y), int(x)
                    y1_, x1_ = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                    f = features[int(roi[0])]
                    upper = f[:, y0, x0] * (1 - x + x0) + f[:, y0, x1_] * (x - x0)
                    lower = f[:, y1_, x0] * (1 - x + x0) + f[:, y1_, x1_] * (x - x0)
                    found.append(upper * (1 - y + y0) + lower * (y - y0))
            if found:
                out[:, j, k] = torch.stack(found).amax(dim=0)
    return out


def test_as_many_samples_as_the_region_has_pixels():
    # all values below zero, so that a zero from outside the map would be seen
    features = -torch.rand(2, 3, 16, 20, dtype=torch.float64)
    rois = torch.tensor(
        [[0.0, 8, 8, 300, 90], [1, 0, 0, 320, 256], [1, 50, 40, 60, 200], [0, 200, 100, 400, 300]]
    )
    out = ROIWarp((4, 4), SCALE, mode="maxsample")(features, rois)
    for roi, value in zip(rois, out, strict=True):
        assert torch.allclose(value, loop_largest(features, roi, 4, SCALE), atol=1e-12)


@pytest.mark.parametrize("mode", ["single", "maxsample"])
@pytest.mark.parametrize("part_mb", [64, 1e-6])
def test_gradients_of_the_largest_sample(mode, part_mb, monkeypatch):
    monkeypatch.setattr(warp_module, "_PART_MB", part_mb)
    gen = torch.Generator().manual_seed(0)
    features = torch.randn(2, 1, 5, 6, generator=gen, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor(
        [[17.3, 9.1, 63.7, 51.9], [5.2, 20.8, 44.1, 60.3]], dtype=torch.float64, requires_grad=True
    )
    image = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    warp = ROIWarp((2, 2), SCALE, quantize=False, mode=mode)

    def call(maps, xyxy):
        return warp(maps, torch.cat([image, xyxy], 1))

    assert torch.autograd.gradcheck(call, (features, boxes))
    both = torch.autograd.grad(call(features, boxes).sum(), (features, boxes))
    alone = torch.autograd.grad(call(features, boxes.detach()).sum(), features)
    alone += torch.autograd.grad(call(features.detach(), boxes).sum(), boxes)
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


def test_of_equal_samples_the_first_is_followed():
    features = torch.zeros(1, 1, 12, 12, requires_grad=True)
    roi = torch.tensor([[0.0, 32, 32, 160, 160]])  # 8 cells: each of 16 samples is one or between
    ROIWarp((8, 8), SCALE)(features, roi).sum().backward()
    expected = torch.zeros(12, 12)
    expected[2:10, 2:10] = 1
    assert torch.equal(features.grad[0, 0], expected)


def test_samples_are_never_held_together(monkeypatch):
    monkeypatch.setattr(warp_module, "_PART_MB", 0.1)
    features = torch.randn(1, 16, 12, 12, requires_grad=True)
    rois = torch.tensor([[0.0, 10, 10, 150, 150]]).repeat(40, 1).requires_grad_()
    sizes, saved = [], {}
    take = warp_module._samples

    def counted(*inputs):
        samples = take(*inputs)
        sizes.append(samples.nbytes / 2**20)
        return samples

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    monkeypatch.setattr(warp_module, "_samples", counted)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = ROIWarp((14, 14), SCALE)(features, rois)
        assert len(sizes) > 15
        assert max(sizes) <= 0.1
    assert sum(saved.values()) < out.nbytes
    out.sum().backward()
    assert max(sizes) <= 0.1


def test_regions_that_are_no_numbers_are_no_reason_to_stop():
    rois = torch.tensor([[0.0, float("nan"), 0, 64, 64], [0, 0, 0, float("inf"), 64]])
    for mode in ("single", "maxsample"):
        out = ROIWarp((4, 4), SCALE, mode=mode)(torch.ones(1, 1, 8, 8), rois)
        assert out.shape == (2, 1, 4, 4)


def test_unknown_modes_are_named():
    with pytest.raises(ValueError, match="single, maxsample, not 'double'"):
        ROIWarp((4, 4), SCALE, mode="double")
    with pytest.raises(ValueError, match="at least one sample per bin, not 0"):
        ROIWarp((4, 4), SCALE, samples=0)


def test_module_takes_the_largest_sample():
    features = torch.randn(1, 3, 12, 12)
    roi = torch.tensor([[0.0, 10, 10, 150, 150]])
    fine = roi_warp(features, roi, (8, 8), SCALE)
    expected = fine.view(1, 3, 4, 2, 4, 2).amax(dim=(3, 5))
    assert torch.equal(ROIWarp((4, 4), SCALE)(features, roi), expected)
    assert torch.equal(ROIWarp((8, 8), SCALE, samples=1)(features, roi), fine)


def test_half_precision_and_no_regions():
    features = torch.randn(1, 3, 12, 12).bfloat16()
    roi = torch.tensor([[0.0, 10, 10, 150, 150]])
    out = roi_warp(features, roi, (4, 4), SCALE)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, roi_warp(features.float(), roi, (4, 4), SCALE).bfloat16())
    features = torch.randn(1, 3, 12, 12, requires_grad=True)
    empty = roi_warp(features, roi[:0], (4, 4), SCALE)
    assert empty.shape == (0, 3, 4, 4)
    empty.sum().backward()
    assert features.grad is not None
