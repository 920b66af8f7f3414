"""Losses: worked values, the reference form of each gradient, and batches with nothing in them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from instseg_ext.methods.yolact.assembly import box_windows
from instseg_ext.methods.yolact.losses import (
    box_loss,
    class_loss,
    mask_iou_loss,
    mask_loss,
    pair_masks,
    semantic_loss,
)

K = 4
SIZE = (12, 16)  # of the prototypes
INPUT = (48, 64)


class TinyNet(nn.Module):
    """Like the mask-IoU network: (n, 1, h, w) to (n, K), never negative."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2)
        self.pred = nn.Conv2d(8, K, 1)
        nn.init.constant_(self.pred.bias, 0.3)
        self.seen = []

    def forward(self, masks):
        self.seen.append(masks)
        return self.pred(self.conv(masks).relu()).relu().amax(dim=(2, 3))


def rectangles(boxes, size_hw=INPUT):
    masks = torch.zeros(len(boxes), *size_hw, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def objects(boxes, classes=None):
    """Return normalised boxes, classes and masks of rectangles given in input pixels."""
    normalised = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    normalised = normalised / torch.tensor([INPUT[1], INPUT[0]] * 2)
    classes = torch.tensor(classes or [i % K for i in range(len(boxes))], dtype=torch.int64)
    return normalised, classes, rectangles(boxes)


BOXES = [(4, 4, 36, 28), (20, 8, 60, 44), (0, 20, 24, 48)]


def pairs_of(boxes=BOXES, matched=None, max_masks=100, prototypes=None, coefficients=None):
    """Pair random masks with the objects of an image, one after the other by default."""
    matched = torch.arange(len(boxes)) if matched is None else torch.tensor(matched)
    prototypes = torch.randn(5, *SIZE) if prototypes is None else prototypes
    coefficients = torch.randn(len(matched), 5) if coefficients is None else coefficients
    return pair_masks(
        prototypes, coefficients, matched.long(), *objects(boxes), max_masks=max_masks
    )


# Classes


def ohem_case():
    """Return 2 positives, 10 background and 3 neutral anchors, in this order."""
    labels = torch.tensor([[0, 3] + [K] * 10 + [-1] * 3])
    return torch.randn(1, 15, K + 1) * 3, labels


def test_three_hardest_background_anchors_per_positive():
    logits, labels = ohem_case()
    logits.requires_grad_()
    loss = class_loss(logits, labels, neg_pos_ratio=3, normalizer=2)
    costs = F.cross_entropy(logits[0], labels[0].clamp(min=0), reduction="none")
    hardest = costs[2:12].topk(6).indices + 2
    torch.testing.assert_close(loss, (costs[:2].sum() + costs[hardest].sum()) / 2)
    loss.backward()
    used = logits.grad[0].ne(0).any(dim=1).nonzero().flatten()
    assert used.tolist() == sorted([0, 1, *hardest.tolist()])


def test_selection_has_no_gradient():
    logits, labels = ohem_case()
    logits.requires_grad_()
    class_loss(logits, labels, neg_pos_ratio=3, normalizer=1).backward()
    used = logits.grad[0].ne(0).any(dim=1)
    targets = F.one_hot(labels[0].clamp(min=0), K + 1)
    torch.testing.assert_close(logits.grad[0][used], (logits[0].softmax(1) - targets)[used])


def test_fewer_background_anchors_than_wanted():
    logits, labels = torch.randn(1, 6, K + 1), torch.tensor([[0, 1, 2, K, K, -1]])
    loss = class_loss(logits, labels, neg_pos_ratio=3, normalizer=1)
    expected = F.cross_entropy(logits[0, :5], labels[0, :5], reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_each_image_has_its_own_background_anchors():
    logits = torch.randn(3, 40, K + 1)
    labels = torch.full((3, 40), K)
    labels[0, 7], labels[2, :5], labels[2, 20:] = 1, 2, -1
    alone = [
        class_loss(logits[i : i + 1], labels[i : i + 1], neg_pos_ratio=3, normalizer=6)
        for i in range(3)
    ]
    assert alone[1] == 0
    together = class_loss(logits, labels, neg_pos_ratio=3, normalizer=6)
    torch.testing.assert_close(together, sum(alone))


def test_class_loss_without_positives_is_zero_and_connected():
    logits = torch.randn(2, 9, K + 1, requires_grad=True)
    labels = torch.full((2, 9), K)
    labels[0, 3] = -1
    loss = class_loss(logits, labels, neg_pos_ratio=3, normalizer=1)
    assert loss == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_extreme_logits():
    """One row far above the others must not hide differences between them."""
    labels = torch.tensor([[0] + [K] * 6])
    logits = torch.zeros(1, 7, K + 1)
    logits[0, 0, 1], logits[0, 1, 0], logits[0, 2, K] = 1e4, 1e4, 1e4
    logits[0, 3] = -1e4
    logits[0, 4, 2], logits[0, 5, 2] = 3, 2
    logits.requires_grad_()
    loss = class_loss(logits, labels, neg_pos_ratio=3, normalizer=1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].ne(0).any(dim=1).nonzero().flatten().tolist() == [0, 1, 4, 5]


def test_background_in_proportion_to_positives_of_many_images():
    """Compare with ranks over all anchors, as the authors count."""
    logits, labels = torch.randn(4, 60, K + 1), torch.randint(-1, K + 1, (4, 60))
    labels[:, 12:] = K
    expected = 0
    for image_logits, image_labels in zip(logits, labels, strict=True):
        hardness = image_logits.logsumexp(1) - image_logits[:, K]
        hardness[image_labels != K] = 0
        positive = (image_labels >= 0) & (image_labels < K)
        rank = hardness.argsort(descending=True).argsort()
        chosen = positive | ((rank < 3 * positive.sum()) & (image_labels == K))
        expected += F.cross_entropy(image_logits[chosen], image_labels[chosen], reduction="sum")
    found = class_loss(logits, labels, neg_pos_ratio=3, normalizer=1)
    torch.testing.assert_close(found, expected)


# Boxes


def test_box_loss():
    deltas = torch.tensor([[0.5, -3.0, 0.0, 1.0]])
    loss = box_loss(deltas, torch.zeros(1, 4), normalizer=torch.tensor(2))
    torch.testing.assert_close(loss, torch.tensor((0.125 + 2.5 + 0 + 0.5) / 2))


def test_box_loss_without_positives_is_zero_and_connected():
    deltas = torch.randn(7, 4, requires_grad=True)
    loss = box_loss(deltas[[]], torch.zeros(0, 4), normalizer=1)
    assert loss == 0
    loss.backward()
    assert torch.equal(deltas.grad, torch.zeros(7, 4))


# Masks


def test_masks_of_zero_coefficients():
    """Every kept pixel costs ln 2."""
    pairs = pairs_of(coefficients=torch.zeros(3, 5))
    rows, cols = box_windows(objects(BOXES)[0], SIZE)
    kept = rows.sum(1) * cols.sum(1)
    areas = torch.tensor([(x1 - x0) * (y1 - y0) / 16 for x0, y0, x1, y1 in BOXES])
    expected = math.log(2) * (kept / areas).mean()
    torch.testing.assert_close(mask_loss([pairs], normalizer=3), expected)


def test_masks_of_a_doubled_batch():
    pairs = pairs_of()
    torch.testing.assert_close(
        mask_loss([pairs], normalizer=3), mask_loss([pairs, pairs], normalizer=6)
    )


def test_targets_and_classes_follow_the_matched_objects():
    pairs = pairs_of(matched=[2, 0, 2])
    expected = F.interpolate(rectangles(BOXES)[None].float(), SIZE, mode="bilinear")[0] > 0.5
    assert torch.equal(pairs.targets, expected[[2, 0, 2]])
    assert pairs.classes.tolist() == [2, 0, 2]
    assert torch.equal(pairs.weights[0], pairs.weights[2])


def test_shrunk_pixels_are_set_above_one_half():
    """At a quarter of the size, four pixels around the centre of a block have equal weights."""
    masks = torch.zeros(1, *INPUT, dtype=torch.bool)
    for block, count in enumerate([1, 2, 3, 4]):
        for row, column in [(1, 1), (2, 2), (1, 2), (2, 1)][:count]:
            masks[0, row, 4 * block + column] = True
    boxes, classes, _ = objects(BOXES[:1])
    pairs = pair_masks(
        torch.randn(5, *SIZE),
        torch.randn(1, 5),
        torch.tensor([0]),
        boxes,
        classes,
        masks,
        max_masks=1,
    )
    assert pairs.targets[0].nonzero().tolist() == [[0, 2], [0, 3]]


def test_gradient_equals_that_of_cropped_probabilities():
    """The authors' form: crop, clamp, cross-entropy of probabilities."""
    logits = (torch.rand(3, SIZE[0] * SIZE[1]) * 20 - 10).requires_grad_()
    # One prototype per pixel lets the coefficients be the logits.
    prototypes = torch.eye(SIZE[0] * SIZE[1]).view(-1, *SIZE)
    pairs = pairs_of(prototypes=prototypes, coefficients=logits)
    # Far outside of its box an object's mask cannot be learned.
    pairs.targets[0, :, 12:] = True
    loss = mask_loss([pairs], normalizer=3)
    (found,) = torch.autograd.grad(loss, logits)

    probs = logits.view(-1, *SIZE).sigmoid() * ~pairs.outside
    targets = pairs.targets.float()
    costs = F.binary_cross_entropy(probs.clamp(0, 1), targets, reduction="none").sum(dim=(1, 2))
    reference = (costs * pairs.weights).sum() / 3
    (expected,) = torch.autograd.grad(reference, logits)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    unlearnable = (pairs.targets & pairs.outside).sum(dim=(1, 2))
    assert unlearnable[0] > 0
    constant = (100 * unlearnable * pairs.weights).sum() / 3
    torch.testing.assert_close(reference - constant, loss, rtol=1e-4, atol=0)


def test_saturated_masks_keep_their_gradient():
    coefficients = torch.full((1, 1), -200.0, requires_grad=True)
    pairs = pairs_of(BOXES[:1], prototypes=torch.ones(1, *SIZE), coefficients=coefficients)
    loss = mask_loss([pairs], normalizer=1)
    assert loss > 100
    loss.backward()
    assert coefficients.grad < 0


def test_limit_of_masks_is_exact_for_equal_terms():
    arguments = {"matched": [0] * 7, "coefficients": torch.zeros(7, 5)}
    full = pairs_of(BOXES[:1], **arguments)
    few = pairs_of(BOXES[:1], **arguments, max_masks=3)
    assert [len(p.logits) for p in (full, few)] == [7, 3]
    torch.testing.assert_close(few.weights, 7 / 3 * full.weights[:3])
    torch.testing.assert_close(mask_loss([few], normalizer=7), mask_loss([full], normalizer=7))


def test_limit_of_masks_is_unbiased():
    arguments = {
        "matched": [0, 1, 2, 0, 1, 2, 0, 1],
        "prototypes": torch.randn(5, *SIZE),
        "coefficients": torch.randn(8, 5),
    }
    expected = mask_loss([pairs_of(**arguments)], normalizer=8)
    samples = torch.stack(
        [mask_loss([pairs_of(**arguments, max_masks=3)], normalizer=8) for _ in range(300)]
    )
    assert samples.std() > 0.02
    standard_error = samples.std() / len(samples) ** 0.5
    assert (samples.mean() - expected).abs() < 3 * standard_error


def test_box_without_area_costs_nothing():
    boxes = [BOXES[0], (10, 10, 10, 30)]
    pairs = pairs_of(boxes)
    assert pairs.weights[1] == 0
    assert mask_loss([pairs], normalizer=1).isfinite()


def test_masks_are_resized_in_pieces(monkeypatch):
    whole = pairs_of()
    monkeypatch.setattr("instseg_ext.methods.yolact.losses._RESIZE_MB", 1e-9)
    assert torch.equal(pairs_of().targets, whole.targets)


def test_mask_loss_without_positives_is_zero_and_connected():
    prototypes = torch.randn(5, *SIZE, requires_grad=True)
    coefficients = torch.randn(9, 5, requires_grad=True)
    for boxes in (BOXES, []):
        pairs = pairs_of(boxes, matched=[], prototypes=prototypes, coefficients=coefficients[[]])
        loss = mask_loss([pairs], normalizer=1)
        assert loss == 0
        grads = torch.autograd.grad(loss, (prototypes, coefficients))
        assert not any(g.any() for g in grads)


# Semantic segmentation


@pytest.mark.parametrize("num_images", [1, 3])
def test_semantic_loss_of_zero_logits(num_images):
    _, classes, masks = objects(BOXES)
    loss = semantic_loss(
        torch.zeros(num_images, 80, 6, 8), [masks] * num_images, [classes] * num_images
    )
    torch.testing.assert_close(loss, torch.tensor(55.4518))


def test_semantic_targets_are_unions():
    """Large logits that agree with the union of each class cost nothing."""
    size = (6, 8)
    masks = rectangles([(0, 0, 32, 32), (16, 16, 64, 48), (0, 0, 64, 8)])
    small = F.interpolate(masks[None].float(), size, mode="bilinear")[0] > 0.5
    assert (small[0] & small[1]).any()
    union = torch.zeros(K, *size, dtype=torch.bool)
    union[2], union[0] = small[0] | small[1], small[2]
    logits = torch.where(union, 50.0, -50.0)[None]
    classes = torch.tensor([2, 2, 0])
    assert semantic_loss(logits, [masks], [classes]).abs() < 1e-12
    # What is given as no object, like a crowd, is background: its share of pixels costs 50.
    only_pixels = (small[1] & ~small[0]).sum() + small[2].sum()
    loss = semantic_loss(logits, [masks[:1]], [classes[:1]])
    torch.testing.assert_close(loss, 50 * only_pixels / 48)


def test_semantic_loss_averages_over_images():
    logits = torch.randn(2, K, 6, 8)
    _, classes, masks = objects(BOXES)
    first = semantic_loss(logits[:1], [masks], [classes])
    second = semantic_loss(logits[1:], [masks[:0]], [classes[:0]])
    both = semantic_loss(logits, [masks, masks[:0]], [classes, classes[:0]])
    torch.testing.assert_close(both, (first + second) / 2)


# Mask IoU


def test_iou_is_one_for_the_objects_own_mask():
    """The distance is then that between the prediction and 1."""
    net = TinyNet()
    pairs = pairs_of()
    pairs = pairs._replace(logits=torch.where(pairs.targets, 8.0, -8.0))
    loss = mask_iou_loss(net, [pairs], min_area=25, normalizer=3)
    predicted = net(net.seen[0]).gather(1, pairs.classes[:, None]).squeeze(1)
    expected = F.smooth_l1_loss(predicted, torch.ones(3), reduction="sum") / 3
    torch.testing.assert_close(loss, expected)


def test_iou_is_that_of_the_cropped_mask_and_the_whole_object():
    net = TinyNet()
    pairs = pairs_of(BOXES[:1])
    pairs = pairs._replace(logits=torch.full((1, *SIZE), 3.0))
    pairs.targets[0, 11, :] = True  # also outside the window
    window, target = ~pairs.outside[0], pairs.targets[0]
    iou = (window & target).sum() / (window | target).sum()
    loss = mask_iou_loss(net, [pairs], min_area=25, normalizer=1)
    masks = net.seen[0]
    assert torch.equal(masks[0, 0], torch.where(window, torch.tensor(3.0).sigmoid(), 0))
    predicted = net(masks)[0, pairs.classes[0]]
    torch.testing.assert_close(loss, F.smooth_l1_loss(predicted, iou))


@pytest.mark.parametrize(("pixels", "kept"), [(25, 0), (26, 1)])
def test_small_objects_are_left_out(pixels, kept):
    net = TinyNet()
    pairs = pairs_of(BOXES[:1])
    pairs.targets.zero_()
    pairs.targets.view(-1)[:pixels] = True
    mask_iou_loss(net, [pairs], min_area=25, normalizer=1)
    assert sum(len(masks) for masks in net.seen) == kept


def test_masks_of_several_images_are_scored_together():
    net = TinyNet()
    parts = [pairs_of(), pairs_of(BOXES[:2]), pairs_of([(0, 0, 4, 4)])]
    loss = mask_iou_loss(net, parts, min_area=25, normalizer=6)
    assert [len(masks) for masks in net.seen] == [5]
    alone = [mask_iou_loss(net, [p], min_area=25, normalizer=6) for p in parts]
    torch.testing.assert_close(loss, sum(alone))


def test_mask_iou_reaches_prototypes_and_coefficients():
    prototypes = torch.randn(5, *SIZE, requires_grad=True)
    coefficients = torch.randn(3, 5, requires_grad=True)
    pairs = pairs_of(prototypes=prototypes, coefficients=coefficients)
    mask_iou_loss(TinyNet(), [pairs], min_area=25, normalizer=3).backward()
    assert prototypes.grad.any()
    assert coefficients.grad.any()


def test_both_mask_losses_share_a_graph():
    """The second must find what the first left of the shared tensors."""
    prototypes = torch.randn(5, *SIZE)
    coefficients = torch.randn(3, 5, requires_grad=True)
    net = TinyNet()

    def losses():
        pairs = [pairs_of(prototypes=prototypes, coefficients=coefficients)]
        return (
            mask_loss(pairs, normalizer=3),
            mask_iou_loss(net, pairs, min_area=25, normalizer=3),
        )

    (together,) = torch.autograd.grad(sum(losses()), coefficients)
    alone = [torch.autograd.grad(losses()[i], coefficients)[0] for i in (0, 1)]
    torch.testing.assert_close(together, sum(alone))


@pytest.mark.parametrize("boxes", [[(0, 0, 8, 8)], []])
def test_mask_iou_with_nothing_left_is_zero_and_connected(boxes):
    net = TinyNet()
    loss = mask_iou_loss(net, [pairs_of(boxes)], min_area=25, normalizer=1)
    assert loss == 0
    loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in net.parameters())


# Precision


def test_half_precision_inputs_are_summed_in_float():
    logits, labels = ohem_case()
    deltas, targets = torch.randn(9, 4), torch.randn(9, 4)
    prototypes, coefficients = torch.randn(5, *SIZE), torch.randn(3, 5)
    semantic = torch.randn(1, K, 6, 8)
    _, classes, masks = objects(BOXES)
    net = TinyNet()

    def losses(cast):
        pairs = [pairs_of(prototypes=cast(prototypes), coefficients=cast(coefficients))]
        return [
            class_loss(cast(logits), labels, neg_pos_ratio=3, normalizer=2),
            box_loss(cast(deltas), targets, normalizer=2),
            mask_loss(pairs, normalizer=3),
            semantic_loss(cast(semantic), [masks], [classes]),
            mask_iou_loss(net, pairs, min_area=25, normalizer=3),
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses(torch.Tensor.bfloat16)
    assert all(loss.dtype == torch.float32 for loss in found)
    expected = losses(lambda tensor: tensor.bfloat16().float())
    torch.testing.assert_close(found[:4], expected[:4])
    # The network is the caller's: it runs in the precision around it.
    torch.testing.assert_close(found[4], expected[4], rtol=0.02, atol=0.02)
