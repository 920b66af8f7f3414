"""Where points are chosen, how often masks are refined, what labels are."""

from __future__ import annotations

import pytest
import torch
from detectron2.structures import BitMasks
from methods.pointrend.pointrend_heads import oracle, proposals

from instseg_ext.layers.point_sample import grid_points, sample_points
from instseg_ext.methods.pointrend.points import TrainPoints, class_channel, uncertain_cells
from instseg_ext.methods.pointrend.subdivision import Subdivision
from instseg_ext.methods.pointrend.targets import LOG_PERIOD, point_labels, point_loss
from instseg_ext.structures.matched_masks import MatchedBitMasks


@pytest.mark.parametrize(("ratio", "beta"), [(3, 0.75), (10, 1.0), (1, 0.0)])
def test_points_are_those_of_detectron2(ratio, beta):
    oracle()
    from detectron2.projects.point_rend.point_features import (
        get_uncertain_point_coords_with_randomness,
    )

    logits = torch.randn(4, 1, 7, 7)
    torch.manual_seed(1)
    points = TrainPoints(196, "importance", ratio, beta).draw(logits)
    torch.manual_seed(1)
    expected = get_uncertain_point_coords_with_randomness(
        logits, lambda x: -x.abs(), 196, ratio, beta
    )
    assert torch.equal(points, expected)


@pytest.mark.parametrize(("num", "drawn", "important"), [(196, 588, 147), (10, 30, 7)])
def test_the_most_uncertain_candidates_come_first(num, drawn, important):
    logits = torch.randn(2, 1, 7, 7)
    torch.manual_seed(3)
    points = TrainPoints(num).draw(logits)
    torch.manual_seed(3)
    candidates, others = torch.rand(2, drawn, 2), torch.rand(2, num - important, 2)
    assert torch.equal(points[:, important:], others)
    certainty = sample_points(logits, points)[:, 0, :important].abs()
    every = sample_points(logits, candidates)[:, 0].abs().sort(dim=1).values
    assert torch.allclose(certainty.sort(dim=1).values, every[:, :important])


def test_other_strategies():
    logits = torch.randn(2, 1, 7, 7)
    torch.manual_seed(3)
    uniform = TrainPoints(10, "uniform").draw(logits)
    torch.manual_seed(3)
    assert torch.equal(uniform, torch.rand(2, 10, 2))
    assert torch.equal(TrainPoints(9, "grid").draw(logits), grid_points(3).expand(2, -1, -1))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ((0,), "TRAIN_NUM_POINTS"),
        ((4, "random"), "TRAIN_SAMPLING"),
        ((5, "grid"), "TRAIN_SAMPLING grid"),
        ((4, "importance", 0.5), "OVERSAMPLE_RATIO"),
        ((4, "importance", 3, 1.5), "IMPORTANCE_SAMPLE_RATIO"),
    ],
)
def test_strategies_that_do_not_exist(values, key):
    with pytest.raises(ValueError, match=rf"MODEL\.POINT_HEAD\.{key}"):
        TrainPoints(*values)


def test_uncertain_cells():
    logits = -torch.tensor([[0.0, 5.0, 1.0, 2.0, 9.0, 3.0]]) + 10
    cells, points = uncertain_cells(logits, (2, 3), 3)
    cells, order = cells.sort(dim=1)
    assert cells.tolist() == [[1, 4, 5]]
    expected = torch.tensor([[0.5, 0.25], [0.5, 0.75], [5 / 6, 0.75]])
    assert torch.allclose(points[0, order[0]], expected)


def test_more_cells_than_there_are():
    cells, _ = uncertain_cells(torch.randn(2, 6), (2, 3), 100)
    assert torch.equal(cells.sort(dim=1).values, torch.arange(6).expand(2, -1))


def test_class_channel():
    maps = torch.randn(3, 4, 2, 2)
    classes = torch.tensor([3, 0, 1])
    assert torch.equal(class_channel(maps, classes), maps[[0, 1, 2], [3, 0, 1]][:, None])
    assert torch.equal(class_channel(maps[:, :1], classes), maps[:, :1])


@pytest.mark.parametrize(
    ("steps", "num_points", "side", "left", "final"),
    [
        (5, 784, 28, 3, 224),
        (3, 784, 28, 1, 56),
        (2, 784, 28, 0, 28),
        (5, 196, 14, 4, 224),
        (5, 195, 7, 5, 224),
        # detectron2's project fails on these
        (1, 784, 14, 0, 14),
        (5, 200704, 224, 0, 224),
    ],
)
def test_first_side(steps, num_points, side, left, final):
    plan = Subdivision.plan(7, steps, num_points)
    assert (plan.side, plan.steps, plan.final_side) == (side, left, final)
    masks = plan.render(lambda points: points[..., 0], torch.zeros(1, 4))
    assert masks.shape == (1, 1, final, final)


@pytest.mark.parametrize(("steps", "num_points"), [(-1, 784), (5, 0)])
def test_subdivisions_that_do_not_exist(steps, num_points):
    with pytest.raises(ValueError, match=r"MODEL\.POINT_HEAD\.SUBDIVISION_STEPS"):
        Subdivision.plan(7, steps, num_points)


def test_no_point_is_predicted_twice():
    asked = []

    def predict(points):
        asked.append(points)
        return points[..., 0] - 0.5

    Subdivision.plan(7, 5, 784).render(predict, torch.zeros(2, 4))
    assert [points.shape for points in asked] == [(2, 784, 2)] * 4
    for region in torch.cat(asked, dim=1):
        assert len(region.unique(dim=0)) == len(region)


def test_labels_equal_detectron2s():
    oracle()
    from detectron2.projects.point_rend.point_features import (
        get_point_coords_wrt_image,
        sample_point_labels,
    )

    data = proposals((3, 0, 4))
    points = torch.rand(7, 50, 2)
    boxes = torch.cat([x.proposal_boxes.tensor for x in data])
    expected = sample_point_labels(data, get_point_coords_wrt_image(boxes, points))
    assert 0 < expected.mean() < 1
    assert torch.allclose(point_labels(data, points), expected, atol=1e-5)


def test_shared_masks_give_the_targets_of_bit_masks():
    masks = BitMasks(torch.rand(3, 40, 50) > 0.5)
    index = torch.tensor([2, 0, 0, 1])
    boxes = torch.tensor([[3.0, 4.0, 30.5, 33.0]]).repeat(4, 1) + torch.rand(4, 4)
    shared = MatchedBitMasks(masks)[index]
    assert torch.equal(shared.crop_and_resize(boxes, 7), masks[index].crop_and_resize(boxes, 7))


def test_loss_logs_accuracy(event_storage):
    logits = torch.tensor([[3.0, -2.0], [1.0, -1.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.4], [0.2, 0.0]])
    loss = point_loss(logits, labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert torch.equal(loss, expected)
    # reading the value waits for the device, so it is not done in every iteration
    assert "point/accuracy" not in event_storage.latest()
    event_storage.iter = LOG_PERIOD - 1
    point_loss(logits, labels)
    assert event_storage.latest()["point/accuracy"][0] == pytest.approx(0.75)


def test_loss_without_regions():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = point_loss(logits, torch.zeros(0, 5))
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == (0, 5)
