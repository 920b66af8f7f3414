"""Ground truth in cells, and the cells that are drawn of it."""

import pytest
import torch
from methods.metric_learning.metric_toys import boxes, instances

from instseg_ext.methods.metric_learning.labels import cell_labels, draw_cells


def test_half_a_cell_is_enough():
    gt = instances(boxes((8, 16), (0, 0, 6, 4), (8, 0, 15, 3)))
    labels = cell_labels(gt, 4, (2, 4))
    # 4 x 4 whole, half of the next; 4 x 3 and 3 x 3 of 16 pixels.
    assert labels.tolist() == [[0, 0, 1, 1], [2, 2, 2, 2]]


def test_the_smallest_object_wins():
    gt = instances(boxes((8, 8), (0, 0, 8, 8), (2, 0, 4, 4), (0, 0, 4, 4)))
    assert cell_labels(gt, 4, (2, 2)).tolist() == [[1, 0], [0, 0]]
    assert cell_labels(gt[[2, 0, 1]], 4, (2, 2)).tolist() == [[2, 1], [1, 1]]


def test_cells_that_several_share_belong_to_nobody():
    gt = instances(boxes((4, 8), (0, 0, 1, 4), (1, 0, 2, 4), (4, 0, 5, 4)))
    assert cell_labels(gt, 4, (1, 2)).tolist() == [[-1, 3]]


def test_crowds_are_no_objects():
    gt = instances(boxes((4, 12), (0, 0, 12, 4), (0, 0, 4, 4)), crowd=[True, False])
    assert cell_labels(gt, 4, (1, 3)).tolist() == [[1, -1, -1]]


def test_padding_belongs_to_nobody_and_a_cut_cell_counts_inside():
    gt = instances(boxes((5, 6), (4, 0, 5, 5)))
    assert cell_labels(gt, 4, (3, 3)).tolist() == [[1, 0, -1], [1, 0, -1], [-1, -1, -1]]


def test_no_objects():
    labels = cell_labels(instances(torch.zeros(0, 8, 8)), 4, (2, 3))
    assert labels.tolist() == [[0, 0, -1], [0, 0, -1]]
    sample = draw_cells(labels, 0, 3, 5)
    assert sample.owners.tolist() == [0] * 5
    assert set(sample.cells.tolist()) == {0, 1, 3, 4}


def test_many_masks_at_a_time_change_nothing(monkeypatch):
    gt = instances(torch.rand(7, 30, 41) > 0.4)
    expected = cell_labels(gt, 8, (4, 6))
    monkeypatch.setattr("instseg_ext.methods.metric_learning.labels._BUDGET_MB", 1e-9)
    assert torch.equal(cell_labels(gt, 8, (4, 6)), expected)


@pytest.mark.parametrize("background", [4, 9])
def test_acceptance_check_12_cells_are_drawn_from_their_object(background):
    """The same number of each object, never one of nobody, each once while there are enough."""
    torch.manual_seed(0)
    labels = torch.randint(-1, 4, (13, 11))
    labels[labels == 2] = 1
    labels[3, 4] = 2
    sample = draw_cells(labels, 3, 4, background)
    assert sample.owners.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * background
    assert torch.equal(labels.flatten()[sample.cells], sample.owners)
    assert sample.valid.all()
    assert sample.sizes.tolist() == [(labels == i).sum().item() for i in range(4)]
    for owner, count in ((0, 4), (1, 4), (2, 1), (3, background)):
        assert len(set(sample.cells[sample.owners == owner].tolist())) == count


def test_an_object_without_a_cell_is_marked():
    sample = draw_cells(torch.tensor([[0, 0, 2], [2, 2, 2]]), 2, 3, 3)
    assert sample.sizes.tolist() == [2, 0, 4]
    assert sample.valid.tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert (sample.cells < 6).all()


def test_every_cell_is_equally_likely():
    labels, counts = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(6)
    for _ in range(600):
        counts[draw_cells(labels, 1, 2, 1).cells[:2]] += 1
    assert (counts - 200).abs().max() < 60


def test_few_cells_are_repeated_evenly():
    labels = torch.tensor([[0, 0, 0, 1]])
    cells = draw_cells(labels, 1, 8, 1).cells[:8]
    assert sorted(cells.bincount().tolist()) == [2, 3, 3]
