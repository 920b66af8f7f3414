"""Detections: their proposals, rounds, and the voting of boxes."""

import math

import pytest
import torch
from methods.multipathnet.multipathnet_toys import features_of, heads_of, proposals_of

from instseg_ext.methods.multipathnet.inference import (
    DetectionOptions,
    best_boxes,
    detect,
    vote_boxes,
)

SIZE = (60, 80)
ROWS = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [40, 40, 50, 50], [20, 20, 30, 30]])
SCORES = torch.tensor([0.5, 0.7, 0.6, 0.9])


def found_in(boxes=ROWS, scores=SCORES, **options):
    probs = torch.stack([scores, 1 - scores], dim=1)
    index = torch.arange(len(boxes)) + 10
    return detect(boxes, probs, index, SIZE, DetectionOptions(**options))


def test_detections_know_their_proposals():
    found = found_in()
    assert found.proposal_index.tolist() == [13, 11, 12]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert torch.equal(found.pred_boxes.tensor, ROWS[[3, 1, 2]])
    assert found_in(limit=2).proposal_index.tolist() == [13, 11]
    assert found_in(limit=-1, nms_iou=0.99).proposal_index.tolist() == [13, 11, 12, 10]
    assert found_in(min_score=0.65).proposal_index.tolist() == [13, 11]


def test_what_is_not_finite_shifts_no_index():
    boxes, scores = ROWS.clone(), SCORES.clone()
    boxes[1, 2], scores[2] = math.inf, math.nan
    assert found_in(boxes, scores).proposal_index.tolist() == [13, 10]
    assert len(found_in(boxes * math.nan)) == 0


def test_boxes_of_the_class_are_taken_and_clipped():
    boxes = torch.tensor([[0.0, 0, 10, 10, 70, 50, 90, 70]])
    probs = torch.tensor([[0.2, 0.7, 0.1]])
    found = detect(boxes, probs, torch.tensor([4]), SIZE, DetectionOptions())
    assert found.pred_boxes.tensor.tolist() == [[70, 50, 80, 60], [0, 0, 10, 10]]
    assert found.pred_classes.tolist() == [1, 0]
    assert found.proposal_index.tolist() == [4, 4]
    assert best_boxes(boxes, probs).tolist() == [[70, 50, 90, 70]]
    assert torch.equal(best_boxes(ROWS, probs.expand(4, 3)), ROWS)
    assert best_boxes(boxes[:0], probs[:0]).shape == (0, 4)


def test_voted_boxes():
    options = DetectionOptions(vote_iou=0.5, vote_power=1.0)
    classes = torch.tensor([0, 0, 0, 1])
    voted = vote_boxes(ROWS[[1, 3]], torch.tensor([0, 0]), ROWS, SCORES, classes, options)
    mean = (ROWS[0] * 0.5 + ROWS[1] * 0.7) / 1.2
    torch.testing.assert_close(voted, torch.stack([mean, ROWS[3]]))
    scores = found_in(vote_iou=0.5).scores
    assert torch.equal(scores, found_in().scores)
    heavy = DetectionOptions(vote_iou=0.5, vote_power=50.0)
    torch.testing.assert_close(
        vote_boxes(ROWS[[0]], torch.tensor([0]), ROWS, SCORES, classes, heavy), ROWS[[1]]
    )


def test_chunks_change_nothing():
    proposals = proposals_of(*[[i, i, i + 20, i + 15] for i in range(9)])
    features = features_of()
    whole = heads_of().eval()
    parts = heads_of("MODEL.MULTIPATH.REGIONS_PER_CHUNK", 2).eval()
    for heads in (whole, parts):
        heads.detection = DetectionOptions()
    with torch.no_grad():
        (a,), (b,) = (heads._forward_box(features, [proposals]) for heads in (whole, parts))
    assert torch.equal(a.proposal_index, b.proposal_index)
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor)


def test_rounds():
    """Boxes of all rounds compete; the index is still that of the proposal."""
    proposals = proposals_of([4, 4, 30, 30], [20, 10, 60, 50])
    options = ["MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0]
    one = heads_of(*options).eval()
    two = heads_of(*options, "MODEL.MULTIPATH.TEST_ROUNDS", 2).eval()
    later = heads_of(
        *options, "MODEL.MULTIPATH.TEST_ROUNDS", 2, "MODEL.MULTIPATH.TEST_NEXT_SCORES", True
    ).eval()
    maps = [x[:1] for x in (features_of()[name] for name in ("p4", "p3", "p2"))]
    with torch.no_grad():
        torch.nn.init.normal_(one.box_predictor.bbox_pred.weight, std=0.3)
        for heads in (two, later):
            heads.load_state_dict(one.state_dict())
        first, both, shifted = (heads._detect(maps, proposals) for heads in (one, two, later))
        probs, boxes = one._predict(maps, first.pred_boxes.tensor)
    assert (len(first), len(both), len(shifted)) == (2, 4, 2)
    assert sorted(both.proposal_index.tolist()) == [0, 0, 1, 1]
    assert set(first.scores.tolist()) < set(both.scores.tolist())
    assert sorted(shifted.scores.tolist()) == pytest.approx(sorted(probs[:, 0].tolist()))
    order = shifted.pred_boxes.tensor[:, 0].argsort(), first.pred_boxes.tensor[:, 0].argsort()
    torch.testing.assert_close(
        shifted.pred_boxes.tensor[order[0]], first.pred_boxes.tensor[order[1]]
    )
    assert boxes.shape == (2, 4)
