"""Average precision: equal to pycocotools' own summary, and right where that one is silent."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instseg_ext.evaluation.coco_ap import average_precision, load_ground_truth

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def official(dataset, results, iou_type, image_ids=None):
    """pycocotools used the way its own demonstration uses it, with its own summary."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy({"info": {}, **dataset})
        truth.createIndex()
        results = copy.deepcopy(results)
        if iou_type == "segm":
            for result in results:
                result.pop("bbox")
        run = COCOeval(truth, truth.loadRes(results), iou_type)
        if image_ids is not None:
            run.params.imgIds = image_ids
        run.evaluate()
        run.accumulate()
        run.summarize()
    per_class = []
    for index in range(len(run.params.catIds)):
        part = run.eval["precision"][:, :, index, 0, -1]
        part = part[part > -1]
        per_class.append(part.mean() * 100 if part.size else math.nan)
    return [v * 100 if v >= 0 else math.nan for v in run.stats[:6]], per_class


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
@pytest.mark.parametrize("seed", range(4))
def test_numbers_equal_pycocotools(make, iou_type, backend, seed):
    dataset = make.dataset(seed, images=12)
    results = make.results(dataset, seed + 50)
    assert any(a["iscrowd"] for a in dataset["annotations"])
    summary, per_class = average_precision(dataset, results, iou_type, backend=backend)
    expected, expected_classes = official(dataset, results, iou_type)
    assert [summary[name] for name in NAMES] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert list(per_class.values()) == pytest.approx(expected_classes, abs=1e-9, nan_ok=True)
    assert 1 < summary["AP"] < 99


def inner_boundary(mask, distance):
    """Pixels of a mask within ``distance`` (in rows and columns) of a pixel that is none of it."""
    height, width = mask.shape
    result = np.zeros_like(mask)
    for y, x in zip(*mask.nonzero(), strict=True):
        outside = min(y, x, height - 1 - y, width - 1 - x) < distance
        window = mask[max(y - distance, 0) : y + distance + 1, max(x - distance, 0) :][
            :, : x + distance + 1 - max(x - distance, 0)
        ]
        result[y, x] = outside or not window.all()
    return result


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(("size_hw", "distance"), [((60, 80), 2), ((20, 28), 1), ((90, 175), 4)])
def test_boundary_ap_equals_the_definition(size_hw, distance):
    """One object and one detection: AP is the share of thresholds that their IoU reaches."""
    height, width = size_hw
    y, x = np.ogrid[:height, :width]
    truth = np.hypot(y - height * 0.5, x - width * 0.3) < height * 0.4  # cut by the left border
    found = np.hypot(y - height * 0.5, x - width * 0.3 - 0.4 * distance) < height * 0.4
    wanted = min(
        overlap(truth, found),
        overlap(inner_boundary(truth, distance), inner_boundary(found, distance)),
    )
    thresholds = np.linspace(0.5, 0.95, 10)
    assert 0.5 < wanted < 0.9
    assert abs(thresholds - wanted).min() > 1e-3
    rles = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in (truth, found)]
    dataset = {
        "images": [{"id": 1, "height": height, "width": width}],
        "categories": [{"id": 1, "name": "disc"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0,
                         "area": int(truth.sum()), "bbox": coco_mask.toBbox(rles[0]).tolist(),
                         "segmentation": rles[0]}],
    }  # fmt: skip
    results = [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": rles[1]}]
    summary, per_class = average_precision(dataset, results, "boundary")
    assert summary["AP"] == pytest.approx(100 * (thresholds <= wanted).mean())
    assert per_class == {"disc": pytest.approx(summary["AP"])}
    assert average_precision(dataset, results, "segm")[0]["AP"] > summary["AP"]


def test_boundary_ap_matches_crowds_by_their_masks(make):
    """A detection inside a crowd is no false positive, however different its border."""
    dataset = make.dataset(3, images=2)
    inside = np.zeros((128, 160), dtype=np.uint8)
    inside[40:60, 50:80] = 1
    crowd = np.zeros_like(inside)
    crowd[10:120, 10:150] = 1
    good, huge = (coco_mask.encode(np.asfortranarray(mask)) for mask in (inside, crowd))
    common = {"category_id": 3, "bbox": [0, 0, 1, 1]}
    dataset["annotations"] = [
        {**common, "id": 1, "image_id": 100, "iscrowd": 0, "area": 600, "segmentation": good},
        {**common, "id": 2, "image_id": 101, "iscrowd": 1, "area": 15400, "segmentation": huge},
    ]
    results = [
        {**common, "image_id": image, "score": score, "segmentation": good}
        for image, score in ((100, 0.5), (101, 0.9))
    ]
    assert average_precision(dataset, results, "boundary")[0]["AP"] == pytest.approx(100)


def test_boundary_ap_needs_the_package_that_has_it(dataset):
    with pytest.raises(ValueError, match="install faster-coco-eval"):
        average_precision(dataset, [], "boundary", backend="pycocotools")


def test_part_of_the_images(make, dataset):
    results = make.results(dataset)
    ids = [image["id"] for image in dataset["images"]][:3]
    part, _ = average_precision(dataset, results, "segm", image_ids=ids)
    expected, _ = official(dataset, results, "segm", ids)
    assert [part[name] for name in NAMES] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert part["AP"] != pytest.approx(average_precision(dataset, results, "segm")[0]["AP"])


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_no_detection_is_zero_and_no_truth_is_nan(make, dataset, backend):
    summary, per_class = average_precision(dataset, [], "segm", backend=backend)
    assert set(summary.values()) == {0.0}
    assert per_class["disc"] == 0.0
    assert math.isnan(per_class["ghost"])
    bare = {**dataset, "annotations": []}
    summary, _ = average_precision(bare, make.results(dataset), "segm", backend=backend)
    assert all(math.isnan(value) for value in summary.values())


def keypoint_scene():
    """Return a data set of six persons and detections of them."""
    rng = np.random.default_rng(0)
    dataset = {
        "images": [{"id": 1, "height": 200, "width": 200}],
        "categories": [{"id": 1, "name": "person"}],
    }
    annotations, results = [], []
    for index in range(6):
        points = np.concatenate([rng.uniform(20, 180, (17, 2)), np.full((17, 1), 2)], axis=1)
        annotations.append(
            {"id": index + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 4000.0,
             "bbox": [10, 10, 80, 80], "num_keypoints": 17, "keypoints": points.ravel().tolist()}
        )  # fmt: skip
        points[:, :2] += rng.normal(0, 4, (17, 2))
        results.append({"image_id": 1, "category_id": 1, "score": float(rng.random()),
                        "keypoints": points.ravel().tolist()})  # fmt: skip
    dataset["annotations"] = annotations
    return dataset, results


def test_keypoints_equal_pycocotools():
    dataset, results = keypoint_scene()
    summary, _ = average_precision(dataset, results, "keypoints")
    expected, _ = official(dataset, results, "keypoints")
    assert list(summary.values()) == pytest.approx(expected[:5], abs=1e-9, nan_ok=True)
    with pytest.raises(ValueError, match=r"Objects have 17 keypoints and there are 3 .*OKS_SIGMAS"):
        average_precision(dataset, results, "keypoints", keypoint_sigmas=[0.1, 0.1, 0.2])


@pytest.mark.parametrize("backend", ["faster_coco_eval", "pycocotools"])
def test_labelled_keypoints_are_counted_where_the_file_does_not(backend):
    if backend == "faster_coco_eval":
        pytest.importorskip(backend)
    dataset, results = keypoint_scene()
    first, second = dataset["annotations"][:2]
    first["keypoints"][2::3], first["num_keypoints"] = [0] * 17, 0
    second["keypoints"][2::3], second["num_keypoints"] = [1] * 9 + [0] * 8, 9
    expected, _ = average_precision(dataset, results, "keypoints", backend=backend)
    assert 0 < expected["AP"] < 100
    for left in (3, 0):  # annotations that still have the key
        for annotation in dataset["annotations"][left:]:
            annotation.pop("num_keypoints", None)
        summary, _ = average_precision(dataset, results, "keypoints", backend=backend)
        assert summary == pytest.approx(expected, nan_ok=True)
    first["num_keypoints"] = None
    summary, _ = average_precision(dataset, results, "keypoints", backend=backend)
    assert summary == pytest.approx(expected, nan_ok=True)
    assert "num_keypoints" not in second


def test_sparse_annotation_files(make, tmp_path, dataset):
    """No info, ids, areas, crowd flags; a degenerate polygon; two categories of one name."""
    full, _ = average_precision(dataset, make.results(dataset), "segm")
    bare = {
        "images": dataset["images"],
        "annotations": [],
        "categories": copy.deepcopy(make.categories),
    }
    for annotation in dataset["annotations"]:
        keys = ["image_id", "category_id", "bbox", "segmentation"] + ["iscrowd"] * annotation[
            "iscrowd"
        ]
        bare["annotations"].append({key: annotation[key] for key in keys})
    bare["annotations"].append(
        {"image_id": 100, "category_id": 3, "bbox": [1, 1, 1, 1], "segmentation": [[1, 1, 2, 2]]}
    )
    bare["categories"][1]["name"] = "disc"
    path = tmp_path / "bare.json"
    path.write_text(json.dumps(bare))
    loaded = load_ground_truth(path)
    assert loaded["annotations"][0]["area"] == dataset["annotations"][0]["area"]
    summary, per_class = average_precision(loaded, make.results(dataset), "segm")
    assert summary == pytest.approx(full, nan_ok=True)
    assert list(per_class) == ["disc (3)", "disc (7)", "ghost"]


def test_bad_files_and_foreign_results_are_named(tmp_path, dataset):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        load_ground_truth(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        load_ground_truth(tmp_path / "broken.json")
    (tmp_path / "poor.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="no categories"):
        load_ground_truth(tmp_path / "poor.json")
    with pytest.raises(ValueError, match="image id 5"):
        average_precision(dataset, [{"image_id": 5}], "segm")
