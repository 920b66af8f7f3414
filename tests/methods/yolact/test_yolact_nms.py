"""Suppression of duplicates against plain loops, and the sheet's hand cases."""

import pytest
import torch

from instseg_ext.methods.yolact.nms import NMSOptions, suppress

CHAIN = torch.tensor([[0, 0, 0.4, 0.4], [0.1, 0, 0.5, 0.4], [0.2, 0, 0.6, 0.4]])


def iou(a, b, extra=0.0):
    width = min(a[2], b[2]) - max(a[0], b[0]) + extra
    height = min(a[3], b[3]) - max(a[1], b[1]) + extra
    common = max(width, 0) * max(height, 0)
    area_a, area_b = ((x[2] - x[0] + extra) * (x[3] - x[1] + extra) for x in (a, b))
    total = area_a + area_b - common
    return common / total if total else float("nan")


def fast_loop(boxes, scores, options, score_thresh):
    """Return (row, class, score) of every class's survivors: a suppressed box suppresses, too."""
    found = []
    for label in range(scores.shape[1]):
        order = scores[:, label].argsort(descending=True, stable=True)[: options.topk].tolist()
        for place, row in enumerate(order):
            overlaps = [iou(boxes[row].tolist(), boxes[r].tolist()) for r in order[:place]]
            good = all(o <= options.threshold for o in overlaps)
            if good and (not options.second_threshold or scores[row, label] > score_thresh):
                found.append((row, label, scores[row, label].item()))
    return sorted(found, key=lambda f: -f[2])[: options.max_detections]


def greedy_loop(boxes, scores, options, score_thresh, extra=0.0, inclusive=False):
    """Return the same of greedy NMS: only kept boxes suppress."""
    found = []
    for label in range(scores.shape[1]):
        kept = []
        for row in scores[:, label].argsort(descending=True, stable=True).tolist():
            if scores[row, label] <= score_thresh:
                continue
            overlaps = [iou(boxes[row].tolist(), boxes[r].tolist(), extra) for r in kept]
            if all(
                o < options.threshold if inclusive else o <= options.threshold for o in overlaps
            ):
                kept.append(row)
        found += [(row, label, scores[row, label].item()) for row in kept]
    return sorted(found, key=lambda f: -f[2])[: options.max_detections]


def random_case(seed, num=40, num_classes=6):
    gen = torch.Generator().manual_seed(seed)
    centre = torch.rand(num, 2, generator=gen) * 0.6 + 0.2
    size = torch.rand(num, 2, generator=gen) * 0.3 + 0.05
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=1)
    scores = (torch.randn(num, num_classes + 1, generator=gen) * 2).softmax(dim=1)[:, :-1]
    return boxes, scores


def run(boxes, scores, *, score_thresh=0.05, input_hw=(100, 200), **options):
    found = suppress(
        boxes, scores, input_hw=input_hw, score_thresh=score_thresh, options=NMSOptions(**options)
    )
    return [tuple(x) for x in zip(*(part.tolist() for part in found), strict=True)]


def close(found, expected):
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    assert [f[2] for f in found] == pytest.approx([e[2] for e in expected])


def test_fast_nms_suppresses_along_a_chain():
    scores = torch.tensor([[0.9, 0.01], [0.8, 0.02], [0.7, 0.6]])
    close(run(CHAIN, scores), [(0, 0, 0.9), (2, 1, 0.6)])
    # Greedy NMS keeps the third box: the second, which covers it, is gone by then.
    kept = greedy_loop(CHAIN, scores, NMSOptions(), 0.0)
    assert (2, 0) in [k[:2] for k in kept]


def test_cross_class_nms_suppresses_other_classes():
    scores = torch.tensor([[0.9, 0.01], [0.8, 0.02], [0.7, 0.6]])
    close(run(CHAIN, scores, kind="cross_class"), [(0, 0, 0.9)])
    far = torch.cat([CHAIN, torch.tensor([[0.7, 0.7, 0.9, 0.9]])])
    scores = torch.cat([scores, torch.tensor([[0.1, 0.3]])])
    close(run(far, scores, kind="cross_class"), [(0, 0, 0.9), (3, 1, 0.3)])


def test_weak_classes_of_a_strong_anchor_are_kept_unless_the_second_threshold_is_on():
    boxes = torch.cat([CHAIN[:1], torch.tensor([[0.7, 0.7, 0.9, 0.9]])])
    scores = torch.tensor([[0.9, 0.02], [0.01, 0.6]])
    both = [(0, 0, 0.9), (1, 1, 0.6), (0, 1, 0.02), (1, 0, 0.01)]
    close(run(boxes, scores), both)
    close(run(boxes, scores, second_threshold=True), both[:2])


@pytest.mark.parametrize("second_threshold", [False, True])
@pytest.mark.parametrize(
    "limits", [{}, {"topk": 7}, {"max_detections": 3}, {"threshold": 0.2}], ids=str
)
def test_fast_nms_equals_the_loop(limits, second_threshold):
    for seed in range(5):
        boxes, scores = random_case(seed)
        options = NMSOptions(second_threshold=second_threshold, **limits)
        found = run(boxes, scores, second_threshold=second_threshold, **limits)
        close(found, fast_loop(boxes, scores, options, 0.05))


def test_fast_nms_looks_further_when_the_best_pairs_suppress_each_other():
    # 60 copies of one box are the best of all pairs; the survivors lie far below them.
    boxes, scores = random_case(3, num=80)
    boxes[:60] = boxes[0]
    scores[:60] += 1
    options = NMSOptions(max_detections=8)
    expected = fast_loop(boxes, scores, options, 0.05)
    assert expected[-1][2] < scores[:60].min()
    close(run(boxes, scores, max_detections=8), expected)


def test_kept_pairs_are_kept_by_greedy_nms_too():
    equal = 0
    for seed in range(20):
        boxes, scores = random_case(seed, num=12, num_classes=2)
        options = NMSOptions()
        fast = {f[:2] for f in run(boxes, scores)}
        greedy = {g[:2] for g in greedy_loop(boxes, scores, options, -1.0)}
        assert fast <= greedy
        equal += fast == greedy
    assert equal > 0


def test_boxes_without_area():
    # Two of them have no overlap to speak of (0 / 0) and the worse is dropped, as in the authors'
    # code; beside any other box they are harmless.
    boxes = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.5, 0.5]])
    scores = torch.tensor([[0.9], [0.8], [0.7]])
    close(run(boxes, scores), [(0, 0, 0.9), (2, 0, 0.7)])


def test_traditional_nms_equals_the_loop_that_counts_pixels():
    for seed in range(5):
        boxes, scores = random_case(seed)
        options = NMSOptions(kind="traditional", max_detections=30)
        pixels = boxes * torch.tensor([200, 100, 200, 100])
        expected = greedy_loop(pixels, scores, options, 0.05, extra=1.0, inclusive=True)
        close(run(boxes, scores, kind="traditional", max_detections=30), expected)


def test_traditional_nms_suppresses_at_the_threshold_itself():
    # 10 x 10 and 10 x 5 pixels, counted with both ends: an overlap of exactly one half.
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 4]]) / 100
    scores = torch.tensor([[0.9], [0.8]])
    close(run(boxes, scores, kind="traditional", input_hw=(100, 100)), [(0, 0, 0.9)])
    assert len(run(boxes, scores, kind="traditional", input_hw=(100, 100), threshold=0.51)) == 2


@pytest.mark.parametrize("kind", ["fast", "cross_class", "traditional"])
def test_nothing_to_suppress(kind):
    assert run(torch.zeros(0, 4), torch.zeros(0, 3), kind=kind) == []


def test_options_name_their_keys():
    with pytest.raises(ValueError, match=r"MODEL.YOLACT.NMS.TYPE must be one of .*'soft'"):
        NMSOptions(kind="soft")
    with pytest.raises(ValueError, match=r"NMS.TOPK"):
        NMSOptions(topk=0)
    with pytest.raises(ValueError, match=r"DETECTIONS_PER_IMAGE"):
        NMSOptions(max_detections=0)
