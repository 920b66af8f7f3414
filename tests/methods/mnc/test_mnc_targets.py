"""What MNC's masks and classes of masked regions are trained with."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from instseg_ext.methods.mnc import targets as module
from instseg_ext.methods.mnc.targets import mask_level_labels, mask_targets, whole_pixels
from instseg_ext.structures.matched_masks import MatchedBitMasks

HEIGHT, WIDTH = 90, 120


def blobs(count=4):
    """Objects of random shape in random boxes."""
    masks = torch.zeros((count, HEIGHT, WIDTH), dtype=torch.bool)
    generator = torch.Generator().manual_seed(count)
    for mask in masks:
        left, top = (int(torch.randint(0, n - 50, (1,), generator=generator)) for n in (120, 90))
        coarse = torch.rand((1, 1, 4, 5), generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (42, 48), mode="bilinear")[0, 0]
        mask[top : top + 42, left : left + 48] = fine > 0.45
    found = Instances((HEIGHT, WIDTH))
    found.gt_masks = BitMasks(masks)
    found.gt_boxes = found.gt_masks.get_bounding_boxes()
    found.gt_classes = torch.arange(count)
    return found


def near(target, count):
    """Boxes around the objects, and the object each of them is around."""
    generator = torch.Generator().manual_seed(7)
    matched = torch.arange(count) % len(target)
    shift = torch.randn((count, 4), generator=generator) * 5
    boxes = Boxes(target.gt_boxes.tensor[matched] + shift)
    boxes.clip((HEIGHT, WIDTH))
    return boxes.tensor, matched


def last_pixels(box):
    """Return the box as (x1, y1, x2, y2) of its first and last pixels, rounded."""
    x1, y1, x2, y2 = box.tolist()
    return [round(x1), round(y1), round(x2 - 1), round(y2 - 1)]


def plain_target(box, mask, size=21):
    """The part of the mask in the frame of the box, resized."""
    x1, y1, x2, y2 = last_pixels(box)
    return cv2.resize(mask[y1 : y2 + 1, x1 : x2 + 1].astype(np.float32), (size, size)) >= 0.4


def plain_label(probs, box, mask, label, num_classes):
    """One region: resize the mask to the box, compare it with the object."""
    x1, y1, x2, y2 = last_pixels(box)
    drawn = np.zeros(mask.shape, bool)
    drawn[y1 : y2 + 1, x1 : x2 + 1] = cv2.resize(probs, (x2 - x1 + 1, y2 - y1 + 1)) >= 0.4
    return label if (drawn & mask).sum() / (drawn | mask).sum() >= 0.5 else num_classes


def test_targets_equal_opencv():
    target = blobs()
    boxes, matched = near(target, 40)
    found = mask_targets(boxes, matched, target, 21, 0.4)
    masks = target.gt_masks.tensor.numpy()
    expected = [plain_target(box, masks[i]) for box, i in zip(boxes, matched, strict=True)]
    np.testing.assert_array_equal(found.numpy(), np.stack(expected))
    assert 0.2 < found.float().mean() < 0.8


def test_a_box_beside_the_object_has_an_empty_target():
    target = Instances((40, 40), gt_masks=BitMasks(torch.zeros((1, 40, 40)).bool()))
    target.gt_masks.tensor[0, :10, :10] = True
    found = mask_targets(torch.tensor([[20.0, 20, 40, 40]]), torch.tensor([0]), target, 21, 0.4)
    assert not found.any()


def agreeing(target, matched, boxes, generator):
    """Predicted masks, some of which are close to the objects."""
    exact = mask_targets(boxes, matched, target, 21, 0.4).float()
    noise = torch.rand(exact.shape, generator=generator)
    share = torch.rand((len(boxes), 1, 1), generator=generator)
    return exact * (1 - share) + noise * share


@pytest.mark.parametrize("budget_mb", [256, 0.05])
def test_labels_equal_plain_loops(budget_mb):
    target = blobs()
    boxes, matched = near(target, 60)
    generator = torch.Generator().manual_seed(3)
    probs = agreeing(target, matched, boxes, generator)
    labels = target.gt_classes[matched].clone()
    labels[::7] = 20
    masks = target.gt_masks.tensor.numpy()
    expected = [
        plain_label(probs[r].numpy(), boxes[r], masks[matched[r]], int(labels[r]), 20)
        if labels[r] < 20
        else 20
        for r in range(60)
    ]
    found = mask_level_labels(
        probs, boxes, matched, labels, target, num_classes=20, budget_mb=budget_mb
    )
    assert found.tolist() == expected
    assert 20 < sum(label < 20 for label in expected) < 50


def test_matched_masks_give_the_same():
    target = blobs()
    boxes, matched = near(target, 12)
    shared = Instances((HEIGHT, WIDTH), gt_masks=MatchedBitMasks(target.gt_masks)[[3, 2, 1, 0]])
    labels = target.gt_classes[matched]
    probs = agreeing(target, matched, boxes, torch.Generator().manual_seed(3))
    for function in (
        lambda which, index: mask_targets(boxes, index, which, 21, 0.4),
        lambda which, index: mask_level_labels(probs, boxes, index, labels, which, num_classes=20),
    ):
        assert torch.equal(function(target, matched), function(shared, 3 - matched))


def test_the_iou_decides():
    """A mask that is right on the left half of its object: IoU one half."""
    target = Instances((40, 40), gt_masks=BitMasks(torch.zeros((1, 40, 40)).bool()))
    target.gt_masks.tensor[0, 8:28, 10:30] = True
    probs = torch.zeros((1, 20, 20))
    probs[..., :10] = 1
    arguments = (torch.tensor([[10.0, 8, 30, 28]]), torch.tensor([0]), torch.tensor([3]), target)
    for threshold, label in ((0.5, 3), (0.51, 9)):
        found = mask_level_labels(probs, *arguments, num_classes=9, iou_threshold=threshold)
        assert found.tolist() == [label]


def test_drawings_are_small(monkeypatch):
    """No drawing is larger than its boxes, or than the budget."""
    target = blobs()
    boxes, matched = near(target, 80)
    drawn = []

    def render(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    original = module.render_masks
    monkeypatch.setattr(module, "render_masks", render)
    labels, probs = target.gt_classes[matched], torch.rand((80, 21, 21))
    mask_level_labels(probs, boxes, matched, labels, target, num_classes=20)
    sides = whole_pixels(boxes)[:, 2:] - whole_pixels(boxes)[:, :2]
    assert len(drawn) == 5
    assert max(x[0].numel() for x in drawn) <= sides.amax(dim=0).prod() < HEIGHT * WIDTH / 2
    drawn.clear()
    mask_level_labels(probs, boxes, matched, labels, target, num_classes=20, budget_mb=0.4)
    assert len(drawn) == 40
    assert max(x.numel() for x in drawn) * 16 <= 0.4 * 2**20


def test_nothing_to_label():
    target = blobs()
    none, index = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64)
    assert mask_targets(none, index, target, 21, 0.4).shape == (0, 21, 21)
    empty = Instances((HEIGHT, WIDTH), gt_masks=BitMasks(torch.zeros((0, HEIGHT, WIDTH)).bool()))
    boxes = torch.tensor([[0.0, 0, 9, 9]])
    background = mask_level_labels(
        torch.rand((1, 21, 21)), boxes, index.new_zeros(1), index.new_full((1,), 20), empty,
        num_classes=20,
    )  # fmt: skip
    assert background.tolist() == [20]
    assert mask_targets(none, index, empty, 21, 0.4).shape == (0, 21, 21)


def test_images_without_objects_may_have_no_masks():
    """detectron2's mapper gives images without annotations no field of masks."""
    target = Instances((40, 40), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0))
    none, index = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64)
    found = mask_targets(none, index, target, 21, 0.4)
    assert found.shape == (0, 21, 21)
    assert found.dtype == torch.bool


def test_whole_pixels():
    boxes = torch.tensor([[0.4, 0.6, 9.5, 10.5], [3.6, 3.6, 3.9, 3.7], [5.0, 6, 7, 8]])
    assert whole_pixels(boxes).tolist() == [[0, 1, 9, 11], [4, 4, 5, 5], [5, 6, 7, 8]]


def test_polygons_are_refused():
    target = Instances((40, 40), gt_masks=PolygonMasks([[np.array([1.0, 1, 9, 1, 9, 9])]]))
    with pytest.raises(ValueError, match=r"INPUT\.MASK_FORMAT"):
        mask_targets(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]), target, 21, 0.4)
