"""Suppression within classes against a plain loop."""

import pytest
import torch

from instseg_ext.layers import box_nms
from instseg_ext.layers.box_nms import class_nms


def iou(a, b):
    common = (min(a[2], b[2]) - max(a[0], b[0])).clamp(min=0) * (
        min(a[3], b[3]) - max(a[1], b[1])
    ).clamp(min=0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (areas[0] + areas[1] - common)


def by_loop(boxes, scores, classes, threshold, limit):
    kept = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():
        rivals = [j for j in kept if classes[j] == classes[i]]
        if all(iou(boxes[i], boxes[j]) <= threshold for j in rivals):
            kept.append(i)
    return kept[:limit]


def candidates(num, seed, extent=60.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * extent
    size = 5 + torch.rand(num, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + size], dim=1)
    return (
        boxes,
        torch.rand(num, generator=generator),
        torch.randint(0, 4, (num,), generator=generator),
    )


@pytest.mark.parametrize("limit", [3, 20, 1000])
def test_it_is_the_greedy_loop(limit, monkeypatch):
    # So that a second look is needed.
    monkeypatch.setattr(box_nms, "_FIRST_LOOK", 1)
    for seed in range(3):
        boxes, scores, classes = candidates(90, seed)
        kept = class_nms(boxes, scores, classes, 0.3, limit)
        assert kept.tolist() == by_loop(boxes, scores, classes, 0.3, limit)


def test_a_thousandth_of_a_pixel_counts_in_the_last_class():
    # IoU just above and just below one half, at coordinates that float32 resolves to 1e-4.
    for shift, kept in ((0.001, [0]), (-0.001, [0, 1])):
        boxes = torch.tensor([[1000.0, 0, 1020, 10], [1000.0, 0, 1010 + shift, 10]])
        found = class_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([79, 79]), 0.5, 10)
        assert found.tolist() == kept


def test_equal_scores_keep_their_order_and_nothing_gives_nothing():
    boxes, scores, classes = candidates(20, 5)
    kept = class_nms(boxes, torch.ones_like(scores), torch.arange(20), 0.5, 100)
    assert kept.tolist() == list(range(20))
    assert class_nms(boxes[:0], scores[:0], classes[:0], 0.5, 100).shape == (0,)
