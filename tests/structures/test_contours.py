"""Contours and mass centres: worked cases, and the same by whole-canvas tracing and plain loops."""

import pickle

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from structures.random_masks import random_masks

from instseg_ext.structures.contours import Contours, expand_ragged, trace_contours


def mask_of(*boxes, size=(20, 24)):
    """One mask with the pixels of XYXY boxes, x2 and y2 exclusive."""
    mask = torch.zeros(1, *size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        mask[0, y0:y1, x0:x1] = True
    return mask


def points_of(contours, k=0):
    return contours[k].points.tolist()


def plain_contour(mask):
    """All contours of the whole canvas, sorted as the sheet says."""
    result = cv2.findContours(mask.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
    contours = list(result[-2])
    contours.sort(key=cv2.contourArea, reverse=True)
    return contours[0][:, 0].tolist() if contours else []


def plain_center(points):
    """Shoelace with one addition after the other."""
    area = x = y = 0.0
    for i, (px, py) in enumerate(points):
        qx, qy = points[i - 1]
        part = (px * qy - py * qx) / 2.0
        area += part
        x += part * (px + qx) / 3.0
        y += part * (py + qy) / 3.0
    if area == 0:
        return [int(np.mean(axis)) for axis in zip(*points, strict=True)] if points else [0, 0]
    return [int(x / area), int(y / area)]


def test_worked_case():
    contours, centers, found = trace_contours(mask_of((200, 100, 500, 300), size=(768, 1280)))
    assert len(contours) == 1
    assert contours.points.shape == (996, 2)
    assert contours.points.dtype == torch.int16
    assert cv2.contourArea(contours.points.numpy().astype(np.int32)) == 59501
    assert centers.tolist() == [[349, 199]]
    assert centers.dtype == torch.int64
    assert found.tolist() == [True]


def test_equals_plain_loops_on_random_masks():
    masks = random_masks(1000)
    contours, centers, found = trace_contours(masks)
    plain = [plain_contour(mask) for mask in masks]
    assert found.tolist() == masks.any(axis=(1, 2)).tolist()
    assert contours.lengths.tolist() == [len(points) for points in plain]
    assert contours.points.tolist() == [point for points in plain for point in points]
    assert centers.tolist() == [plain_center(points) for points in plain]


def test_center_of_symmetric_shapes_keeps_the_last_bit():
    """Their exact centre is a whole number, which sums in floating point may just miss."""
    boxes = [
        (x, y, x + width, y + height)
        for width in range(3, 20, 2)
        for height in range(3, 16, 2)
        for x, y in ((1, 0), (37, 41), (101, 83))
    ]
    masks = torch.cat([mask_of(box, size=(100, 122)) for box in boxes])
    contours, centers, _ = trace_contours(masks)
    assert centers.tolist() == [plain_center(points_of(contours, k)) for k in range(len(boxes))]
    exact = [[(x0 + x1 - 1) // 2, (y0 + y1 - 1) // 2] for x0, y0, x1, y1 in boxes]
    missed = sum(found != whole for found, whole in zip(centers.tolist(), exact, strict=True))
    assert missed > len(boxes) // 10


@pytest.mark.parametrize(
    ("boxes", "points", "center"),
    [
        ([(5, 7, 6, 8)], [[5, 7]], [5, 7]),
        ([(5, 7, 7, 8)], [[5, 7], [6, 7]], [5, 7]),
        ([(5, 7, 8, 8)], [[5, 7], [6, 7], [7, 7], [6, 7]], [6, 7]),
        ([(5, 7, 6, 8), (5, 8, 7, 9)], [[5, 7], [5, 8], [6, 8]], None),
    ],
    ids=["pixel", "pair", "line", "corner"],
)
def test_contours_of_few_points(boxes, points, center):
    contours, centers, found = trace_contours(mask_of(*boxes))
    assert points_of(contours) == points
    assert found.all()
    assert centers.tolist() == [center or plain_center(points)]


def test_part_of_largest_area_wins():
    small, large = (1, 1, 5, 5), (10, 8, 20, 18)
    contours, centers, _ = trace_contours(mask_of(small, large))
    alone, center, _ = trace_contours(mask_of(large))
    assert torch.equal(contours.points, alone.points)
    assert torch.equal(centers, center)


def test_a_hole_changes_nothing():
    mask = mask_of((3, 2, 19, 17))
    filled = trace_contours(mask)
    mask[0, 5:12, 6:15] = False
    contours, centers, _ = trace_contours(mask)
    assert torch.equal(contours.points, filled[0].points)
    assert torch.equal(centers, filled[1])


def test_area_counts_not_the_number_of_points():
    contours, _, _ = trace_contours(mask_of((0, 0, 24, 1), (3, 4, 9, 10)))
    assert contours.points[:, 1].min() == 4


def test_object_that_fills_the_image():
    contours, centers, _ = trace_contours(torch.ones(1, 20, 24, dtype=torch.bool))
    assert contours.lengths.tolist() == [2 * (20 + 24) - 4]
    assert centers.tolist() == [plain_center(points_of(contours))]


def test_masks_without_a_pixel():
    masks = torch.cat([mask_of(), mask_of((2, 3, 8, 9)), mask_of()])
    contours, centers, found = trace_contours(masks)
    assert contours.lengths.tolist() == [0, 20, 0]
    assert found.tolist() == [False, True, False]
    assert centers[0].tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(0, 20, 24), (2, 0, 24), (0, 0, 0)])
def test_nothing_to_trace(shape):
    contours, centers, found = trace_contours(torch.zeros(shape, dtype=torch.bool))
    assert len(contours) == len(centers) == len(found) == shape[0]
    assert contours.points.shape == (0, 2)
    assert contours.points.dtype == torch.int16
    assert centers.shape == (shape[0], 2)
    assert not found.any()


def test_any_type_layout_and_container():
    expected = trace_contours(mask_of((2, 3, 8, 9), (15, 11, 18, 19)))[0].points
    mask = mask_of((2, 3, 8, 9), (15, 11, 18, 19))
    for masks in (
        mask.numpy(),
        mask.byte() * 7,
        mask.float(),
        mask.mT.contiguous().mT,
        mask.repeat_interleave(2, dim=2)[:, :, ::2],
    ):
        assert torch.equal(trace_contours(masks)[0].points, expected)


@pytest.mark.parametrize("shape", [(20, 24), (1, 1, 32768)])
def test_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="masks must have shape"):
        trace_contours(torch.zeros(shape, dtype=torch.bool))


# --- the container ------------------------------------------------------------------------------


@pytest.fixture
def ragged():
    """Contours of 3, 0, 1 and 2 points whose coordinates tell them apart."""
    points = torch.arange(12, dtype=torch.int16).reshape(6, 2)
    return Contours(points, torch.tensor([3, 0, 1, 2]))


def lists(contours):
    return [part.tolist() for part in contours.points.split(contours.lengths.tolist())]


@pytest.mark.parametrize(
    "item",
    [
        torch.tensor([3, 0, 0, 1]),
        torch.tensor([True, False, True, False]),
        torch.tensor([], dtype=torch.int64),
        torch.zeros(4, dtype=torch.bool),
        slice(1, None),
        slice(None, None, 2),
        [2, 1],
        np.array([3, 1]),
    ],
    ids=str,
)
def test_indexing(ragged, item):
    rows = np.arange(4)[item.numpy() if isinstance(item, torch.Tensor) else item]
    assert lists(ragged[item]) == [lists(ragged)[row] for row in rows]
    assert ragged[item].lengths.dtype == torch.int64


@pytest.mark.parametrize("item", [0, 1, 3, -1])
def test_an_integer_gives_one_contour(ragged, item):
    assert lists(ragged[item]) == [lists(ragged)[item]]


def test_wrong_index(ragged):
    with pytest.raises(IndexError):
        ragged[4]


def test_cat_and_empty(ragged):
    assert lists(Contours.cat([ragged, Contours.empty(), ragged[2:]])) == [
        *lists(ragged),
        *lists(ragged)[2:],
    ]
    assert len(Contours.cat([])) == len(Contours.empty()) == 0


def test_field_of_instances(ragged, device):
    instances = Instances((20, 24))
    instances.gt_contours = ragged
    instances.gt_classes = torch.arange(4)
    moved = instances.to(device)
    assert moved.gt_contours.device.type == device.type
    both = Instances.cat([moved[moved.gt_classes > 0], moved[1]])
    assert lists(both.gt_contours) == [*lists(ragged)[1:], lists(ragged)[1]]


def test_survives_pickling(ragged):
    assert lists(pickle.loads(pickle.dumps(ragged))) == lists(ragged)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_expand_ragged(dtype):
    starts, lengths = torch.tensor([5, 0, 9, 2]), torch.tensor([2, 0, 3, 1])
    owner, row = expand_ragged(starts.to(dtype), lengths.to(dtype))
    assert owner.tolist() == [0, 0, 2, 2, 2, 3]
    assert row.tolist() == [5, 6, 9, 10, 11, 2]
    assert owner.dtype == row.dtype == dtype
