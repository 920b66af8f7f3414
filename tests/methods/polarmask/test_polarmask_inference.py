"""Candidates, scores, suppression and frames; the numbers in brackets are those of the sheet."""

import math

import pytest
import torch

from instseg_ext.methods.polarmask.assign import locations
from instseg_ext.methods.polarmask.inference import Frame, InferenceOptions, detect
from instseg_ext.methods.polarmask.polygons import decode_polygons, ray_directions

SIZES = ((8, 8), (4, 4))
STRIDES = (8, 16)
FRAME = Frame((64, 64), (64, 64))


def logit(p):
    return math.log(p / (1 - p))


def run(objects, *, frame=FRAME, num_rays=8, with_ctr=True, with_box=True, broken=(), **options):
    """Detect what is put at some locations: (location, class, prob, centerness, sides, length).

    ``broken`` names an output, ``class`` or ``centerness``, and a location where it is NaN.
    """
    points = locations(SIZES, STRIDES)
    class_logits = torch.full((len(points), 3), -20.0)
    ctr = torch.full((len(points),), -20.0)
    boxes = torch.zeros(len(points), 4)
    rays = torch.zeros(len(points), num_rays)
    for location, label, prob, centerness, sides, length in objects:
        class_logits[location, label] = logit(prob)
        ctr[location] = logit(centerness)
        boxes[location] = torch.tensor(sides).log()
        rays[location] = math.log(length)
    if broken:
        name, location = broken
        {"class": class_logits[:, 1], "centerness": ctr}[name][location] = math.nan
    return detect(
        class_logits,
        ctr if with_ctr else None,
        boxes if with_box else None,
        rays,
        points=points,
        level_counts=tuple(h * w for h, w in SIZES),
        directions=ray_directions(num_rays),
        frame=frame,
        options=InferenceOptions(**options),
    )


SIDES = [5.0, 6.0, 7.0, 8.0]


def test_score_is_the_probability_times_centerness_plus_a_half():
    """Check 11."""
    found = run(
        [
            (10, 0, 0.051, 1e-9, SIDES, 5.0),
            (20, 1, 0.05, 0.999999, SIDES, 5.0),
            (40, 2, 0.99, 0.99, SIDES, 5.0),
        ]
    )
    assert found.classes.tolist() == [2, 0]
    assert found.locations.tolist() == [40, 10]
    torch.testing.assert_close(found.scores, torch.tensor([0.99 * 1.49, 0.0255]))


def test_without_a_quality_branch_the_score_is_the_probability():
    found = run([(10, 0, 0.7, 0.9, SIDES, 5.0)], with_ctr=False)
    torch.testing.assert_close(found.scores, torch.tensor([0.7]))


def test_boxes_reach_from_the_point_and_are_cut_at_the_last_pixel():
    found = run([(0, 0, 0.9, 0.9, [9.0, 1.0, 100.0, 2.0], 5.0)])
    assert found.points.tolist() == [[4.0, 4.0]]
    torch.testing.assert_close(found.boxes, torch.tensor([[0.0, 3.0, 63.0, 6.0]]))
    torch.testing.assert_close(found.distances, torch.full((1, 8), 5.0))


def test_suppression_is_within_classes():
    same = [(10, 0, 0.9, 0.9, SIDES, 5.0), (11, 0, 0.8, 0.9, [13.0, 6.0, 1e-3, 8.0], 5.0)]
    assert run(same).locations.tolist() == [10]
    other = [same[0], (11, 1, 0.8, 0.9, [13.0, 6.0, 1e-3, 8.0], 5.0)]
    assert run(other).locations.tolist() == [10, 11]


@pytest.mark.parametrize("extra", [0.99, 1.01])
def test_suppression_counts_pixels(extra):
    """Check 12: boxes reach from their first to their last pixel, both included."""
    # Columns 0 to 9, and 0 to 18 + extra, of the same rows: IoU 10 / (19 + extra).
    first = (0, 0, 0.9, 0.9, [4.0, 4.0, 5.0, 5.0], 5.0)
    second = (1, 0, 0.8, 0.9, [12.0, 4.0, 6.0 + extra, 5.0], 5.0)
    assert len(run([first, second]).scores) == (1 if extra < 1 else 2)


def test_suppression_on_boxes_around_the_polygons():
    """Check 12, NMS_ON mask: the box branch says the same, the rays do not."""
    objects = [(10, 0, 0.9, 0.9, SIDES, 2.0), (12, 0, 0.8, 0.9, [21.0, 6.0, 1e-3, 8.0], 2.0)]
    assert len(run(objects).scores) == 1
    found = run(objects, nms_on="mask", with_box=False)
    assert len(found.scores) == 2
    x, y = found.points[0].tolist()
    torch.testing.assert_close(found.boxes[0], torch.tensor([x - 2, y - 2, x + 2, y + 2]))


def test_suppression_compares_boxes_at_the_size_of_the_results():
    """What overlaps by a half at the input overlaps less where a pixel more matters less."""
    # Pixels 0 to 9, and 0 to 19: 10 of 20 pixels. Twice as large: 0 to 18 and 0 to 38, 19 of 39.
    objects = [
        (0, 0, 0.9, 0.9, [4.0, 4.0, 5.0, 5.0], 5.0),
        (1, 0, 0.8, 0.9, [12.0, 4.0, 6.999, 5.0], 5.0),
    ]
    assert len(run(objects).scores) == 1
    assert len(run(objects, frame=Frame((64, 64), (128, 128))).scores) == 2


def test_frames_of_indices_and_of_areas():
    """Pixels 4 to 9 of 20 are pixels 2 to 4 of 10, or 8 to 19 of 40."""
    box, tips = torch.tensor([[4.0, 4.0, 9.0, 9.0]]), torch.tensor([[[4.0, 9.0]]])
    half, double = (Frame((20, 20), (side, side), "areas") for side in (10, 40))
    assert half.boxes(box).tolist() == [[2, 2, 5, 5]]
    assert double.boxes(box).tolist() == [[8, 8, 20, 20]]
    assert half.polygons(tips).tolist() == [[[1.75, 4.25]]]
    assert double.polygons(tips).tolist() == [[[8.5, 18.5]]]
    # The authors' way: half a pixel too wide here, one too narrow there.
    half, double = (Frame((20, 20), (side, side)) for side in (10, 40))
    assert half.boxes(box).tolist() == [[2, 2, 5.5, 5.5]]
    assert double.boxes(box).tolist() == [[8, 8, 19, 19]]
    assert half.polygons(tips).tolist() == [[[2, 4.5]]]


def test_only_the_best_locations_of_a_level_stay():
    # By probability times centerness, without the constant.
    objects = [
        (3, 0, 0.9, 0.1, [1.0] * 4, 1.0),
        (30, 0, 0.5, 0.9, [1.0] * 4, 1.0),
        (60, 0, 0.6, 0.8, [1.0] * 4, 1.0),
        (70, 0, 0.2, 0.1, [1.0] * 4, 1.0),
    ]
    assert run(objects, nms_pre=2).locations.tolist() == [60, 30, 70]


def test_values_that_are_not_finite_give_no_detection():
    found = run([(10, 0, 0.9, 0.9, [math.inf] * 4, 5.0), (40, 0, 0.8, 0.9, [5.0] * 4, 5.0)])
    assert found.locations.tolist() == [40]
    found = run([(10, 0, 0.9, 0.9, [5.0] * 4, math.inf), (40, 0, 0.8, 0.9, [5.0] * 4, 5.0)])
    assert found.locations.tolist() == [40]


@pytest.mark.parametrize("output", ["class", "centerness"])
def test_a_logit_that_is_no_number_gives_no_detection_and_takes_no_place(output):
    objects = [(10, 0, 0.9, 0.9, SIDES, 5.0), (40, 0, 0.8, 0.9, SIDES, 5.0)]
    assert run(objects, nms_pre=1).locations.tolist() == [10]
    assert run(objects, nms_pre=1, broken=(output, 10)).locations.tolist() == [40]


def test_nothing_gives_nothing():
    found = run([])
    assert found.boxes.shape == (0, 4)
    assert found.distances.shape == (0, 8)


def test_a_low_threshold_lets_every_class_through():
    found = run([(10, 0, 0.9, 0.9, SIDES, 5.0)], score_thresh=0.0, max_detections=1000)
    assert len(found.scores) > 100


def test_limits_name_their_key():
    with pytest.raises(ValueError, match="NMS_PRE"):
        InferenceOptions(nms_pre=0)
    with pytest.raises(ValueError, match="DETECTIONS_PER_IMAGE"):
        InferenceOptions(max_detections=0)
    with pytest.raises(ValueError, match="NMS_ON"):
        InferenceOptions(nms_on="polygon")


def test_directions_turn_from_down_to_right():
    """Check 2: ray 9 of 36 points to the right; the old order begins on the left."""
    down = ray_directions(36)
    torch.testing.assert_close(
        down[[0, 9, 18, 27]], torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]]), atol=1e-6, rtol=0
    )
    left = ray_directions(36, "left")
    torch.testing.assert_close(left, down.roll(9, 0), atol=1e-6, rtol=0)


def test_polygons_are_cut_at_the_last_pixel():
    points, lengths = torch.tensor([[4.0, 4.0]]), torch.full((1, 4), 10.0)
    tips = decode_polygons(points, lengths, ray_directions(4), (12, 64))
    expected = torch.tensor([[[4.0, 11], [14, 4], [4, 0], [0, 4]]])
    torch.testing.assert_close(tips, expected, atol=1e-5, rtol=0)
