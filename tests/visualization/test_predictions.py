"""Quality of an image, and the order that follows from it."""

import cv2
import numpy as np
import pytest

from instseg_ext.structures.rle import encode_masks, segmentation_rle
from instseg_ext.visualization.predictions import (
    draw_reports,
    image_quality,
    match_instances,
    rank_images,
)


def rle(*boxes):
    masks = np.zeros((len(boxes), 60, 80), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return encode_masks(masks)


def entry(box, category=1, **more):
    return {"category_id": category, "segmentation": rle(box)[0], **more}


A, B = (0, 0, 20, 20), (40, 0, 60, 20)


@pytest.mark.parametrize(
    ("truth", "found", "expected"),
    [
        ([], [], (1.0, 0, 0)),
        ([entry(A)], [], (0.0, 1, 0)),
        ([], [entry(A)], (0.0, 0, 1)),
        ([entry(A), entry(B)], [entry(B), entry(A)], (1.0, 0, 0)),
        # overlap 15 / 20 of one, the other missed: 0.75 / (1 + 1/2)
        ([entry(A), entry(B)], [entry((0, 0, 15, 20))], (0.5, 1, 0)),
        # half is not enough; both count as wrong
        ([entry(A)], [entry((0, 0, 10, 20))], (0.0, 1, 1)),
        ([entry(A)], [entry(A, category=2)], (0.0, 1, 1)),
        # the second detection of one object is spurious: 1 / (1 + 1/2)
        ([entry(A)], [entry(A), entry(A)], (2 / 3, 0, 1)),
        # crowds neither demand nor punish
        ([entry(A, iscrowd=1)], [entry((5, 5, 10, 10))], (1.0, 0, 0)),
        ([entry(A, iscrowd=1)], [], (1.0, 0, 0)),
        ([entry(A, iscrowd=1), entry(B)], [entry((30, 30, 40, 40))], (0.0, 1, 1)),
    ],
)
def test_quality(truth, found, expected):
    assert image_quality(truth, match_instances(truth, found)) == pytest.approx(expected)


@pytest.fixture
def dataset():
    images = [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 80} for i in (1, 2, 3)]
    annotations = [entry(A, image_id=i, id=i) for i in (1, 2, 3)]
    annotations[1]["segmentation"] = [[0, 0, 20, 0, 20, 20, 0, 20]]  # polygons are fine
    annotations.append({"image_id": 3, "category_id": 1, "segmentation": [[1, 1, 2, 2]]})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}


@pytest.fixture
def results():
    return [
        entry(A, image_id=1, score=0.9),
        entry(B, image_id=1, score=0.2),
        entry((0, 0, 14, 20), image_id=3, score=0.8),
    ]


def test_order(dataset, results):
    def order(**more):
        return [report.image["id"] for report in rank_images(dataset, results, **more)]

    assert order() == [2, 3, 1]
    assert order(order="best") == [1, 3, 2]
    assert order(order="dataset") == [1, 2, 3]
    assert order(only_with_results=True) == [3, 1]
    assert order(threshold=0.1) == [2, 1, 3]  # B comes in and is spurious
    with pytest.raises(ValueError, match="random"):
        order(order="random")
    with pytest.raises(ValueError, match="image id 9"):
        rank_images(dataset, [entry(A, image_id=9, score=1.0)])


def test_pictures(dataset, results, tmp_path):
    grey = np.full((60, 80, 3), 90, dtype=np.uint8)
    reports = rank_images(dataset, results)
    files = draw_reports(reports, dataset["categories"], lambda image: grey, tmp_path, count=2)
    assert [f.name for f in files] == ["001_2.png", "002_3.png", "contact_sheet.png"]
    pair = cv2.imread(str(files[1]))
    colour = pair.max(axis=2).astype(int) - pair.min(axis=2)
    assert colour[20, 20] > 20  # truth on the left
    assert colour[20, pair.shape[1] // 2 + 24] > 20  # detection on the right
    missed = cv2.imread(str(files[0]))
    right = missed[:, missed.shape[1] // 2 + 8 :].astype(int)
    assert (right.max(axis=2) - right.min(axis=2)).max() == 0
    assert draw_reports([], dataset["categories"], lambda image: grey, tmp_path / "none") == []


def test_outlines_of_every_form():
    assert segmentation_rle([], 4, 4) is None
    assert segmentation_rle(None, 4, 4) is None
    assert segmentation_rle({"size": [2, 2], "counts": [1, 3]}, 2, 2)["counts"] == b"13"
    assert segmentation_rle(rle(A)[0], 60, 80) == rle(A)[0]


def test_hits_take_the_colour_of_their_object(dataset):
    truth = [entry(A), entry(B, iscrowd=1), entry((0, 40, 20, 60), category=2)]
    found = [entry((0, 40, 20, 58), category=2), entry(B), entry(A), entry((30, 30, 35, 35))]
    matches = match_instances(truth, found)
    assert [index for index, _ in matches] == [2, None, 0, None]
    assert [overlap for _, overlap in matches] == pytest.approx([0.9, 1.0, 1.0, 0.0])
