"""PolarMask's losses against loops, at their edges, and through the head."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from torchvision.ops import box_iou

from instseg_ext.layers.losses import sigmoid_focal_loss_sum
from instseg_ext.methods.polarmask.head import PolarMaskHead, distances
from instseg_ext.methods.polarmask.losses import (
    box_loss,
    centerness_loss,
    polar_iou_loss,
    smooth_l1_loss,
)

WEIGHTED = [(box_loss, 4), (polar_iou_loss, 36), (smooth_l1_loss, 36)]


def lengths(count, rays, scale=100.0):
    return torch.rand(count, rays) * scale + 0.5


def mean_loss(loss, pred, target, centerness):
    """What the model makes of a sum: positives weigh as much as their centerness."""
    return loss(pred, target, centerness) / centerness.sum().clamp(min=1e-6)


# --- the authors' formulas as loops ---------------------------------------------------------------


def box_oracle(pred, target, point=(700, 300)):
    """-log(IoU) of two boxes with corners, of which the last pixel belongs to the box."""

    def corners(left, top, right, bottom):
        return point[0] - left, point[1] - top, point[0] + right, point[1] + bottom

    a, b = corners(*pred), corners(*target)
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    overlap = max(width, 0) * max(height, 0)
    areas = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (a, b)]
    return -math.log(max(overlap / (sum(areas) - overlap), 1e-6))


def polar_iou_oracle(pred, target):
    shorter = sum(min(p, t) for p, t in zip(pred, target, strict=True))
    longer = sum(max(p, t) for p, t in zip(pred, target, strict=True))
    return math.log(longer / shorter)


def smooth_l1_oracle(pred, target):
    steps = [abs(p - t) for p, t in zip(pred, target, strict=True)]
    return sum(d * d / 2 if d < 1 else d - 0.5 for d in steps) / len(steps)


@pytest.mark.parametrize(
    ("loss", "oracle", "rays"),
    [
        (box_loss, box_oracle, 4),
        (polar_iou_loss, polar_iou_oracle, 36),
        (polar_iou_loss, polar_iou_oracle, 18),
        (smooth_l1_loss, smooth_l1_oracle, 36),
    ],
    ids=["box", "polar 36", "polar 18", "smooth"],
)
def test_values_are_those_of_the_formula(loss, oracle, rays):
    pred, target, weight = lengths(40, rays), lengths(40, rays), torch.rand(40)
    pred[0] = target[0]
    pred[1] = target[1] + 0.25  # where smooth L1 is quadratic
    pred[2], target[2] = 1e-3, 1e3  # where the IoU of the boxes is below its floor
    target[3, : rays // 2] = 1e-6  # rays without a contour
    rows = [oracle(p, t) for p, t in zip(pred.tolist(), target.tolist(), strict=True)]
    expected = sum(w * row for w, row in zip(weight.tolist(), rows, strict=True))
    result = loss(pred, target, weight)
    assert (result.shape, result.dtype) == ((), torch.float32)
    assert result.item() == pytest.approx(expected, rel=1e-5)


def test_box_loss_is_that_of_the_iou_with_exclusive_ends():
    pred, target = lengths(20, 4), lengths(20, 4)
    boxes = [torch.cat([-d[:, :2], d[:, 2:] + 1], dim=1) for d in (pred, target)]
    expected = -box_iou(*boxes).diagonal().log().sum()
    torch.testing.assert_close(box_loss(pred, target, torch.ones(20)), expected)


def test_gradient_of_the_polar_iou_is_that_of_the_stacked_form():
    # The authors take the extremes of a stack; off ties the gradient is the same.
    pred, target, weight = lengths(30, 36).requires_grad_(), lengths(30, 36), torch.rand(30)
    both = torch.stack([pred, target], -1)
    sums = both.max(dim=2)[0].sum(dim=1) / both.min(dim=2)[0].sum(dim=1)
    (expected,) = torch.autograd.grad((sums.log() * weight).sum(), pred)
    (result,) = torch.autograd.grad(polar_iou_loss(pred, target, weight), pred)
    torch.testing.assert_close(result, expected)


def test_centerness_loss_is_the_summed_cross_entropy():
    logits, target = torch.randn(50) * 4, torch.rand(50)
    probs = logits.double().sigmoid()
    expected = -(target * probs.log() + (1 - target) * (1 - probs).log()).sum()
    assert centerness_loss(logits, target).item() == pytest.approx(expected.item(), rel=1e-5)


# --- acceptance check 9 ---------------------------------------------------------------------------


def test_half_the_length_costs_ln_2_either_way():
    ten, five, one = torch.full((1, 36), 10.0), torch.full((1, 36), 5.0), torch.ones(1)
    assert polar_iou_loss(ten, five, one).item() == pytest.approx(math.log(2), rel=1e-6)
    assert polar_iou_loss(five, ten, one).item() == pytest.approx(math.log(2), rel=1e-6)


def test_symmetric_zero_at_equality_and_free_of_scale():
    pred, target, weight = lengths(20, 36), lengths(20, 36), torch.rand(20)
    value = polar_iou_loss(pred, target, weight)
    torch.testing.assert_close(polar_iou_loss(target, pred, weight), value)
    torch.testing.assert_close(polar_iou_loss(7 * pred, 7 * target, weight), value)
    assert polar_iou_loss(target, target, weight) == 0


@pytest.mark.parametrize(("loss", "rays"), WEIGHTED)
def test_a_single_positive_costs_the_same_whatever_its_centerness(loss, rays):
    pred, target = lengths(1, rays), lengths(1, rays)
    costs = [mean_loss(loss, pred, target, torch.tensor([c])) for c in (0.01, 0.3, 1.0)]
    assert [c.item() for c in costs] == pytest.approx([costs[0].item()] * 3, rel=1e-5)


@pytest.mark.parametrize(("loss", "rays"), WEIGHTED)
def test_finite_when_all_centerness_is_zero(loss, rays):
    pred = lengths(3, rays).requires_grad_()
    total = mean_loss(loss, pred, lengths(3, rays), torch.zeros(3))
    total.backward()
    assert total == 0
    assert not pred.grad.any()


@pytest.mark.parametrize(("loss", "rays"), WEIGHTED)
def test_no_positives_cost_nothing_and_stay_connected(loss, rays):
    logs = torch.randn(5, rays, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    total = loss(distances(logs[empty]), torch.zeros(0, rays), torch.zeros(0))
    total.backward()
    assert (total.item(), total.dtype) == (0, torch.float32)
    assert torch.equal(logs.grad, torch.zeros(5, rays))


def test_no_positives_in_the_centerness_loss():
    logits = torch.randn(5, requires_grad=True)
    total = centerness_loss(logits[:0], torch.zeros(0))
    total.backward()
    assert total == 0
    assert torch.equal(logits.grad, torch.zeros(5))


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-20.0, 20.0])
@pytest.mark.parametrize(("loss", "rays"), WEIGHTED)
def test_extreme_logits_give_finite_values_and_gradients(loss, rays, logit):
    targets = torch.stack([torch.zeros(rays), torch.full((rays,), 1e-6), torch.full((rays,), 2e3)])
    logs = torch.full((3, rays), logit, requires_grad=True)
    total = loss(distances(logs), targets, torch.ones(3))
    total.backward()
    assert total.isfinite()
    assert logs.grad.isfinite().all()


def test_a_box_whose_area_overflows_has_a_gradient():
    logs = torch.full((2, 4), 60.0, requires_grad=True)  # lengths of 1e26
    box_loss(distances(logs), torch.full((2, 4), 10.0), torch.ones(2)).backward()
    assert torch.equal(logs.grad, torch.zeros(2, 4))


def test_rays_that_vanish_in_exp_cost_a_bounded_amount():
    logs = torch.full((2, 36), -200.0, requires_grad=True)  # exp is 0 in float32
    targets = torch.stack([torch.zeros(36), torch.full((36,), 10.0)])
    total = polar_iou_loss(distances(logs), targets, torch.ones(2))
    total.backward()
    assert total.item() == pytest.approx(math.log(360 / 1e-6), rel=1e-5)
    assert torch.equal(logs.grad, torch.zeros(2, 36))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logs = torch.randn(8, 36).to(dtype)
    target, weight = lengths(8, 36), torch.rand(8)
    for loss in (polar_iou_loss, smooth_l1_loss):
        expected = loss(logs.float().exp(), target, weight)
        assert torch.equal(loss(distances(logs), target, weight), expected)
    logits = torch.randn(8).to(dtype)
    assert torch.equal(centerness_loss(logits, weight), centerness_loss(logits.float(), weight))
    halves, box = lengths(8, 4).to(dtype), lengths(8, 4)
    assert torch.equal(box_loss(halves, box, weight), box_loss(halves.float(), box, weight))


# --- through the head -----------------------------------------------------------------------------


def small_head():
    shapes = {name: ShapeSpec(channels=8, stride=2 ** int(name[1])) for name in ("p3", "p4")}
    return PolarMaskHead(
        shapes, in_features=("p3", "p4"), num_classes=3, num_convs=1, width=32, num_rays=12
    )


def total_loss(raw, positive):
    """The four losses of two images, with positives at ``positive`` in the flat locations."""
    count = len(positive)
    labels = torch.full((raw.class_logits.shape[0] * raw.class_logits.shape[1],), 3)
    labels[positive] = 1
    centerness = torch.full((count,), 0.5)
    norm = centerness.sum().clamp(min=1e-6)
    rays, boxes = raw.ray_logs.flatten(0, 1)[positive], raw.box_logs.flatten(0, 1)[positive]
    return {
        "cls": sigmoid_focal_loss_sum(raw.class_logits.flatten(0, 1), labels) / (count + 2),
        "box": box_loss(distances(boxes), lengths(count, 4), centerness) / norm,
        "mask": polar_iou_loss(distances(rays), lengths(count, 12), centerness) / norm,
        "centerness": centerness_loss(raw.ctr_logits.flatten()[positive], centerness)
        / max(count, 1),
    }


@pytest.mark.parametrize("positive", [[], [0, 31, 45]], ids=["none", "some"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_every_parameter_of_the_head_gets_a_gradient(positive, bf16):
    head = small_head()
    features = {"p3": torch.randn(2, 8, 4, 6), "p4": torch.randn(2, 8, 2, 3)}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        raw = head(features)
        assert raw.ray_logs.dtype == (torch.bfloat16 if bf16 else torch.float32)
        losses = total_loss(raw, torch.tensor(positive, dtype=torch.int64))
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    scales = [scale.scale.grad for scale in (*head.scales_box, *head.scales_ray)]
    assert any(grad.item() for grad in scales) == bool(positive)
