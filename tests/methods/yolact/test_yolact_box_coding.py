"""Boxes relative to anchors, and back."""

import torch

from instseg_ext.methods.yolact.box_coding import decode, encode, to_corners


def random_boxes(count):
    low = torch.rand(count, 2) * 0.6
    return torch.cat([low, low + 0.01 + torch.rand(count, 2) * 0.4], dim=1)


def random_anchors(count):
    return torch.cat([torch.rand(count, 2), 0.03 + torch.rand(count, 2)], dim=1)


def test_worked_example():
    box = torch.tensor([0.45, 0.4, 0.75, 0.8])
    anchor = torch.tensor([0.5, 0.5, 0.2, 0.4])
    expected = torch.tensor([5.0, 2.5, 2.0273, 0.0])
    torch.testing.assert_close(encode(box, anchor), expected, atol=1e-4, rtol=0)


def test_decode_inverts_encode():
    boxes, anchors = random_boxes(500), random_anchors(500)
    found = decode(encode(boxes, anchors), anchors)
    torch.testing.assert_close(found, boxes, atol=1e-6, rtol=0)


def test_no_deltas_are_the_anchor():
    anchors = random_anchors(20)
    torch.testing.assert_close(decode(torch.zeros(20, 4), anchors), to_corners(anchors))


def test_corners():
    corners = to_corners(torch.tensor([[0.5, 0.4, 0.2, 0.6]]))
    torch.testing.assert_close(corners, torch.tensor([[0.4, 0.1, 0.6, 0.7]]))


def test_leading_dimensions_broadcast():
    anchors, deltas = random_anchors(5), torch.randn(2, 5, 4)
    boxes = decode(deltas, anchors)
    assert boxes.shape == (2, 5, 4)
    assert torch.equal(boxes[1], decode(deltas[1], anchors))
    torch.testing.assert_close(encode(boxes, anchors), deltas, atol=1e-4, rtol=1e-4)


def test_nothing_to_code():
    assert encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert decode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


def test_empty_boxes_have_finite_targets():
    boxes = torch.tensor([[0.3, 0.3, 0.3, 0.5], [0.2, 0.6, 0.4, 0.6]])
    anchors = random_anchors(2)
    deltas = encode(boxes, anchors)
    assert deltas.isfinite().all()
    torch.testing.assert_close(decode(deltas, anchors), boxes, atol=1e-6, rtol=0)


def test_half_precision_deltas_are_decoded_in_float():
    anchors, deltas = random_anchors(50), torch.randn(50, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes = decode(deltas, anchors)
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, decode(deltas.float(), anchors))
