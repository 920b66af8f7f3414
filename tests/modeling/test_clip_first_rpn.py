"""The RPN that clips and filters before it ranks, against plain loops and against detectron2's."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from torch.utils._python_dispatch import TorchDispatchMode

from instseg_ext.layers.gradient_limit import GradientLimit
from instseg_ext.modeling.clip_first_rpn import (
    AnchorOverride,
    ClipFirstRPN,
    RPNState,
    clip_boxes,
    inside_image,
)

LIMIT = 1 / 512
SIZES = [(64, 96), (50, 90)]


def config(**keys):
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32], [48, 64]]
    cfg.MODEL.RPN.IN_FEATURES = ["p8", "p16"]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 60
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 40
    cfg.MODEL.RPN.BOUNDARY_THRESH = 0
    for key, value in keys.items():
        cfg.MODEL.RPN[key] = value
    sizes = dict(zip(("p8", "p16"), cfg.MODEL.ANCHOR_GENERATOR.SIZES, strict=True))
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [sizes[name] for name in cfg.MODEL.RPN.IN_FEATURES]
    return cfg


def build(cls=ClipFirstRPN, std=0.3, options=None, **keys):
    """Two levels, strides 8 and 16, 4 channels."""
    torch.manual_seed(0)
    cfg = config(**keys)
    shapes = {"p8": ShapeSpec(channels=4, stride=8), "p16": ShapeSpec(channels=4, stride=16)}
    rpn = cls(**{**cls.from_config(cfg, shapes), **(options or {})})
    for weight in rpn.parameters():
        torch.nn.init.normal_(weight, std=std)
    # No cell is dead: those would all have one score.
    torch.nn.init.constant_(rpn.rpn_head.conv.bias, 3.0)
    return rpn


def batch(images=2):
    generator = torch.Generator().manual_seed(1)
    features = {
        name: torch.randn((images, 4, 64 // stride, 96 // stride), generator=generator)
        for name, stride in (("p8", 8), ("p16", 16))
    }
    return ImageList(torch.zeros(images, 3, 64, 96), SIZES[:images]), features


def objects(size, *boxes):
    target = Instances(size)
    target.gt_boxes = Boxes(torch.tensor(boxes).float().reshape(-1, 4))
    target.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return target


def some_objects():
    return [objects(SIZES[0], [8, 8, 40, 40], [50, 20, 90, 60]), objects(SIZES[1], [5, 5, 60, 45])]


def plain_proposals(rpn, state, n, min_side):
    """One box after the other; each level for itself, then the best of all."""
    size, kept, start = state.image_sizes[n], [], 0
    for anchors, logits, deltas in zip(state.anchors, state.logits, state.deltas, strict=True):
        boxes = rpn.box2box_transform.apply_deltas(deltas[n], anchors.tensor)
        found = []
        for i, box in enumerate(boxes):
            x1, x2 = (min(max(float(x), 0.0), size[1]) for x in box[0::2])
            y1, y2 = (min(max(float(y), 0.0), size[0]) for y in box[1::2])
            if min(x2 - x1, y2 - y1) >= min_side and x2 > x1 and y2 > y1:
                found.append((float(logits[n, i]), start + i, [x1, y1, x2, y2]))
        level = []
        for score, i, box in sorted(found, reverse=True)[: rpn.pre_nms_topk[rpn.training]]:
            others = Boxes(torch.tensor([other[2] for other in level]).reshape(-1, 4))
            if not (pairwise_iou(Boxes(torch.tensor([box])), others) > rpn.nms_thresh).any():
                level.append((score, i, box))
        kept += level
        start += len(boxes)
    return sorted(kept, reverse=True)[: rpn.post_nms_topk[rpn.training]]


@pytest.mark.parametrize("min_side", [0.0, 20.0])
@torch.no_grad()
def test_proposals_equal_plain_loops(min_side):
    rpn = build(options={"min_box_size": min_side})
    proposals, state = rpn.propose(*batch())
    for n, found in enumerate(proposals):
        expected = plain_proposals(rpn, state, n, min_side)
        assert found.anchor_index.tolist() == [i for _, i, _ in expected]
        boxes = torch.tensor([box for _, _, box in expected])
        torch.testing.assert_close(found.proposal_boxes.tensor, boxes, rtol=0, atol=1e-4)
        scores = torch.tensor([score for score, _, _ in expected])
        torch.testing.assert_close(found.objectness_logits, scores)
        assert found.image_size == SIZES[n]


@torch.no_grad()
def test_boxes_outside_the_image_take_no_place_of_others():
    """With one box before NMS, detectron2's order is left with none when that one is outside."""
    keys = {"PRE_NMS_TOPK_TEST": 1, "IN_FEATURES": ["p16"]}
    images, features = batch(1)
    found = []
    for rpn in (build(RPN, **keys).eval(), build(**keys).eval()):
        anchors = rpn.anchor_generator([features["p16"]])
        logits = torch.zeros(1, len(anchors[0]))
        logits[0, 0], logits[0, 30] = 9.0, 5.0
        deltas = torch.zeros(1, len(anchors[0]), 4)
        deltas[0, 0, 0] = -50.0  # far to the left
        rpn.rpn_head = fixed_head(rpn, logits, deltas, features["p16"].shape)
        found.append(rpn(images, features)[0][0])
    assert [len(x) for x in found] == [0, 1]
    assert found[1].objectness_logits.tolist() == [5.0]
    assert found[1].anchor_index.tolist() == [30]


def fixed_head(rpn, logits, deltas, shape):
    """A head that returns the same (1, A) and (1, A, 4) whatever the features are."""
    height, width = shape[-2:]
    count = rpn.anchor_generator.num_anchors[0]
    grid = logits.view(1, height, width, count).permute(0, 3, 1, 2)
    shifts = deltas.view(1, height, width, count * 4).permute(0, 3, 1, 2)

    class Fixed(torch.nn.Module):
        def forward(self, features):
            return [grid], [shifts]

    return Fixed()


def test_equals_detectron2_where_the_order_does_not_matter(event_storage):
    """All boxes are ranked, all anchors may be used, and the divisor is the constant."""
    keys = {"PRE_NMS_TOPK_TRAIN": 10_000, "BOUNDARY_THRESH": -1}
    images, features = batch()
    results = []
    for cls in (RPN, ClipFirstRPN):
        rpn = build(cls, std=0.05, **keys)
        torch.manual_seed(3)
        results.append(rpn(images, features, some_objects()))
    (theirs, their_losses), (ours, our_losses) = results
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
        assert torch.equal(a.objectness_logits, b.objectness_logits)
    for name, value in their_losses.items():
        torch.testing.assert_close(our_losses[name], value)


@torch.no_grad()
def test_shortest_sides_of_each_image():
    images, features = batch()
    rpn = build()
    images.min_sides = [30.0, 45.0]
    for found, side in zip(rpn.propose(images, features)[0], images.min_sides, strict=True):
        boxes = found.proposal_boxes.tensor
        assert len(found)
        assert (boxes[:, 2:] - boxes[:, :2]).min() >= side


@torch.no_grad()
def test_a_side_of_just_the_limit_is_long_enough():
    rpn = build(options={"min_box_size": 32.0, "nms_thresh": 1.0})
    rpn.rpn_head = torch.nn.Module()
    rpn.rpn_head.forward = lambda maps: (
        [torch.zeros(len(m), 6, *m.shape[-2:]) for m in maps],
        [torch.zeros(len(m), 24, *m.shape[-2:]) for m in maps],
    )
    sides = rpn.propose(*batch(1))[0][0].proposal_boxes.tensor
    shortest = (sides[:, 2:] - sides[:, :2]).amin(dim=1)
    assert shortest.min() == 32


@torch.no_grad()
def test_cells_that_are_partly_outside_propose_nothing():
    images, features = batch()
    images.image_sizes[:] = [(64, 96), (50, 90)]
    keys = {"PRE_NMS_TOPK_TRAIN": 10_000, "POST_NMS_TOPK_TRAIN": 10_000, "NMS_THRESH": 1.0}
    every, state = build(**keys).propose(images, features)
    found, _ = build(options={"whole_cells": True}, **keys).propose(images, features)
    assert torch.equal(every[0].anchor_index, found[0].anchor_index)
    rows, columns = 50 // 8, 90 // 8
    cells = found[1].anchor_index[found[1].anchor_index < len(state.anchors[0])] // 6
    assert (cells // 12 < rows).all()
    assert (cells % 12 < columns).all()
    assert len(found[1]) < len(every[1])


@torch.no_grad()
def test_an_extra_pixel():
    keys = {"NMS_THRESH": 1.0, "POST_NMS_TOPK_TRAIN": 10_000, "PRE_NMS_TOPK_TRAIN": 10_000}
    rpn = build(options={"extra_pixel": True}, **keys)
    proposals, state = rpn.propose(*batch(1))
    anchors = Boxes.cat(state.anchors).tensor[proposals[0].anchor_index]
    deltas = torch.cat(state.deltas, dim=1)[0, proposals[0].anchor_index]
    plain = Box2BoxTransform((1.0,) * 4).apply_deltas(deltas, anchors)
    expected = clip_boxes(plain + torch.tensor([0.0, 0, 1, 1]), SIZES[0])
    assert torch.equal(proposals[0].proposal_boxes.tensor, expected)


def test_gradients_of_boxes_are_bounded_and_stop_at_the_border(event_storage):
    """Check 10: the bound holds for the path through the boxes, not for the regression loss."""
    rpn = build(std=0.2)
    images, features = batch()
    proposals, state = rpn.propose(images, features, GradientLimit(LIMIT))
    for level in state.deltas:
        level.retain_grad()
    weight = torch.randn(4, generator=torch.Generator().manual_seed(0))
    through_boxes = sum((p.proposal_boxes.tensor * weight).sum() for p in proposals)
    grads = torch.autograd.grad(through_boxes, state.deltas, retain_graph=True)
    gradient = torch.cat(grads, dim=1)
    anchors = Boxes.cat(state.anchors).tensor
    passed = 0
    for n, found in enumerate(proposals):
        index = found.anchor_index
        decoded = rpn.box2box_transform.apply_deltas(
            torch.cat(state.deltas, dim=1)[n].detach(), anchors
        )
        inside = inside_image(anchors, SIZES[n]) & inside_image(decoded, SIZES[n])
        rows = torch.zeros(len(anchors), dtype=torch.bool)
        rows[index] = inside[index]
        assert not gradient[n, ~rows].any()
        assert gradient[n, rows].abs().amax(dim=1).gt(0).all()
        passed += int(rows.sum())
        assert int(rows.sum()) < len(index)
    assert passed
    assert gradient.abs().max() == torch.tensor(LIMIT)
    loss = 10 * rpn.losses(state, some_objects())["loss_rpn_loc"]
    alone = torch.autograd.grad(loss, state.deltas, retain_graph=True)
    both = torch.autograd.grad(loss + through_boxes, state.deltas)
    assert max(g.abs().max() for g in alone) > LIMIT
    for a, b, through in zip(alone, both, grads, strict=True):
        torch.testing.assert_close(b, a + through)


def test_boxes_have_no_gradient_unless_asked_for():
    rpn = build()
    images, features = batch()
    proposals, _ = rpn.propose(images, features)
    assert not any(p.proposal_boxes.tensor.requires_grad for p in proposals)
    live, _ = rpn.propose(images, features, GradientLimit(LIMIT))
    for a, b in zip(proposals, live, strict=True):
        assert b.proposal_boxes.tensor.requires_grad
        torch.testing.assert_close(a.proposal_boxes.tensor, b.proposal_boxes.tensor)


def labels_of(rpn, state, targets, overrides=None):
    """Return the labels (N, A) that the losses are made from."""
    seen = []
    rpn._image_losses = lambda anchors, logits, deltas, labels, boxes: (
        seen.append((labels.clone(), boxes)) or logits.sum(),
        deltas.sum(),
    )
    rpn.losses(state, targets, overrides)
    del rpn._image_losses
    return seen


def test_anchors_take_the_labels_of_the_sample(event_storage):
    rpn = build(BATCH_SIZE_PER_IMAGE=8)
    images, features = batch(1)
    _, state = rpn.propose(images, features)
    anchors, targets = Boxes.cat(state.anchors).tensor, some_objects()[:1]
    inside = inside_image(anchors, SIZES[0]).nonzero()[:, 0]
    outside = (~inside_image(anchors, SIZES[0])).nonzero()[:, 0]
    torch.manual_seed(5)
    ((plain, _),) = labels_of(rpn, state, targets)
    override = AnchorOverride(
        background=torch.cat([inside[:20], outside[:5]]),
        foreground=torch.cat([inside[15:25], outside[5:9]]),
    )
    torch.manual_seed(5)
    ((labels, boxes),) = labels_of(rpn, state, targets, [override])
    assert int((plain >= 0).sum()) == 8
    assert (plain[outside] == -1).all()
    expected = plain.clone()
    expected[inside[:15]], expected[inside[15:25]] = 0, 1  # foreground counts where both are
    assert torch.equal(labels, expected)
    best = pairwise_iou(targets[0].gt_boxes, Boxes(anchors[inside[15:25]])).argmax(dim=0)
    assert torch.equal(boxes[inside[15:25]], targets[0].gt_boxes.tensor[best])


def test_the_best_anchor_of_an_object_is_one_inside_the_image(event_storage):
    rpn = build(IN_FEATURES=["p16"])
    images, features = batch(1)
    _, state = rpn.propose(images, features)
    beyond, inside, far = [0, -4, 20, 20], [0, 0, 16, 12], [70, 40, 96, 64]
    anchors = [Boxes(torch.tensor([beyond, inside, far]).float())]
    state = RPNState(anchors, state.logits, state.deltas, state.image_sizes)
    ((labels, boxes),) = labels_of(rpn, state, [objects(SIZES[0], [0, 0, 20, 20])])
    assert labels.tolist() == [-1, 1, 0]
    assert boxes[1].tolist() == [0, 0, 20, 20]


def test_an_object_that_no_anchor_overlaps_makes_none_positive(event_storage):
    rpn = build(IN_FEATURES=["p16"])
    _, state = rpn.propose(*batch(1))
    anchors = [Boxes(torch.tensor([[0.0, 0, 16, 16], [20, 20, 50, 50]]))]
    state = RPNState(anchors, state.logits, state.deltas, state.image_sizes)
    ((labels, _),) = labels_of(rpn, state, [objects(SIZES[0], [60, 30, 90, 60])])
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("normalizer", ["constant", "labelled", "mixed"])
def test_losses_by_hand(event_storage, normalizer):
    rpn = build(
        options={"normalizer": normalizer}, SMOOTH_L1_BETA=1 / 9, BATCH_SIZE_PER_IMAGE=10_000
    )
    images, features = batch()
    _, state = rpn.propose(images, features)
    targets = some_objects()
    anchors = Boxes.cat(state.anchors).tensor
    logits, deltas = torch.cat(state.logits, dim=1), torch.cat(state.deltas, dim=1)
    cls, loc = [], []
    for n, (labels, boxes) in enumerate(labels_of(rpn, state, targets)):
        number = int((labels >= 0).sum())
        of_cls = 10_000 if normalizer == "constant" else number
        of_loc = number if normalizer == "labelled" else 10_000
        entropy = torch.nn.functional.softplus(torch.where(labels == 1, -logits[n], logits[n]))
        cls.append(entropy[labels >= 0].sum() / of_cls)
        goal = rpn.box2box_transform.get_deltas(anchors[labels == 1], boxes[labels == 1])
        error = (deltas[n, labels == 1] - goal).abs()
        loc.append(torch.where(error < 1 / 9, 4.5 * error**2, error - 1 / 18).sum() / of_loc)
    losses = rpn.losses(state, targets)
    torch.testing.assert_close(losses["loss_rpn_cls"], torch.stack(cls).mean())
    torch.testing.assert_close(losses["loss_rpn_loc"], torch.stack(loc).mean())
    assert (labels == 1).any()


class Waits(TorchDispatchMode):
    """Counts the numbers that are asked for one by one, for each of which a GPU has to be ready."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_losses_of_an_image_wait_for_no_count(event_storage):
    rpn = build()
    images, features = batch(1)
    _, state = rpn.propose(images, features)
    anchors = Boxes.cat(state.anchors)
    labels, objects = rpn._label_anchors(anchors, some_objects()[0])
    logits, deltas = torch.cat(state.logits, dim=1)[0], torch.cat(state.deltas, dim=1)[0]
    with Waits() as waits:
        losses = rpn._image_losses(anchors.tensor, logits, deltas, labels, objects)
    assert waits.number == 1  # detectron2 makes sure that anchors have a width
    assert min(losses) > 0


def test_labelled_anchors_are_counted(event_storage):
    rpn = build(BATCH_SIZE_PER_IMAGE=8)
    images, features = batch()
    _, state = rpn.propose(images, features)
    found = torch.stack([labels for labels, _ in labels_of(rpn, state, some_objects())])
    shown = event_storage.latest()
    assert shown["rpn/num_pos_anchors"][0] == int((found == 1).sum()) / 2 > 0
    assert shown["rpn/num_neg_anchors"][0] == int((found == 0).sum()) / 2 > 0


def test_a_batch_is_the_mean_of_its_images(event_storage):
    rpn = build(options={"normalizer": "labelled"}, BATCH_SIZE_PER_IMAGE=10_000)
    images, features = batch()
    targets = some_objects()
    both = rpn(images, features, targets)[1]
    single = [
        rpn(
            ImageList(images.tensor[n : n + 1], SIZES[n : n + 1]),
            {name: x[n : n + 1] for name, x in features.items()},
            targets[n : n + 1],
        )[1]
        for n in range(2)
    ]
    for name, value in both.items():
        torch.testing.assert_close(value, (single[0][name] + single[1][name]) / 2)


@pytest.mark.parametrize("normalizer", ["constant", "labelled", "mixed"])
@pytest.mark.parametrize("size", [(64, 96), (10, 12)], ids=["image", "no anchor inside"])
def test_without_objects_losses_are_finite_and_reach_everything(event_storage, normalizer, size):
    rpn = build(options={"normalizer": normalizer})
    images, features = batch(1)
    images.image_sizes[:] = [size]
    _, losses = rpn(images, features, [objects(size)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(weight.grad is not None for weight in rpn.parameters())
    assert losses["loss_rpn_loc"] == 0
    assert (losses["loss_rpn_cls"] > 0) == (size == (64, 96))


def test_predictions_that_are_not_finite():
    rpn = build()
    images, features = batch()
    features["p8"][1, 0, 0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="diverged"):
        rpn.propose(images, features)
    rpn.eval()
    proposals, losses = rpn(images, features)
    assert losses == {}
    assert len(proposals[1])
    for found in proposals:
        assert found.proposal_boxes.tensor.isfinite().all()
        assert found.objectness_logits.isfinite().all()


def test_unknown_normaliser():
    with pytest.raises(ValueError, match="normalizer"):
        build(options={"normalizer": "all"})


def test_inside_and_clip():
    boxes = torch.tensor([[0.0, 0, 12, 10], [-0.5, 0, 3, 3], [1, 1, 12.5, 3], [5, 5, 2, 99]])
    assert inside_image(boxes, (10, 12)).tolist() == [True, False, False, False]
    assert inside_image(boxes, (10, 12), 0.5).tolist() == [True, True, True, False]
    assert clip_boxes(boxes, (10, 12)).tolist() == [
        [0, 0, 12, 10], [0, 0, 3, 3], [1, 1, 12, 3], [5, 5, 2, 10]
    ]  # fmt: skip
