"""Integral loss and averaged classifiers (acceptance checks 7, 8 and 10)."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.structures import Boxes, Instances
from methods.multipathnet.multipathnet_toys import features_of, heads_of

from instseg_ext.methods.multipathnet.predictor import IntegralPredictor, integral_loss
from instseg_ext.methods.multipathnet.towers import RegionFeatures

TRANSFORM = Box2BoxTransform((10.0, 10.0, 5.0, 5.0))
PLAIN = [
    "MODEL.MULTIPATH.IN_FEATURES", ["p4"],
    "MODEL.MULTIPATH.SCALES", [1.0],
    "MODEL.MULTIPATH.MAPS", [1],
    "MODEL.MULTIPATH.HET", False,
    "MODEL.MULTIPATH.SHARE_TOWERS", False,
    "MODEL.MULTIPATH.SKIP_NORM", "none",
    "MODEL.MULTIPATH.MIX_DIM", 0,
    "MODEL.MULTIPATH.IOU_THRESHOLDS", [0.5],
    "MODEL.ROI_HEADS.NUM_CLASSES", 3,
]  # fmt: skip


def predictor_of(thresholds=(0.5, 0.6), num_classes=1, dim=4):
    torch.manual_seed(0)
    return IntegralPredictor(
        ShapeSpec(channels=dim),
        box_dim=dim,
        thresholds=list(thresholds),
        box2box_transform=TRANSFORM,
        num_classes=num_classes,
        smooth_l1_beta=1.0,
    )


def sampled(num_classes=3):
    """Regions as both kinds of heads take them."""
    boxes = torch.tensor([[8.0, 8, 40, 40], [0, 0, 20, 60], [30, 30, 60, 62], [1, 1, 9, 9]])
    gt_boxes = boxes + torch.tensor([2.0, -1, 3, 1])
    classes = torch.tensor([0, 2, 1, num_classes])
    iou = torch.tensor([0.9, 0.7, 0.5, 0.2])
    return Instances(
        (64, 64),
        proposal_boxes=Boxes(boxes),
        gt_boxes=Boxes(gt_boxes),
        gt_classes=classes,
        gt_iou=iou,
    )


def test_acceptance_check_7_one_of_each_is_fast_rcnn():
    """One crop, one map, one threshold: losses of detectron2's heads with the same weights."""
    ours = heads_of(*PLAIN)
    assert ours.box_predictor.cls_score[0].out_features == 4
    head = FastRCNNConvFCHead(ShapeSpec(8, 7, 7), conv_dims=[], fc_dims=[32, 32])
    theirs = StandardROIHeads(
        box_in_features=["p4"],
        box_pooler=ROIPooler(7, (1 / 16,), 2, "ROIAlignV2"),
        box_head=head,
        box_predictor=FastRCNNOutputLayers(
            head.output_shape, box2box_transform=TRANSFORM, num_classes=3, smooth_l1_beta=1.0
        ),
        num_classes=3,
        batch_size_per_image=8,
        positive_fraction=0.5,
        proposal_matcher=Matcher([0.5], [0, 1]),
    )
    (tower,), mine, other = ours.box_head.towers, ours.box_predictor, theirs.box_predictor
    head.fc1.load_state_dict(tower.fc6.state_dict())
    head.fc2.load_state_dict(tower.fc7.state_dict())
    other.cls_score.load_state_dict(mine.cls_score[0].state_dict())
    other.bbox_pred.load_state_dict(mine.bbox_pred.state_dict())
    features = features_of(size=(64, 64))
    found = ours.train()._forward_box(features, [sampled()])
    expected = theirs.train()._forward_box(features, [sampled()])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_acceptance_check_8_probabilities_are_averaged():
    logits = torch.tensor([[[math.log(3), 0], [0, 0]]])
    probs = predictor_of().mean_probs(logits)
    torch.testing.assert_close(probs, torch.tensor([[0.625, 0.375]]))


def test_classifiers_start_from_the_same_weights():
    first, second = predictor_of().cls_score
    assert torch.equal(first.weight, second.weight)
    assert first.weight is not second.weight


@pytest.mark.parametrize("turn", [0, 1])
def test_acceptance_check_10_only_the_classifier_of_the_turn_changes(turn):
    predictor = predictor_of(num_classes=3)
    optimizer = torch.optim.SGD(predictor.parameters(), lr=0.1, momentum=0.9)
    before = [layer.weight.clone() for layer in predictor.cls_score]
    x = torch.randn(4, 4)
    losses = predictor.losses(predictor(RegionFeatures(x, x)), [sampled()], turn)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in predictor.parameters())
    optimizer.step()
    same = [
        torch.equal(a, layer.weight) for a, layer in zip(before, predictor.cls_score, strict=True)
    ]
    assert same == [turn != 0, turn != 1]


def test_turns_follow_the_iterations(event_storage):
    heads = heads_of("MODEL.MULTIPATH.INTEGRAL_MODE", "alternate")
    turns = []
    for iteration in range(7):
        event_storage.iter = iteration
        turns.append(heads._turn())
    assert turns == [0, 1, 2, 3, 4, 5, 0]
    assert heads_of()._turn() == -1


def test_integral_loss_is_the_mean_of_the_classifiers_losses():
    logits, labels = torch.randn(5, 3, 4), torch.randint(4, (5, 3))
    each = [torch.nn.functional.cross_entropy(logits[:, u], labels[:, u]) for u in range(3)]
    torch.testing.assert_close(integral_loss(logits, labels), torch.stack(each).mean())
    torch.testing.assert_close(integral_loss(logits, labels, 1), each[1])


def test_no_region_at_all():
    predictor = predictor_of()
    x = torch.zeros(0, 4)
    losses = predictor.losses(predictor(RegionFeatures(x, x)), [])
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in predictor.parameters())


def test_acceptance_check_12_deltas_there_and_back():
    transform = heads_of().box_predictor.box2box_transform
    boxes, objects = sampled().proposal_boxes.tensor, sampled().gt_boxes.tensor
    back = transform.apply_deltas(transform.get_deltas(boxes, objects), boxes)
    torch.testing.assert_close(back, objects, atol=1e-4, rtol=0)
