"""Regions that exclude each other, against the authors' loop."""

import numpy as np
import pytest
import torch

from instseg_ext.layers.region_nms import region_nms


def by_loop(members, scores):
    """The authors' rule for one class: pairwise overlaps, best first, one after the other."""
    overlap = members.T.astype(float) @ members.astype(float) > 0
    order = np.argsort(-scores, kind="stable")
    order = [row for row in order if np.isfinite(scores[row])]
    chosen = []
    while order:
        pick = order[0]
        chosen.append(pick)
        order = [row for row in order[1:] if not overlap[pick, row]]
    return chosen


def test_acceptance_check_14_shared_superpixel():
    """Regions 1 and 2 share a superpixel, 3 is by itself: {1, 3} or {2, 3} by score."""
    members = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    regions, classes = region_nms(members, torch.tensor([[0.9], [0.8], [0.1]]))
    assert regions.tolist() == [0, 2]
    assert classes.tolist() == [0, 0]
    regions, _ = region_nms(members, torch.tensor([[0.1], [0.8], [0.9]]))
    assert regions.tolist() == [2, 1]


@pytest.mark.parametrize("num", [1, 8, 63, 64, 65, 200])
def test_equals_the_loop(num):
    rng = np.random.default_rng(num)
    members = rng.random((num, 90)) < 4 / num
    scores = rng.integers(-20, 20, (90, 3)) / 8  # with ties
    scores[rng.random((90, 3)) < 0.1] = -np.inf
    scores[0, 0] = np.nan
    regions, classes = region_nms(torch.from_numpy(members), torch.from_numpy(scores))
    for label in range(3):
        expected = by_loop(members, np.where(np.isnan(scores), -np.inf, scores)[:, label])
        assert regions[classes == label].tolist() == expected
    assert classes.tolist() == sorted(classes.tolist())


def test_low_scores_neither_stay_nor_suppress():
    members = torch.ones((1, 3), dtype=torch.bool)
    regions, _ = region_nms(members, torch.tensor([[0.5], [0.5], [0.7]]), min_score=0.5)
    assert regions.tolist() == [2]
    regions, _ = region_nms(members, torch.tensor([[0.5], [0.5], [0.7]]), min_score=0.7)
    assert regions.tolist() == []


@pytest.mark.parametrize("shape", [(0, 0), (5, 0), (0, 3)])
def test_without_regions_or_superpixels(shape):
    members = torch.zeros(shape, dtype=torch.bool)
    regions, classes = region_nms(members, torch.zeros((shape[1], 2)))
    # what has no superpixel excludes nothing
    assert len(regions) == len(classes) == 2 * shape[1]
    regions, classes = region_nms(members, torch.zeros((shape[1], 0)))
    assert regions.dtype == classes.dtype == torch.int64
    assert len(regions) == 0
