"""RoI warping against hand-computed values, a plain loop and numeric gradients."""

from __future__ import annotations

import math

import pytest
import torch

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


@pytest.mark.parametrize(
    ("quantize", "expected"),
    [(True, [2.0, 5.0, 8.0, 11.0]), (False, [2.3125, 5.328125, 8.34375, 11.359375])],
)
def test_ramp(quantize, expected):
    roi = torch.tensor([[0.0, 37, 21, 230, 181]])
    out = roi_warp(ramp(), roi, (4, 4), SCALE, quantize=quantize)
    assert out[0, 0, 0].tolist() == expected


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
