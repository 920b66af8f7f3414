"""The classes that masks of cells have."""

import pytest
import torch
from methods.metric_learning.metric_toys import every_cell, planted

from instseg_ext.methods.metric_learning.similarity import radii
from instseg_ext.methods.metric_learning.targets import class_targets

TAUS = (0.25, 0.5, 0.75, 0.9)


def targets_of(points, labels, classes, num_classes=5):
    sample = every_cell(labels, len(classes))
    found = class_targets(
        points,
        labels.flatten(),
        sample,
        torch.tensor(classes, dtype=torch.int64),
        radii=radii(TAUS),
        min_iou=0.5,
        num_classes=num_classes,
    )
    return found, sample


def loop(points, labels, sample, classes, num_classes=5):
    """The definition, mask by mask."""
    labels, rows = labels.flatten(), []
    for cell, owner in zip(sample.cells, sample.owners, strict=True):
        row = []
        for limit in radii(TAUS):
            mask = (points[cell] - points).square().sum(dim=1) <= limit
            mask &= labels >= 0
            ious = [
                (mask & (labels == i)).sum() / (mask | (labels == i)).sum()
                for i in range(len(classes))
            ]
            best = max(ious, default=0)
            fits = owner < len(classes) and best >= 0.5
            row.append(classes[ious.index(best)] if fits else num_classes)
        rows.append(row)
    return torch.tensor(rows)


def test_acceptance_check_9_perfect_embeddings():
    labels = torch.randint(0, 4, (8, 9))
    found, sample = targets_of(planted(labels, 3), labels, [4, 0, 2])
    expected = torch.tensor([4, 0, 2, 5])[sample.owners]
    assert torch.equal(found, expected[:, None].expand(-1, 4))


def test_acceptance_check_9_two_objects_of_one_vector():
    """100 and 300 cells: the mask overlaps them by 0.25 and 0.75."""
    labels = torch.tensor([0] * 100 + [1] * 300 + [2] * 50)
    points = torch.zeros(450, 2)
    points[400:] = 10
    found, sample = targets_of(points, labels, [3, 1])
    assert (found[sample.owners < 2] == 1).all()
    assert (found[sample.owners == 2] == 5).all()


def test_background_inside_an_object_stays_background():
    labels = torch.tensor([0] * 30 + [1] * 3)
    found, sample = targets_of(torch.zeros(33, 2), labels, [2])
    assert (found[sample.owners == 0] == 2).all()
    assert (found[sample.owners == 1] == 5).all()


def test_acceptance_check_12_cells_of_nobody_do_not_count():
    labels = torch.tensor([0] * 10 + [-1] * 1000 + [1] * 10)
    points = torch.zeros(1020, 2)
    points[1010:] = 10
    found, sample = targets_of(points, labels, [2])
    assert (found[sample.owners == 0] == 2).all()


def test_no_objects():
    found, _ = targets_of(torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64), [])
    assert (found == 5).all()


@pytest.mark.parametrize("budget_mb", [64, 1e-9])
def test_random_embeddings_equal_the_definition(budget_mb, monkeypatch):
    monkeypatch.setattr("instseg_ext.methods.metric_learning.targets._BUDGET_MB", budget_mb)
    torch.manual_seed(1)
    labels = torch.randint(-1, 4, (9, 10))
    centres = torch.randn(5, 3)
    points = centres[labels.flatten() + 1] + torch.randn(90, 3) * 0.25
    found, sample = targets_of(points, labels, [4, 0, 2])
    assert torch.equal(found, loop(points, labels, sample, [4, 0, 2]))
    assert len(found.unique()) > 2
