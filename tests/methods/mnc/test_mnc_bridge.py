"""From stage 3 to stage 4: boxes and their gradients (acceptance checks 10 and 14)."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from instseg_ext.layers.gradient_limit import GradientLimit
from instseg_ext.methods.mnc.bridge import chosen_classes, refine_boxes

TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
SIZE = (64, 96)


def deltas_of(*rows, num_classes=2, of=0):
    """(R, (K + 1) * 4), nonzero for one class."""
    deltas = torch.zeros(len(rows), num_classes + 1, 4)
    deltas[:, of] = torch.tensor(rows, dtype=torch.float32)
    return deltas.flatten(1)


def test_background_counts_at_inference_only():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
    assert chosen_classes(logits, foreground_only=True).tolist() == [1, 0]
    assert chosen_classes(logits, foreground_only=False).tolist() == [2, 0]


def test_boxes_are_decoded_by_their_class():
    boxes = torch.tensor([[10.0, 20, 30, 40], [10, 20, 30, 40]])
    deltas = deltas_of([1.0, 0, 5 * math.log(2), 0], [1.0, 0, 0, 0], of=1)
    found = refine_boxes(boxes, deltas, torch.tensor([1, 2]), TRANSFORM, SIZE)
    # centre 20 -> 22, width 20 -> 40; the other class has no deltas
    torch.testing.assert_close(found, torch.tensor([[2.0, 20, 42, 40], [10, 20, 30, 40]]))


def test_boxes_are_clipped():
    boxes = torch.tensor([[80.0, 20, 100, 70]])
    found = refine_boxes(boxes, deltas_of([0.0] * 4), torch.tensor([0]), TRANSFORM, SIZE)
    assert found.tolist() == [[80, 20, 96, 64]]


def test_legacy_boxes_grow_by_a_pixel_and_keep_one():
    boxes = torch.tensor([[10.0, 20, 30, 40], [100.0, 20, 120, 40], [-30.0, 0, -10, 10]])
    found = refine_boxes(
        boxes, deltas_of(*[[0.0] * 4] * 3), torch.zeros(3).long(), TRANSFORM, SIZE, legacy=True
    )
    assert found.tolist() == [[10, 20, 31, 41], [95, 20, 96, 41], [0, 0, 1, 11]]


def test_what_is_no_number_stays_where_it_was():
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    bad = deltas_of([math.nan, 0, 0, 0])
    for limit in (None, GradientLimit(1.0)):
        found = refine_boxes(boxes, bad, torch.tensor([0]), TRANSFORM, SIZE, limit=limit)
        assert found.tolist() == boxes.tolist()


@pytest.mark.parametrize("images", [1, 4])
def test_acceptance_check_10_gradients_are_bounded(images):
    """The first box may move, the second is clipped; the loss on the deltas is not bounded."""
    boxes = torch.tensor([[10.0, 20, 30, 40], [80, 20, 100, 40]], requires_grad=True)
    deltas = deltas_of([1.0, 0, 0, 0], [0.0, 0, 0, 0]).requires_grad_()
    bound = 1 / 512 / images
    found = refine_boxes(
        boxes, deltas, torch.zeros(2).long(), TRANSFORM, SIZE, limit=GradientLimit(bound)
    )
    (found * torch.tensor([1.0, 2, 3, -4])).sum().backward(retain_graph=True)
    own = deltas.grad.view(2, 3, 4)
    assert own[0, 0].abs().tolist() == [pytest.approx(bound)] * 4
    assert own[0, 1:].count_nonzero() == 0
    assert own[1].count_nonzero() == 0
    # boxes themselves are not bounded, and lose only the clipped coordinate
    assert boxes.grad[0].abs().max() > 0.5
    deltas.grad = None
    (found.sum() + deltas.sum() * 7).backward()
    assert deltas.grad[0, 0].item() == pytest.approx(7 + bound)
    assert deltas.grad[1, 0].item() == 7


def test_small_gradients_are_those_of_decoding():
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    deltas = deltas_of([0.3, -0.2, 0.1, 0.4])
    upstream = torch.tensor([1.0, 2, 3, -4]) * 1e-5

    def gradient(decode):
        given = deltas.clone().requires_grad_()
        (decode(given) * upstream).sum().backward()
        return given.grad

    expected = gradient(lambda d: TRANSFORM.apply_deltas(d[:, :4], boxes))
    limit = GradientLimit(1 / 512)
    found = gradient(
        lambda d: refine_boxes(boxes, d, torch.tensor([0]), TRANSFORM, SIZE, limit=limit)
    )
    torch.testing.assert_close(found, expected)


def test_without_a_bound_there_is_no_gradient():
    boxes = torch.tensor([[10.0, 20, 30, 40]], requires_grad=True)
    deltas = deltas_of([0.0] * 4).requires_grad_()
    assert not refine_boxes(boxes, deltas, torch.tensor([0]), TRANSFORM, SIZE).requires_grad


def test_no_boxes():
    found = refine_boxes(
        torch.zeros(0, 4), torch.zeros(0, 12), torch.zeros(0).long(), TRANSFORM, SIZE
    )
    assert found.shape == (0, 4)
