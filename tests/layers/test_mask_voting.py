"""Mask voting against a plain loop, and by hand."""

import warnings
from contextlib import nullcontext
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from layers.far_device import DEVICE, FarDevice
from layers.voting_loop import drawn, resampled, vote_by_loop

from instseg_ext.layers import mask_average, mask_voting
from instseg_ext.layers.mask_voting import VotingRule, vote_masks
from instseg_ext.structures.rle import decode_masks

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


def given(boxes, scores, masks=None):
    """Candidates of these boxes and scores; masks of ones unless there are others."""
    masks = torch.ones(len(boxes), 21, 21) if masks is None else torch.stack(masks)
    return torch.tensor(boxes).float().reshape(-1, 4), masks, torch.tensor(scores).float()


def halves():
    left = torch.zeros(21, 21)
    left[:, :10] = 1
    return left, 1 - left


def assert_same(found, wanted):
    assert found.scores.tolist() == wanted.scores.tolist()
    assert found.classes.tolist() == wanted.classes.tolist()
    assert found.boxes.tolist() == wanted.boxes.tolist()
    assert torch.equal(found.masks, wanted.masks)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_voting_is_the_plain_loop(rule, seed, monkeypatch):
    # Several tiles, and a second look at the scores.
    monkeypatch.setattr(mask_average, "_SMALLEST_TILE", 24)
    monkeypatch.setattr(mask_voting, "_FIRST_PAIRS", 1)
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


@pytest.mark.parametrize("name", ["mnc", "fcis"])
def test_reencoding_is_the_plain_loop(name):
    rule = replace(getattr(VotingRule, name)(reencode=True), max_detections=12)
    inputs = candidates(80, 3, 2)
    found = vote_masks(*inputs, SIZE, rule)
    wanted = vote_by_loop(*inputs, SIZE, rule)
    assert found.scores.tolist() == [entry[0] for entry in wanted]
    for mask, box, (_, _, _, average) in zip(found.masks, found.boxes, wanted, strict=True):
        plain = average >= rule.mask_threshold if rule.inclusive else average > rule.mask_threshold
        ys, xs = plain.nonzero()
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        cells = resampled(average, box.int().tolist(), 21, rule.corner_aligned)
        clear = np.abs(cells - rule.mask_threshold).min() > 1e-6
        if rule.binary_cells:
            assert clear
            cells = (cells >= rule.mask_threshold).astype(np.float32)
        value = drawn(cells, box.numpy(), SIZE, corner_aligned=False)
        sure = np.abs(value - rule.mask_threshold) > 1e-5
        assert np.array_equal(mask.numpy()[sure], (value >= rule.mask_threshold)[sure])


@pytest.mark.parametrize("reencode", [False, True])
def test_no_budget_changes_the_result_and_run_lengths_are_the_same_masks(reencode):
    rule = VotingRule.fcis(reencode=reencode, max_detections=15)
    inputs = candidates(80, 3, 3)
    wanted = vote_masks(*inputs, SIZE, rule)
    assert_same(vote_masks(*inputs, SIZE, rule, 0.02), wanted)
    for budget_mb in (0.02, 256):
        found = vote_masks(*inputs, SIZE, rule, budget_mb, output="rle")
        masks = torch.from_numpy(decode_masks(found.masks, SIZE))
        assert_same(replace(found, masks=masks), wanted)


def vote_far_away(inputs, rule, **options):
    """Vote on the device of ``FarDevice``; return the result as of the CPU, and the device."""
    with FarDevice() as device:
        far = [tensor.to(DEVICE) for tensor in inputs]
        device.copies = 0
        found = vote_masks(*far, SIZE, rule, **options)
        parts = {name: getattr(found, name) for name in ("boxes", "scores", "classes", "masks")}
        assert parts["boxes"].device == DEVICE
    return replace(found, **{k: getattr(v, "near", v) for k, v in parts.items()}), device


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())


@pytest.mark.parametrize("output", ["bool", "rle"])
@pytest.mark.parametrize("reencode", [False, True])
@pytest.mark.parametrize("name", ["mnc", "fcis"])
def test_other_devices_give_the_same_and_are_waited_for_once(name, reencode, output, no_autocast):
    inputs, reads = candidates(150, 5, 0), {}
    for most in (5, 20):
        rule = getattr(VotingRule, name)(reencode=reencode, max_detections=most)
        found, device = vote_far_away(inputs, rule, output=output)
        wanted = vote_masks(*inputs, SIZE, rule, output=output)
        assert len(found.scores) == most
        if output == "rle":
            assert found.masks == wanted.masks
            found, wanted = (replace(x, masks=torch.zeros(0)) for x in (found, wanted))
        assert_same(found, wanted)
        # One step has all tiles; corners of windows go the same way.
        assert device.copies == 2 + reencode
        reads[most] = device.reads
    # The choice of detections, what the work is planned by, and run lengths.
    assert reads[5] == reads[20]
    assert len(reads[20]) == 9 + (output == "rle")


def test_other_devices_are_told_once_per_chunk_and_row_of_tiles(no_autocast, monkeypatch):
    monkeypatch.setattr(mask_average, "_SMALLEST_TILE", 24)
    inputs, rule = candidates(150, 5, 0), VotingRule.fcis(max_detections=20)
    wanted = vote_masks(*inputs, SIZE, rule, output="rle")
    seen = []
    # All masks at once, and half of the budget for six masks of 64 x 80 bytes.
    for budget_mb, chunks in ((0.3, 1), (0.06, 4)):
        found, device = vote_far_away(inputs, rule, budget_mb=budget_mb, output="rle")
        assert found.masks == wanted.masks
        assert device.copies == 4 * chunks
        seen.append(len(device.reads))
    assert seen == [10, 13]


@pytest.mark.gpu
@pytest.mark.parametrize("output", ["bool", "rle"])
@pytest.mark.parametrize("name", ["mnc", "fcis"])
def test_a_gpu_gives_the_same_and_is_waited_for_once(name, output):
    inputs, waits = candidates(150, 5, 0), []
    there = [tensor.cuda() for tensor in inputs]
    for most in (5, 20):
        rule = getattr(VotingRule, name)(max_detections=most)
        wanted = vote_masks(*inputs, SIZE, rule)
        vote_masks(*there, SIZE, rule, output=output)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = vote_masks(*there, SIZE, rule, output=output)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in caught))
        assert found.boxes.is_cuda
        assert found.scores.tolist() == wanted.scores.tolist()
        assert found.classes.tolist() == wanted.classes.tolist()
        masks = found.masks if output == "bool" else torch.from_numpy(decode_masks(found.masks))
        # Sums in another order: pixels at the threshold.
        assert (masks.cpu() ^ wanted.masks).float().mean() < 1e-4
    assert waits[0] == waits[1]


def test_one_candidate_gives_its_box_and_score():
    # Acceptance check 12 of MNC.
    for rule in RULES.values():
        found = vote_masks(*given([[10, 20, 30, 40]], [[0.0, 0.6]]), SIZE, rule)
        assert found.boxes.tolist() == [[10, 20, 30, 40]]
        assert found.scores.tolist() == pytest.approx([0.6])
        assert found.classes.tolist() == [1]
        assert found.masks.sum() == found.masks[0, 20:40, 10:30].sum() == 400


def test_identical_candidates_are_one_detection_and_distant_ones_two():
    left, _ = halves()
    box, other = [10, 20, 31, 41], [50, 20, 71, 41]
    alone = vote_masks(*given([box], [[0.9]], [left]), SIZE, RULES["mnc"])
    both = vote_masks(*given([box, box], [[0.9], [0.1]], [left, left]), SIZE, RULES["mnc"])
    assert_same(both, alone)
    found = vote_masks(*given([box, other], [[0.9], [0.1]], [left, left]), SIZE, RULES["mnc"])
    assert found.scores.tolist() == pytest.approx([0.9, 0.1])
    assert torch.equal(found.masks[0], alone.masks[0])
    assert torch.equal(found.masks[1], alone.masks[0].roll(40, dims=1))


@pytest.mark.parametrize(("scores", "columns"), [((0.7, 0.3), 10), ((0.55, 0.45), 21)])
def test_halves_of_two_voters(scores, columns):
    # Acceptance check 12 of FCIS: what less than the threshold speaks for is left out.
    box = [10.0, 20, 31, 41]
    inputs = given([box, box], [[score] for score in scores], [*halves()])
    found = vote_masks(*inputs, SIZE, RULES["fcis"])
    assert found.boxes.tolist() == [[10, 20, 10 + columns, 41]]
    assert found.masks.sum() == 21 * columns


def test_voters_are_all_candidates_whose_boxes_overlap_by_half():
    left, right = halves()
    boxes = [[10, 20, 30, 40], [10, 20, 24, 40], [26, 20, 40, 40]]
    inputs = given(boxes, [[0.5], [0.4], [0.1]], [left, right, right])
    found = vote_masks(*inputs, SIZE, RULES["fcis"])
    # The second is suppressed and votes for the first; the third does neither.
    assert found.scores.tolist() == pytest.approx([0.5, 0.1])
    assert found.boxes[0].tolist()[0::2] == [10, 24]


def test_equal_scores_keep_the_order_of_candidates_and_the_limit():
    boxes = [[12 * i, 5, 12 * i + 10, 15] for i in range(6)]
    rule = replace(RULES["mnc"], max_detections=4)
    found = vote_masks(*given(boxes, [[0.5, 0.5]] * 6), SIZE, rule)
    assert found.boxes[:, 0].tolist() == [0, 0, 12, 12]
    assert found.classes.tolist() == [0, 1, 0, 1]


def test_scores_below_the_least_and_scores_of_zero_are_no_detections():
    inputs = given([[0, 0, 10, 10], [20, 0, 30, 10]], [[0.5, 0.0], [5e-4, 0.2]])
    assert vote_masks(*inputs, SIZE, RULES["fcis"]).scores.tolist() == pytest.approx([0.5, 0.2])
    assert len(vote_masks(*inputs, SIZE, RULES["mnc"]).scores) == 3


@pytest.mark.parametrize("output", ["bool", "rle"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nothing_to_vote_on(rule, output):
    beside = [[-20, 5, -5, 20], [90, 5, 99, 20], [5, 70, 20, 90]]
    for boxes in ([], beside, [[5, 5, 5, 20], [9, 9, 8, 12]]):
        inputs = given(boxes, np.full((len(boxes), 3), 0.3))
        found = vote_masks(*inputs, SIZE, rule, output=output)
        assert found.boxes.shape == (0, 4)
        assert found.classes.dtype == torch.int64
        assert len(found.scores) == len(found.classes) == len(found.masks) == 0
        assert output == "rle" or found.masks.shape == (0, *SIZE)


def test_single_pixels_and_boxes_across_the_border():
    boxes = [[3, 4, 4, 5], [-10, -10, 20, 30], [70, 50, 95, 80], [79, 0, 80, 1]]
    inputs = given(boxes, [[0.9], [0.8], [0.7], [0.6]])
    found = vote_masks(*inputs, SIZE, RULES["mnc"])
    wanted = [[3, 4, 4, 5], [0, 0, 20, 30], [70, 50, 80, 64], [79, 0, 80, 1]]
    assert found.boxes.tolist() == wanted
    assert found.masks.sum(dim=(1, 2)).tolist() == [1, 600, 140, 1]
    # FCIS drops what is one pixel wide or high.
    kept = vote_masks(*inputs, SIZE, RULES["fcis"])
    assert kept.boxes.tolist() == [wanted[1], wanted[2]]
    assert torch.equal(kept.masks, found.masks[1:3])


def test_faint_masks_are_dropped_and_what_is_not_a_number_takes_no_part():
    boxes, masks, scores = candidates(40, 3, 5)
    wanted = vote_masks(boxes, masks, scores, SIZE, RULES["mnc"])
    bad = torch.full((3, 4), 10.0) + torch.tensor([0, 0, 9, 9])
    bad[0, 2] = float("nan")
    more = torch.ones(3, 21, 21)
    more[1, 3, 3] = float("inf")
    odd = torch.full((3, 3), 0.99)
    odd[2, 1] = float("nan")
    inputs = [torch.cat(pair) for pair in ((bad, boxes), (more, masks), (odd, scores))]
    assert_same(vote_masks(*inputs, SIZE, RULES["mnc"]), wanted)
    faint = vote_masks(boxes, masks * 0.3, scores, SIZE, RULES["mnc"])
    assert len(faint.scores) == len(faint.masks) == 0


def test_own_masks_keep_the_boxes_of_their_candidates():
    left, right = halves()
    boxes = [[10.2, 20, 31.2, 41], [12.2, 20, 33.2, 41]]
    inputs = given(boxes, [[0.6, 0.3], [0.5, 0.4]], [left, right])
    found = vote_masks(*inputs, SIZE, VotingRule.own_masks())
    assert found.scores.tolist() == pytest.approx([0.6, 0.4])
    torch.testing.assert_close(found.boxes, inputs[0])
    assert found.masks[0].any(dim=0).nonzero()[:, 0].tolist() == list(range(10, 20))
    assert found.masks[1].any(dim=0).nonzero()[:, 0].tolist() == list(range(22, 33))


def test_half_precision_and_autocast_change_nothing_but_the_input():
    boxes, masks, scores = (x.bfloat16() for x in candidates(40, 3, 6))
    wanted = vote_masks(boxes.float(), masks.float(), scores.float(), SIZE, RULES["mnc"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(vote_masks(boxes, masks, scores, SIZE, RULES["mnc"]), wanted)


@pytest.mark.parametrize(
    "wrong",
    [{"nms_threshold": 1.5}, {"voter_iou": -0.1}, {"mask_threshold": 0.0}, {"max_detections": 0}],
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VotingRule.mnc(**wrong)


def test_an_unknown_output_is_refused():
    with pytest.raises(ValueError, match="'png'"):
        vote_masks(*candidates(4, 2, 0), SIZE, RULES["mnc"], output="png")


def test_mncs_masks_are_drawn_where_training_puts_them():
    # Cells as mask targets have them, of an object that fills the right and lower part of its box.
    height, width = 160, 200
    truth = np.zeros((height, width), np.float32)
    truth[60:140, 70:170] = 1
    target = cv2.resize(truth[20:140, 30:170], (21, 21)) >= 0.4
    inputs = given([[30, 20, 170, 140]], [[1.0]], [torch.from_numpy(target).float()])

    def iou(rule):
        mask = vote_masks(*inputs, truth.shape, rule).masks[0].numpy()
        return (mask & (truth > 0)).sum() / (mask | (truth > 0)).sum()

    assert iou(VotingRule.mnc()) > 0.97
    # The authors' drawing is up and left of it; bringing it back to cells does not mend that here.
    for rule in (VotingRule.mnc(reencode=True), VotingRule.mnc(corner_aligned=True)):
        assert iou(rule) < 0.94
