"""Which regions are trained, and their targets (section 3 of the paper; acceptance check 10)."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, PolygonMasks
from methods.fcis.fcis_toys import TRANSFORM, objects_of, proposals_of

from instseg_ext.methods.fcis.sampling import (
    Regions,
    SamplingOptions,
    label_regions,
    make_targets,
    sample,
)

RANDOM = SamplingOptions(hard=False, background_iou=(0.1, 0.5))
OBJECT = [[20, 20, 60, 60]]


def labelled(boxes, options, objects=OBJECT, classes=(1,)):
    found = proposals_of(boxes)
    return label_regions(found, objects_of(objects, list(classes)), options, 3)


def chosen(boxes, options, **others):
    torch.manual_seed(0)
    return sample(*labelled(boxes, options, **others), options, 3)


def test_labels_follow_the_largest_overlap():
    boxes = [[20, 20, 60, 60], [20, 20, 60, 40], [20, 20, 60, 39.9], [100, 100, 120, 120]]
    regions, overlap = labelled(boxes, SamplingOptions(append_gt=False))
    assert regions.classes.tolist() == [1, 1, 3, 3]
    assert overlap.tolist() == pytest.approx([1, 0.5, 0.4975, 0])


def test_objects_join_the_regions():
    regions, _ = labelled([[0, 0, 10, 10]], SamplingOptions())
    assert regions.boxes.tolist() == [[0, 0, 10, 10], [20, 20, 60, 60]]
    assert regions.classes.tolist() == [3, 1]
    none, overlap = labelled([[0, 0, 10, 10]], SamplingOptions(), objects=[], classes=())
    assert none.classes.tolist() == [3]
    assert overlap.tolist() == [0]


def test_hard_regions_leave_out_those_in_between():
    boxes = [*OBJECT, [20, 20, 60, 35], [100, 100, 120, 120]]
    options = SamplingOptions(append_gt=False, background_iou=(0.1, 0.3))
    assert len(chosen(boxes, options)) == 1
    options = SamplingOptions(append_gt=False)
    assert chosen(boxes, options).classes.tolist() == [1, 3, 3]


def test_random_regions_keep_the_share_of_foreground():
    boxes = [*OBJECT * 60, *[[20, 20, 60, 30]] * 200]
    regions = chosen(boxes, RANDOM)
    assert len(regions) == 128
    assert (regions.classes == 1).tolist() == [True] * 32 + [False] * 96
    few = chosen([*OBJECT * 4, *[[20, 20, 60, 30]] * 200], RANDOM)
    assert int((few.classes == 1).sum()) == 5  # with the object itself


def test_a_shortage_is_filled_with_background_only():
    """Foreground that was not drawn is left alone."""
    boxes = [*OBJECT * 60, [20, 20, 60, 30], [100, 100, 120, 120]]
    regions = chosen(boxes, RANDOM)
    assert len(regions) == 128
    background = regions.boxes[regions.classes == 3]
    assert len(background) == 96
    assert {tuple(box) for box in background.tolist()} == {
        (20, 20, 60, 30), (100, 100, 120, 120),
    }  # fmt: skip
    assert len(chosen(OBJECT * 60, RANDOM)) == 32  # nothing to fill with


def test_drawing_follows_the_seed():
    boxes = [*OBJECT * 60, *[[20 + i / 10, 20, 60, 30] for i in range(200)]]
    assert torch.equal(chosen(boxes, RANDOM).boxes, chosen(boxes, RANDOM).boxes)


def targets_of(boxes, target, size=21):
    boxes = torch.tensor(boxes).float()
    zeros = torch.zeros(len(boxes), dtype=torch.int64)
    return make_targets(
        Regions(boxes, zeros, zeros),
        target,
        transform=TRANSFORM,
        size=size,
        threshold=0.4,
        num_classes=3,
    )


def legacy_encode(box, gt):
    """Of boxes that end in their last pixel, in plain Python."""

    def parts(b):
        width, height = b[2] - b[0] + 1, b[3] - b[1] + 1
        return b[0] + 0.5 * (width - 1), b[1] + 0.5 * (height - 1), width, height

    (x, y, w, h), (gx, gy, gw, gh) = parts(box), parts(gt)
    deltas = ((gx - x) / w, (gy - y) / h, math.log(gw / w), math.log(gh / h))
    return [value / std for value, std in zip(deltas, (0.2, 0.2, 0.5, 0.5), strict=True)]


def test_acceptance_check_10_box_code_of_the_authors():
    generator = np.random.default_rng(0)
    for _ in range(20):
        corner, side = generator.uniform(0, 60, (2, 2)), generator.uniform(5, 60, (2, 2))
        box, gt = np.concatenate([corner, corner + side], axis=1)
        last = [0, 0, 1, 1]
        target = objects_of([[0, 0, 100, 100]], [0])
        target.gt_boxes = Boxes(torch.from_numpy((gt + last)[None]).float())
        found = targets_of((box + last)[None].tolist(), target)
        expected = legacy_encode(box, gt)
        np.testing.assert_allclose(found.deltas[0].tolist(), expected, rtol=1e-4, atol=1e-5)
        decoded = TRANSFORM.apply_deltas(found.deltas, found.boxes)[0].tolist()
        np.testing.assert_allclose(decoded, gt + last, rtol=1e-5, atol=1e-4)


def test_masks_are_cut_in_whole_pixels():
    target = objects_of([[20, 20, 60, 60]], [0])
    masks = targets_of([[19.6, 20.4, 60.4, 59.6], [40, 20, 80, 60], [70, 70, 90, 90]], target).masks
    assert masks.dtype == torch.float32
    assert masks[0].all()
    # The object ends in the middle: the cell there is half inside, more than the threshold.
    assert masks[1, :, :11].all()
    assert not masks[1, :, 11:].any()
    assert not masks[2].any()


def test_regions_thinner_than_a_pixel():
    target = objects_of([[20, 20, 60, 60]], [0])
    assert targets_of([[30.1, 30.1, 30.3, 30.2]], target).masks.all()


def test_background_has_no_mask_and_no_deltas():
    regions = Regions(
        torch.tensor([[0.0, 0, 9, 9], [20, 20, 50, 60]]), torch.tensor([3, 1]), torch.tensor([0, 0])
    )
    options = {"transform": TRANSFORM, "size": 7, "threshold": 0.4, "num_classes": 3}
    found = make_targets(regions, objects_of(OBJECT, [1]), **options)
    assert found.masks.shape == (1, 7, 7)
    assert not found.deltas[0].any()
    assert found.deltas[1].any()
    swapped = found.take(torch.tensor([1, 0]), 3)
    assert swapped.classes.tolist() == [1, 3]
    assert torch.equal(swapped.masks, found.masks)
    assert len(found.take(torch.tensor([0]), 3).masks) == 0


def test_polygons_are_refused():
    target = objects_of(OBJECT, [1])
    target.gt_masks = PolygonMasks([[np.array([20.0, 20, 60, 20, 60, 60])]])
    with pytest.raises(ValueError, match=r"INPUT.MASK_FORMAT"):
        targets_of(OBJECT, target)
