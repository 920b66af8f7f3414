"""Mask voting against a plain loop, and by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from layers.voting_loop import vote_by_loop

from instseg_ext.layers.mask_voting import VotingRule, vote_masks

SIZE = (64, 80)
RULES = {
    "mnc": VotingRule.mnc(),
    "mnc corners": VotingRule.mnc(corner_aligned=True),
    "fcis": VotingRule.fcis(),
}


def candidates(num, classes, seed, m=21):
    """Boxes around a few places, some of them beyond the image, and smooth masks."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    corner = rand(12, 2) * 55
    places = torch.cat([corner, corner + 8 + rand(12, 2) * 25], dim=1)
    boxes = places[torch.arange(num) % 12] + torch.randn(num, 4, generator=generator) * 2
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    grid = torch.arange(m) - m / 2
    radius = (m * (0.3 + 0.3 * rand(num))) ** 2
    masks = 2 - (grid[:, None] ** 2 + grid**2) * 2 / radius[:, None, None] + rand(num, m, m)
    scores = (rand(num, classes + 1) * 5).softmax(dim=1)[:, :classes]
    return boxes, masks.sigmoid(), scores


def given(boxes, scores, masks=None, m=21):
    boxes = torch.tensor(boxes, dtype=torch.float32)
    masks = torch.ones(len(boxes), m, m) if masks is None else torch.stack(masks)
    return boxes, masks, torch.tensor(scores, dtype=torch.float32)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_voting_is_the_plain_loop(rule, seed):
    rule = replace(rule, max_detections=20)
    inputs = candidates(150, 5, seed)
    found = vote_masks(*inputs, SIZE, rule)
    assert len(found.scores) == 20
    wanted = vote_by_loop(*inputs, SIZE, rule)
    assert found.scores.tolist() == [entry[0] for entry in wanted]
    assert found.classes.tolist() == [entry[1] for entry in wanted]
    for mask, box, (_, _, _, average) in zip(found.masks, found.boxes, wanted, strict=True):
        plain = average >= rule.mask_threshold
        clear = np.abs(average - rule.mask_threshold) > 1e-5
        assert clear.mean() > 0.99
        assert np.array_equal(mask.numpy()[clear], plain[clear])
        ys, xs = mask.numpy().nonzero()
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
