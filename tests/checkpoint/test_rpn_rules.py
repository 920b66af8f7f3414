"""The layers of a region proposal network in the order of the first Faster R-CNN codes."""

from __future__ import annotations

import pytest
import torch

from instseg_ext.checkpoint import ConversionError, anchors_by_size, foreground_minus_background
from instseg_ext.modeling.legacy_anchors import legacy_cell_anchors

# Their anchors of one cell at stride 16, last pixel included, in their order.
OLD_ANCHORS = [
    (-84, -40, 99, 55), (-176, -88, 191, 103), (-360, -184, 375, 199),
    (-56, -56, 71, 71), (-120, -120, 135, 135), (-248, -248, 263, 263),
    (-36, -80, 51, 95), (-80, -168, 95, 183), (-168, -344, 183, 359),
]  # fmt: skip
SMALLEST = {0: (-38, -16, 53, 31), 3: (-24, -24, 39, 39), 6: (-14, -36, 29, 51)}
RATIOS = (0.5, 1.0, 2.0)


def with_smallest():
    """The anchors of COCO models, which have one more size."""
    anchors = list(OLD_ANCHORS)
    for place, anchor in sorted(SMALLEST.items(), reverse=True):
        anchors.insert(place, anchor)
    return anchors


@pytest.mark.parametrize(
    ("old", "sizes"),
    [(OLD_ANCHORS, (128, 256, 512)), (with_smallest(), (64, 128, 256, 512))],
)
def test_an_anchor_keeps_its_rows(old, sizes):
    """The rows carry the anchors themselves, so that the new order is that of our generator."""
    boxes = torch.tensor(old, dtype=torch.float32)
    ours = legacy_cell_anchors(16, sizes, RATIOS)
    # Their cell begins where ours has its middle, and their boxes end in the last pixel.
    ours = ours + 8 - torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(anchors_by_size(boxes.flatten()).view(-1, 4), ours)
    for side in range(4):
        logits = torch.cat([-boxes[:, side], boxes[:, side]])
        torch.testing.assert_close(foreground_minus_background(logits), 2 * ours[:, side])


def test_the_sigmoid_of_the_difference_is_the_softmax():
    """Acceptance check: to 1e-6, for weights of a convolution."""
    torch.manual_seed(0)
    weight, bias = torch.randn(18, 8, 1, 1), torch.randn(18)
    x = torch.randn(2, 8, 5, 6)
    theirs = torch.nn.functional.conv2d(x, weight, bias).unflatten(1, (2, 9)).softmax(1)[:, 1]
    theirs = theirs.unflatten(1, (3, 3)).transpose(1, 2).flatten(1, 2)
    ours = torch.nn.functional.conv2d(
        x, foreground_minus_background(weight), foreground_minus_background(bias)
    ).sigmoid()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 9, 20])
@pytest.mark.parametrize("change", [foreground_minus_background, anchors_by_size])
def test_rows_that_are_no_anchors_are_refused(rows, change):
    with pytest.raises(
        ConversionError, match=rf"rpn_\w+ is \[{rows}, 4\]: its rows must be a mult"
    ):
        change(torch.zeros(rows, 4))
