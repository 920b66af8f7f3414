"""Windows of boxes, and masks from prototypes."""

import pytest
import torch

from instseg_ext.methods.yolact.assembly import assemble_logits, box_windows, cropped_masks


def inside(box, size_hw=(8, 8)):
    rows, cols = box_windows(torch.tensor([box], dtype=torch.float32), size_hw)
    return (rows[:, :, None] & cols[:, None, :])[0]


@pytest.mark.parametrize("box", [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.25, 0.25]])
def test_window_is_padded_by_one_pixel(box):
    found = inside(box)
    assert found.sum() == 16
    assert found[1:5, 1:5].all()


def test_whole_image():
    assert inside([0, 0, 1, 1]).all()
    assert inside([-torch.inf, -3, 5, torch.inf]).all()


def test_nothing_inside():
    assert not inside([2, 2, 3, 3]).any()
    assert not inside([0.2, torch.nan, 0.8, 0.8]).any()


def test_rows_and_columns_have_their_own_lengths():
    found = inside([0.5, 0, 0.5, 0.4], (5, 10))
    assert found.nonzero().tolist() == [[y, x] for y in range(3) for x in (4, 5)]


def test_bounds_are_not_rounded():
    # From 2.4 - 1 to 4.1 + 1 on an axis of 10: 2, 3, 4, 5.
    assert inside([0.24, 0, 0.41, 1], (10, 10))[0].nonzero().flatten().tolist() == [2, 3, 4, 5]


def random_case(count):
    corners = torch.rand(count, 4)
    return torch.randn(4, 6, 9), torch.randn(count, 4), corners


def test_logits_are_linear_combinations():
    prototypes, coefficients, _ = random_case(3)
    expected = (coefficients[:, :, None, None] * prototypes).sum(dim=1)
    torch.testing.assert_close(assemble_logits(prototypes, coefficients), expected)


def test_cropped_masks():
    prototypes, coefficients, boxes = random_case(5)
    rows, cols = box_windows(boxes, (6, 9))
    masks = cropped_masks(prototypes, coefficients, boxes)
    probs = assemble_logits(prototypes, coefficients).sigmoid()
    for mask, prob, row, col in zip(masks, probs, rows, cols, strict=True):
        window = row[:, None] & col
        assert torch.equal(mask[window], prob[window])
        assert not mask[~window].any()


def test_no_masks():
    prototypes, coefficients, boxes = random_case(0)
    assert cropped_masks(prototypes, coefficients, boxes).shape == (0, 6, 9)


def test_gradient_stops_at_the_window():
    prototypes, coefficients, boxes = random_case(2)
    prototypes.requires_grad_()
    boxes[:] = torch.tensor([0.3, 0.3, 0.6, 0.6])
    cropped_masks(prototypes, coefficients, boxes).sum().backward()
    rows, cols = box_windows(boxes[:1], (6, 9))
    assert torch.equal(prototypes.grad.ne(0), (rows[0, :, None] & cols[0]).expand(4, -1, -1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_is_combined_in_float(layout):
    prototypes, coefficients, boxes = random_case(3)
    batch = prototypes.bfloat16()[None].to(memory_format=layout)
    coefficients = coefficients.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cropped_masks(batch[0], coefficients, boxes)
    assert found.dtype == torch.float32
    expected = cropped_masks(batch[0].float(), coefficients.float(), boxes)
    torch.testing.assert_close(found, expected)
