"""What regions are trained on, and as what (acceptance checks 6 and 9)."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from methods.multipathnet.multipathnet_toys import objects_of, proposals_of

from instseg_ext.methods.multipathnet.arch import split_crowds
from instseg_ext.methods.multipathnet.sampling import (
    SamplingOptions,
    crowd_shares,
    labels_by_threshold,
    sample_regions,
)

THRESHOLDS = torch.tensor([0.5, 0.55, 0.6, 0.65, 0.7, 0.75])
EVERY = SamplingOptions(num_classes=3, batch_size=100, foreground_fraction=1.0, append_gt=False)
# IoU 0.62, 0.30 and 0.05 with the box (0, 0, 100, 1), and one elsewhere.
BOXES = [[0, 0, 62, 1], [0, 0, 30, 1], [0, 0, 5, 1], [0, 40, 62, 41]]


def drawn(foreground_iou=0.5, options=EVERY, boxes=BOXES, objects=None):
    if objects is None:
        objects = objects_of([0, 0, 100, 1], classes=[2])
    return sample_regions(proposals_of(*boxes), objects, foreground_iou, options)


def test_acceptance_check_6_labels_of_the_classifiers():
    found = drawn()
    assert found.gt_iou.tolist() == pytest.approx([0.62, 0.3])
    assert found.gt_classes.tolist() == [2, 3]
    labels = labels_by_threshold(found.gt_classes, found.gt_iou, THRESHOLDS, 3)
    assert labels.tolist() == [[2, 2, 2, 3, 3, 3], [3] * 6]


def test_threshold_of_the_turn_decides():
    assert drawn(0.65).gt_classes.tolist() == [3, 3]
    assert drawn(0.2).gt_classes.tolist() == [2, 2]


def test_far_regions_are_background_where_wanted():
    near = SamplingOptions(num_classes=3, batch_size=100, background_iou=0.0, append_gt=False)
    assert sorted(drawn(options=near).gt_classes.tolist()) == [2, 3, 3, 3]


def test_without_objects_nothing_is_drawn():
    found = drawn(objects=objects_of())
    assert len(found) == 0
    assert found.gt_classes.dtype is torch.int64
    assert not found.has("gt_boxes")


def test_objects_are_regions_too():
    options = SamplingOptions(num_classes=3, batch_size=100, foreground_fraction=1.0)
    found = drawn(options=options)
    assert len(found) == 3
    assert found.gt_iou.max() == 1
    only = sample_regions(proposals_of(), objects_of([0, 0, 9, 9]), 0.5, options)
    assert only.proposal_boxes.tensor.tolist() == [[0, 0, 9, 9]]


def test_of_equally_overlapping_objects_the_first_counts():
    objects = objects_of([0, 0, 10, 10], [0, 0, 10, 10], classes=[1, 0])
    assert drawn(boxes=[[0, 0, 10, 9]], objects=objects).gt_classes.tolist() == [1]


def test_share_of_foreground():
    boxes = [[0, 0, 100 - i, 1] for i in range(30)] + [[0, 0, 20 + i, 1] for i in range(25)]
    options = SamplingOptions(num_classes=3, batch_size=16, append_gt=False)
    classes = drawn(options=options, boxes=boxes).gt_classes
    assert (classes[:4] == 2).all()
    assert (classes[4:] == 3).all()
    assert len(classes) == 16


def test_acceptance_check_9_crowds():
    """More than 70 % of the area in a crowd: never drawn; objects stay."""
    crowd = Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]]))
    boxes = [[0, 0, 10, 10], [0, 0, 10, 14], [0, 0, 10, 15], [15, 0, 35, 10]]
    proposals = proposals_of(*boxes)
    shares = crowd_shares(proposals.proposal_boxes, crowd)
    assert shares.tolist() == pytest.approx([1, 10 / 14, 10 / 15, 0.5])
    proposals.crowd_share = shares
    objects = objects_of([0, 0, 10, 10], [10, 0, 40, 10])
    options = SamplingOptions(num_classes=3, batch_size=100, foreground_fraction=1.0)
    found = sample_regions(proposals, objects, 0.5, options)
    expected = sorted([*boxes[2:], [0, 0, 10, 10], [10, 0, 40, 10]])
    assert sorted(found.proposal_boxes.tensor.int().tolist()) == expected
    assert crowd_shares(proposals.proposal_boxes, Boxes(torch.zeros(0, 4))).eq(0).all()


def test_crowds_are_no_objects():
    objects = objects_of([0, 0, 10, 10], [5, 5, 9, 9], [1, 1, 3, 3])
    objects.gt_is_crowd = torch.tensor([False, True, False])
    left, crowds = split_crowds(objects)
    assert left.gt_boxes.tensor[:, 0].tolist() == [0, 1]
    assert not left.has("gt_is_crowd")
    assert crowds.tensor.tolist() == [[5, 5, 9, 9]]
    left, crowds = split_crowds(left)
    assert (len(left), len(crowds)) == (2, 0)


def test_fields_of_the_objects_come_along():
    objects = objects_of([0, 0, 100, 1], [0, 40, 62, 41], classes=[2, 1])
    objects.gt_marks = torch.tensor([7, 8])
    found = drawn(objects=objects)
    assert isinstance(found, Instances)
    rows = found.proposal_boxes.tensor[:, 1].tolist()
    marks = set(zip(rows, found.gt_marks.tolist(), strict=True))
    assert marks == {(0, 7), (40, 8)}
