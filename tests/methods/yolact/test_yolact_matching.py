"""Assignment of objects to anchors: worked cases, and a plain loop as oracle."""

import pytest
import torch
from torchvision.ops import box_iou

from instseg_ext.methods.yolact.anchors import AnchorGrid
from instseg_ext.methods.yolact.box_coding import to_corners
from instseg_ext.methods.yolact.matching import MatchOptions, match_anchors

K = 80
TOY = [[0, 0, 0.4, 0.4], [0.1, 0, 0.5, 0.4], [0.6, 0.6, 1, 1], [0.2, 0, 0.6, 0.4]]
G0, G1 = [0, 0, 0.4, 0.4], [0.05, 0, 0.45, 0.4]


def boxes(rows):
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def from_corners(corners):
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)


def match(anchors, gts, classes, crowds=()):
    gts = gts if isinstance(gts, torch.Tensor) else boxes(gts)
    crowds = crowds if isinstance(crowds, torch.Tensor) else boxes(crowds)
    classes = torch.as_tensor(classes, dtype=torch.int64)
    return match_anchors(anchors, gts, classes, crowds, num_classes=K, options=MatchOptions())


def match_toy(gts, classes, crowds=()):
    return match(from_corners(boxes(TOY)), gts, classes, crowds)


def overlaps_of(anchors, gts):
    return box_iou(gts, to_corners(anchors))


def greedy(overlaps):
    """Walk through all pairs by falling IoU, and keep those whose two sides are free."""
    pairs = [(-v, j, i) for j, row in enumerate(overlaps.tolist()) for i, v in enumerate(row)]
    owners = {}
    for _, j, i in sorted(pairs):
        if i not in owners and j not in owners.values():
            owners[i] = j
    return owners


def oracle(anchors, gts, classes, crowds):
    """Follow the rule anchor by anchor."""
    overlaps = overlaps_of(anchors, gts)
    owners = greedy(overlaps)
    labels, matched = [], []
    for i, (x0, y0, x1, y1) in enumerate(to_corners(anchors).tolist()):
        column = overlaps[:, i].tolist()
        j = owners.get(i, column.index(max(column)))
        label = int(classes[j])
        if i not in owners and column[j] < 0.5:
            label = K if column[j] < 0.4 else -1
        covered = [
            max(min(x1, c[2]) - max(x0, c[0]), 0) * max(min(y1, c[3]) - max(y0, c[1]), 0)
            for c in crowds.tolist()
        ]
        if label == K and max(covered, default=0) / ((x1 - x0) * (y1 - y0)) > 0.7:
            label = -1
        labels.append(label)
        matched.append(j)
    return labels, matched


def test_worked_case():
    torch.testing.assert_close(
        overlaps_of(from_corners(boxes(TOY)), boxes([G0, G1])),
        torch.tensor([[1, 0.6, 0, 0.3333], [0.7778, 0.7778, 0, 0.4545]]),
        atol=1e-4,
        rtol=0,
    )
    targets = match_toy([G0, G1], [3, 7])
    assert targets.labels.tolist() == [3, 7, K, -1]
    assert targets.matched[[0, 1, 3]].tolist() == [0, 1, 1]
    assert targets.labels.dtype == targets.matched.dtype == torch.int64


def test_crowd_makes_background_neutral():
    targets = match_toy([G0, G1], [3, 7], [[0.55, 0.55, 1, 1]])
    assert targets.labels.tolist() == [3, 7, -1, -1]


def test_crowd_leaves_positives_alone():
    assert match_toy([G0, G1], [3, 7], [[0, 0, 1, 1]]).labels.tolist() == [3, 7, -1, -1]


def test_crowd_must_cover_the_anchor_not_be_covered():
    assert match_toy([G0], [3], [[0.7, 0.7, 0.8, 0.8]]).labels.tolist() == [3, 3, K, K]


def test_object_keeps_an_anchor_that_another_overlaps_more():
    assert match_toy([G0, [0, 0, 0.36, 0.4]], [3, 7]).labels.tolist() == [3, 7, K, K]


def test_object_without_any_overlap_owns_the_first_anchor():
    targets = match_toy([[0.45, 0.75, 0.55, 0.85]], [0])
    assert targets.labels.tolist() == [0, K, K, K]


def test_without_objects_everything_is_background():
    targets = match_toy([], [])
    assert targets.labels.tolist() == [K] * 4
    assert targets.matched.tolist() == [0] * 4


def test_only_crowds():
    assert match_toy([], [], [[0.55, 0.55, 1, 1]]).labels.tolist() == [K, K, -1, K]


def test_same_object_many_times():
    targets = match_toy([G0] * 4, [0, 1, 2, 3])
    assert sorted(targets.labels.tolist()) == [0, 1, 2, 3]
    # Each takes the best that the ones before it left over.
    assert targets.matched.tolist() == [0, 1, 3, 2]


def test_more_objects_than_anchors_are_refused():
    with pytest.raises(ValueError, match=r"5 objects .* 4 anchors"):
        match_toy([G0] * 5, [0] * 5)


def random_case(generator):
    """Draw a few anchors and objects on a coarse raster: many ties, zeros and conflicts."""

    def draw(count, raster):
        corners = torch.randint(0, raster, (count, 4), generator=generator) / raster
        low, high = corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])
        return torch.cat([low, high + 1 / raster], dim=1)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    raster = (4, 8, 1000)[number(0, 3)]
    gts = draw(number(1, 9), raster)
    if number(0, 2):
        gts = torch.cat([gts, gts[: number(1, len(gts) + 1)]])
    anchors = from_corners(draw(number(len(gts), 40), raster))
    classes = torch.randint(0, K, (len(gts),), generator=generator)
    return anchors, gts, classes, draw(number(0, 3), raster)


def test_equals_the_loop_on_random_cases():
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        case = random_case(generator)
        targets = match(*case)
        labels, matched = oracle(*case)
        assert targets.labels.tolist() == labels
        assert targets.matched.tolist() == matched


@pytest.mark.parametrize("copies", [1, 3])
def test_every_object_owns_an_anchor_of_the_published_grid(copies):
    scales = tuple((s,) for s in (24, 48, 96, 192, 384))
    sizes = [(s, s) for s in (69, 35, 18, 9, 5)]
    anchors = AnchorGrid(scales, square=True).anchors(sizes, (550, 550), "cpu")
    center, half = torch.rand(30, 2), torch.rand(30, 2) ** 3 / 2 + 1e-4
    gts = torch.cat([(center - half).clamp(min=0), (center + half).clamp(max=1)], dim=1)
    gts = gts.repeat(copies, 1)
    targets = match(anchors, gts, torch.arange(len(gts)) % K)
    positive = targets.labels.ge(0) & targets.labels.lt(K)
    owners = targets.matched[positive]
    assert owners.unique().tolist() == list(range(len(gts)))
    assert torch.equal(targets.labels[positive], owners % K)


def test_inputs_are_not_modified():
    anchors, gts, crowds = from_corners(boxes(TOY)), boxes([G0, G0]), boxes([G1])
    before = [t.clone() for t in (anchors, gts, crowds)]
    match(anchors, gts, [0, 1], crowds)
    assert all(map(torch.equal, before, (anchors, gts, crowds)))


def test_autocast_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = match_toy([G0, G1], [3, 7])
    assert targets.labels.tolist() == [3, 7, K, -1]
