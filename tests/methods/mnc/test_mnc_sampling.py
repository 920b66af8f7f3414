"""Which regions MNC is trained on."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances, pairwise_iou

from instseg_ext.methods.mnc.config import add_mnc_config
from instseg_ext.methods.mnc.sampling import (
    SamplingOptions,
    anchor_overrides,
    label_regions,
    sample_regions,
)

OPTIONS = SamplingOptions(num_classes=20)
SIZE = (400, 400)


def target(*boxes, classes=None):
    found = Instances(SIZE)
    found.gt_boxes = Boxes(torch.tensor(boxes).float().reshape(-1, 4))
    found.gt_classes = torch.arange(len(boxes)) if classes is None else torch.tensor(classes)
    return found


def proposals(boxes, anchors=True):
    found = Instances(SIZE, proposal_boxes=Boxes(boxes))
    found.objectness_logits = torch.zeros(len(boxes))
    if anchors:
        found.anchor_index = torch.arange(len(boxes)) + 1000
    return found


OBJECT = (100, 100, 200, 200)


def overlapping(counts):
    """Boxes of given IoU with OBJECT: {IoU: how many}."""
    rows = [
        (100.0, 100.0, 200.0, 100 + 100 * iou) if iou else (300.0, 300.0, 340.0, 340.0)
        for iou, count in counts.items()
        for _ in range(count)
    ]
    return torch.tensor(rows).reshape(-1, 4)


@pytest.mark.parametrize(
    ("counts", "foreground", "near", "far"),
    [
        ({0.75: 40, 0.25: 100, 0: 100}, 19, 38, 7),  # check 9 of the method's list
        ({0.75: 40, 0.25: 100}, 19, 38, 0),  # nobody makes up for the missing ones
        ({0.75: 40, 0.0625: 100}, 19, 0, 7),
        ({0.75: 3, 0.25: 20, 0: 100}, 4, 20, 9),  # 3 and the object: 60 are left, 51 and 9
        ({0.25: 100, 0: 100}, 1, 54, 9),  # the object alone: round(53.55), round(9.45)
        ({0.75: 13, 0.25: 100, 0: 100}, 14, 42, 8),  # halves: 42.5 and 7.5 go to even numbers
        ({}, 1, 0, 0),
    ],
)
def test_how_many_of_each(counts, foreground, near, far):
    given = proposals(overlapping(counts))
    (sampled,) = sample_regions([given], [target(OBJECT)], OPTIONS)
    iou = pairwise_iou(given.proposal_boxes, target(OBJECT).gt_boxes)[:, 0]
    assert sampled.num_foreground == foreground
    assert len(sampled) == foreground + near + far
    assert (sampled.labels[:foreground] == 0).all()
    assert (sampled.labels[foreground:] == 20).all()
    rows = sampled.proposal_index
    background = rows[foreground:]
    assert (background >= 0).all()
    assert int((iou[background] < 0.1).sum()) == far
    assert int((iou[background] > 0.1).sum()) == near
    for part in (rows[:foreground], background):
        assert len(part.unique()) == len(part)


def test_an_image_without_objects_is_background():
    (sampled,) = sample_regions([proposals(overlapping({0: 100}))], [target()], OPTIONS)
    assert sampled.num_foreground == 0
    assert len(sampled) == 10  # the far part of 64
    assert (sampled.labels == 20).all()
    assert not sampled.matched.any()
    assert not sampled.is_gt.any()


def test_nothing_at_all():
    (sampled,) = sample_regions([proposals(torch.zeros(0, 4))], [target()], OPTIONS)
    assert (len(sampled), sampled.boxes.shape) == (0, (0, 4))
    again = label_regions(torch.zeros(0, 4), target(), OPTIONS)
    assert (len(again), again.num_foreground) == (0, 0)


def test_labels_and_objects():
    """Of two objects with the same box, the first one counts."""
    objects = target(OBJECT, (300, 300, 340, 340), OBJECT, classes=[7, 3, 9])
    given = proposals(overlapping({0.75: 1, 0: 1, 0.25: 1}))
    (sampled,) = sample_regions([given], [objects], OPTIONS)
    rows = sampled.proposal_index.tolist()
    assert sampled.num_foreground == 5
    expected = {0: (7, 0), 1: (3, 1), 2: (20, 0)}
    for row, label, matched in zip(
        rows, sampled.labels.tolist(), sampled.matched.tolist(), strict=True
    ):
        if row >= 0:
            assert (label, matched) == expected[row]
    assert sampled.labels[sampled.is_gt].tolist() == [7, 3, 7]
    assert sampled.boxes[sampled.is_gt].tolist() == objects.gt_boxes.tensor.tolist()


def test_ends_of_a_range_belong_to_both():
    given = proposals(overlapping({0.5: 1}))
    (sampled,) = sample_regions([given], [target(OBJECT)], OPTIONS)
    assert sampled.proposal_index.tolist() == [0, -1, 0]
    assert sampled.labels.tolist() == [0, 0, 20]


def test_boxes_stay_in_the_graph():
    boxes = overlapping({0.75: 40, 0.25: 100}).requires_grad_()
    (sampled,) = sample_regions([proposals(boxes)], [target(OBJECT)], OPTIONS)
    sampled.boxes.sum().backward()
    chosen = torch.zeros(len(boxes), dtype=torch.bool)
    chosen[sampled.proposal_index[~sampled.is_gt]] = True
    assert torch.equal(boxes.grad.bool().all(dim=1), chosen)
    again = label_regions(boxes, target(OBJECT), OPTIONS)
    assert again.boxes.requires_grad


def test_samples_repeat_with_the_seed():
    given, objects = proposals(overlapping({0.75: 40, 0.25: 100, 0: 100})), target(OBJECT)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sample_regions([given], [objects], OPTIONS)[0].proposal_index)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_second_pass_keeps_all():
    boxes = overlapping({0: 3, 0.75: 2, 0.25: 2, 0.5: 1})
    regions = label_regions(boxes, target(OBJECT, classes=[4]), OPTIONS)
    assert regions.proposal_index.tolist() == [3, 4, 7, -1, 0, 1, 2, 5, 6]
    assert regions.num_foreground == 4
    assert regions.labels.tolist() == [4] * 4 + [20] * 5
    alone = label_regions(boxes, target(), OPTIONS)
    assert alone.proposal_index.tolist() == list(range(8))
    assert (alone.labels == 20).all()


def test_a_box_without_area_is_background():
    boxes = torch.tensor([[100.0, 100, 100, 200], [150, 120, 140, 180]])
    regions = label_regions(boxes, target(OBJECT), OPTIONS)
    assert regions.labels.tolist() == [0, 20, 20]


def test_boxes_of_objects_are_left_out_if_so_configured():
    options = SamplingOptions(num_classes=20, append_gt=False)
    given = proposals(overlapping({0.75: 2}))
    (sampled,) = sample_regions([given], [target(OBJECT)], options)
    assert sampled.proposal_index.tolist() == [0, 1]


def test_overrides_name_the_anchors():
    given = proposals(overlapping({0.75: 40, 0.25: 100}))
    sampled = sample_regions([given, given], [target(OBJECT), target()], OPTIONS)
    overrides = anchor_overrides(sampled, [given, given])
    for regions, override in zip(sampled, overrides, strict=True):
        rows, count = regions.proposal_index, regions.num_foreground
        assert override.foreground.tolist() == [1000 + i for i in rows[:count].tolist() if i >= 0]
        assert override.background.tolist() == [1000 + i for i in rows[count:].tolist()]
    bare = proposals(overlapping({0.75: 4}), anchors=False)
    assert anchor_overrides(sample_regions([bare], [target(OBJECT)], OPTIONS), [bare]) is None


def config():
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 20
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 0.3
    return cfg


def test_options_come_from_the_config():
    assert SamplingOptions.from_config(config()) == OPTIONS


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.4, 0.6], "IOU_THRESHOLDS"),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.05], "BG_SPLIT_IOU"),
        ("MODEL.MNC.BG_NEAR_FRACTION", 1.5, "BG_NEAR_FRACTION"),
    ],
)
def test_wrong_options_are_named(key, value, name):
    cfg = config()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=name):
        SamplingOptions.from_config(cfg)
