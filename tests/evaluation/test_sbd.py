"""AP^r: values worked out by hand, plain loops on random detections, and the evaluator."""

import json
import math

import numpy as np
import pytest
from detectron2.config import get_cfg
from pycocotools import mask as coco_mask

import instseg_ext
from instseg_ext.evaluation import InstSegSBDEvaluator, build_evaluator, region_average_precision
from instseg_ext.evaluation import coco as evaluator_module
from instseg_ext.evaluation.region_errors import error_gains
from instseg_ext.evaluation.report import class_table, metric_table
from instseg_ext.evaluation.voc_ap import (
    THRESHOLDS,
    all_point_ap,
    eleven_point_ap,
    match_best,
    match_free,
)
from instseg_ext.structures.rle import encode_masks

WIDTH = 40


def curve(hits, objects):
    """Recall and precision after each detection."""
    hits = np.cumsum(hits)
    return hits / objects, hits / np.arange(1, len(hits) + 1)


def strip(start, stop):
    """The run lengths of an object in an image of one row."""
    mask = np.zeros((1, 1, WIDTH), dtype=bool)
    mask[0, 0, start:stop] = True
    return encode_masks(mask)[0]


def strips(images, crowds=()):
    """A data set of one class: for each image, the start and the end of its objects."""
    annotations = [
        {"image_id": index, "category_id": 1, "segmentation": strip(*ends)}
        for index, objects in enumerate(images)
        for ends in objects
    ]
    annotations += [
        {"image_id": 0, "category_id": 1, "iscrowd": 1, "segmentation": strip(*ends)}
        for ends in crowds
    ]
    return {
        "images": [{"id": i, "height": 1, "width": WIDTH} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "strip"}],
    }


def detections(*found):
    """Results from (image, score, start, end)."""
    return [
        {"image_id": image, "category_id": 1, "score": score, "segmentation": strip(start, stop)}
        for image, score, start, stop in found
    ]


def average(dataset, results, rule, threshold, **options):
    found = region_average_precision(dataset, results, **options)
    return found[rule][1][THRESHOLDS.index(threshold)]


@pytest.mark.parametrize(
    ("hits", "objects", "all_points", "eleven_points"),
    [
        ([1, 0, 1], 2, 0.833333, 0.848485),
        ([1, 1, 0], 3, 0.666667, 0.636364),
        ([1], 1, 1.0, 1.0),
        ([1, 0], 1, 1.0, 1.0),  # a double after full recall
        ([], 3, 0.0, 0.0),
        ([0, 0], 3, 0.0, 0.0),
        ([1, 1, 1] + [0] * 7, 10, 0.3, 3 / 11),  # 3 / 10 is less than the fourth recall
    ],
)
def test_ap_by_hand(hits, objects, all_points, eleven_points):
    assert all_point_ap(*curve(hits, objects)) == pytest.approx(all_points, abs=1e-6)
    assert eleven_point_ap(*curve(hits, objects)) == pytest.approx(eleven_points, abs=1e-6)


def test_the_rules_differ_below_one_half():
    """The second detection overlaps an object that is taken more than one that is free."""
    overlaps, at = np.array([[0.9, 0.1], [0.45, 0.35]]), np.array([0.3])
    best, free = match_best(overlaps, at)[:, 0], match_free(overlaps, at)[:, 0]
    assert best.tolist() == [True, False]
    assert free.tolist() == [True, True]
    assert all_point_ap(*curve(free, 2)) == pytest.approx(1)
    assert all_point_ap(*curve(best, 2)) == pytest.approx(0.5)
    assert eleven_point_ap(*curve(best, 2)) == pytest.approx(0.545455, abs=1e-6)


@pytest.mark.parametrize(("threshold", "covered"), [(0.5, 10), (0.7, 14)])
def test_an_iou_of_exactly_the_threshold(threshold, covered):
    dataset, results = strips([[(0, 20)]]), detections((0, 0.9, 0, covered))
    assert average(dataset, results, "voc", threshold) == pytest.approx(1)
    assert average(dataset, results, "sds", threshold) == 0


def test_vol_of_one_detection():
    """IoU 0.65 passes 0.1 to 0.6."""
    found = region_average_precision(strips([[(0, 20)]]), detections((0, 0.9, 0, 13)))
    for rule in ("voc", "sds"):
        assert found[rule][1].mean() == pytest.approx(6 / 9)


def test_a_double_is_wrong():
    dataset = strips([[(0, 10), (20, 30)]])
    results = detections((0, 0.9, 0, 10), (0, 0.8, 0, 9), (0, 0.7, 20, 30))
    assert average(dataset, results, "sds", 0.5) == pytest.approx(0.833333, abs=1e-6)
    assert average(dataset, results, "voc", 0.5) == pytest.approx(0.848485, abs=1e-6)
    single = strips([[(0, 10)]])
    assert average(single, results[:2], "sds", 0.5) == 1


def test_images_without_the_class_and_ranks():
    """A detection where nothing is counts as wrong; equal scores rank by image of the data set."""
    dataset = strips([[(0, 10)], [], [(5, 25)]])
    wrong_first = detections((2, 0.5, 5, 25), (1, 0.9, 0, 10), (0, 0.5, 0, 10))
    # wrong, right, right
    assert average(dataset, wrong_first, "sds", 0.5) == pytest.approx(2 / 3)
    tied = detections((2, 0.5, 5, 25), (1, 0.5, 0, 10), (0, 0.5, 0, 10))
    # right (image 0), wrong (1), right (2)
    assert average(dataset, tied, "sds", 0.5) == pytest.approx(0.833333, abs=1e-6)
    assert average(dataset, tied, "sds", 0.5, image_ids=[2]) == 1
    assert math.isnan(average(dataset, tied, "sds", 0.5, image_ids=[1]))


def test_crowds_neither_help_nor_harm():
    """Half of a detection in a crowd is enough for IoU 0.5; an object counts before a crowd."""
    dataset = strips([[(0, 10)]], crowds=[(20, 40)])
    harmless = detections((0, 0.9, 10, 30), (0, 0.8, 25, 28), (0, 0.5, 0, 10))
    assert average(dataset, harmless, "voc", 0.5) == pytest.approx(1)
    # by this rule an overlap of exactly one half is not enough
    assert average(dataset, harmless, "sds", 0.5) == pytest.approx(0.5)
    assert average(dataset, harmless[1:], "sds", 0.5) == 1
    # below 0.5 the whole of the crowd is passed by
    assert average(dataset, harmless, "voc", 0.6) == pytest.approx(0.5)
    shared = strips([[(20, 40)]], crowds=[(20, 40)])
    assert average(shared, detections((0, 0.9, 20, 40)), "voc", 0.5) == pytest.approx(1)


def test_detections_of_a_category_without_a_name_are_passed_over():
    dataset, results = strips([[(0, 16)]]), detections((0, 0.9, 0, 16))
    results.append({**results[0], "category_id": 7})
    assert list(error_gains(dataset, results)) == [1]
    assert average(dataset, results, "sds", 0.5) == 1


def test_masks_of_another_size_are_refused():
    results = [{"image_id": 0, "category_id": 1, "score": 1.0,
                "segmentation": encode_masks(np.ones((1, 2, 3), dtype=bool))[0]}]  # fmt: skip
    with pytest.raises(ValueError, match="Image 0: a predicted mask is 3 x 2 pixels, the image 40"):
        region_average_precision(strips([[(0, 20)]]), results)
    with pytest.raises(ValueError, match="image id 7"):
        region_average_precision(strips([[]]), detections((7, 0.5, 0, 1)))


@pytest.mark.parametrize(
    ("wrong", "gains"),
    [
        ((0, 6), [0.5, 0.5, 0, 0, 0]),  # IoU 0.375
        ((16, 24), [0, 0, 0.5, 0, 0]),
        ((24, 32), [0, 0, 0, 0.5, 0]),
        ((32, 40), [0, 0, 0, 0, 0.5]),
        ((0, 16), [0, 0, 0, 0, 0]),  # it is right, and the other one a double after full recall
    ],
)
def test_what_an_error_costs(wrong, gains):
    """One wrong detection before the right one."""
    dataset = strips([[(0, 16)], []])
    for category, ends in ((2, (16, 24)), (3, (24, 32))):
        dataset["annotations"].append(
            {"image_id": 0, "category_id": category, "segmentation": strip(*ends)}
        )
    dataset["categories"] = [
        {"id": 1, "name": "cat", "supercategory": "animal"},
        {"id": 2, "name": "dog", "supercategory": "animal"},
        {"id": 3, "name": "car"},
        {"id": 4, "name": "bus"},
    ]
    results = detections((0, 0.9, *wrong), (0, 0.5, 0, 16))
    found = error_gains(dataset, results)
    assert found[1].tolist() == pytest.approx(gains)
    assert not found[2].any()
    assert np.isnan(found[4]).all()
    assert np.isnan(error_gains(dataset, results, image_ids=[1])[1]).all()
    crowd = {"image_id": 0, "category_id": 1, "iscrowd": 1, "segmentation": strip(0, WIDTH)}
    dataset["annotations"].append(crowd)
    assert not error_gains(dataset, results)[1].any()
    assert not error_gains(dataset, results[:1])[1].any()  # none is left


def oracle(dataset, results, category, threshold, rule):
    """The rules word by word: every pair of masks, one detection at a time."""

    def pixels(entry):
        return coco_mask.decode(entry["segmentation"]).astype(bool)

    objects = [a for a in dataset["annotations"] if a["category_id"] == category]
    taken = [False] * len(objects)
    flags = []
    mine = [r for r in results if r["category_id"] == category]
    for result in sorted(mine, key=lambda r: (-r["score"], r["image_id"])):
        mask, best, chosen, inside = pixels(result), -1.0, None, 0.0
        for index, entry in enumerate(objects):
            if entry["image_id"] != result["image_id"]:
                continue
            other = pixels(entry)
            if entry["iscrowd"]:
                inside = max(inside, (mask & other).sum() / max(mask.sum(), 1))
                continue
            if rule == "sds" and taken[index]:
                continue
            overlap = (mask & other).sum() / max((mask | other).sum(), 1)
            if overlap > best:
                best, chosen = overlap, index
        enough = (lambda v: v >= threshold) if rule == "voc" else (lambda v: v > threshold)
        if chosen is not None and enough(best) and not taken[chosen]:
            taken[chosen] = True
            flags.append(1)
        elif not enough(inside):
            flags.append(0)
    positives = sum(not entry["iscrowd"] for entry in objects)
    if not positives:
        return math.nan
    recall, precision = curve(flags, positives)
    if rule == "sds":
        points = np.concatenate(([0], recall, [1]))
        heights = np.concatenate(([0], precision, [0]))
        return sum((points[i] - points[i - 1]) * heights[i:].max() for i in range(1, len(points)))
    levels = np.arange(0.0, 1.1, 0.1)
    return sum(precision[recall >= level].max(initial=0) for level in levels[:11]) / 11


@pytest.mark.parametrize("seed", range(3))
def test_plain_loops_agree(make, seed):
    """Overlapping objects, crowds, doubles and ties."""
    dataset = make.dataset(seed, images=6)
    results = make.results(dataset, seed + 10)
    if seed == 2:
        results.reverse()
    found = region_average_precision(dataset, results)
    for category in (3, 7, 8):
        for rule in ("voc", "sds"):
            wanted = [oracle(dataset, results, category, t, rule) for t in THRESHOLDS]
            np.testing.assert_allclose(found[rule][category], wanted, atol=1e-12)
    assert 0 < found["voc"][3][0] < 1


@pytest.fixture
def name(tmp_path, dataset, register_dataset):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(dataset))
    return register_dataset(path, "sbd")


def run(evaluator, model, images, mask_output="rle"):
    model.mask_output = mask_output
    evaluator.reset()
    for image in images:
        batch = [{"image_id": image["id"], "height": image["height"], "width": image["width"]}]
        evaluator.process(batch, model(batch))
    return evaluator.evaluate()


def test_perfect_predictions_score_100(make, name, dataset, perfect, caplog):
    """At every threshold, by both rules, in any order; a class without objects does not count."""
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    scores = run(build_evaluator(cfg, name, {}, None), make.oracle(perfect), dataset["images"])
    assert list(scores) == ["bbox", "segm", "map_r"]
    means = {key: value for key, value in scores["map_r"].items() if "mAP" in key}
    assert set(means) == {f"{rule}mAP{f}" for rule in ("", "voc_", "sds_")
                          for f in ("50", "70", "vol")}  # fmt: skip
    assert list(means.values()) == pytest.approx([100] * 9)
    assert scores["map_r"]["AP-disc"] == scores["map_r"]["AP70-bar"] == pytest.approx(100)
    assert math.isnan(scores["map_r"]["AP-ghost"])
    turned = {i: (m[::-1].copy(), c[::-1], s[::-1]) for i, (m, c, s) in perfect.items()}
    again = run(InstSegSBDEvaluator(name), make.oracle(turned), dataset["images"], "bool")
    assert str(again["map_r"]) == str(scores["map_r"])
    tables = metric_table(scores).split("\n\n")
    assert len(tables) == 2
    assert "mAPvol" in tables[1]
    assert class_table(scores).count("map_r") == 3


def test_without_predictions_it_is_zero(make, name, dataset, perfect):
    empty = {i: (m[:0], [], []) for i, (m, _, _) in perfect.items()}
    for form in ("bool", "rle"):
        scores = run(InstSegSBDEvaluator(name), make.oracle(empty), dataset["images"], form)
        assert scores["map_r"]["mAP50"] == scores["map_r"]["sds_mAPvol"] == 0.0


def noisy(perfect):
    rng = np.random.default_rng(3)
    return {
        i: (m & (rng.random(m.shape) < 0.68), c, rng.integers(1, 4, len(c)) / 4)
        for i, (m, c, _) in perfect.items()
    }


def test_any_coco_set_on_request(make, tmp_path, name, dataset, perfect, register_dataset):
    """With the headline of the rule that the method asks for, and without changing COCO's part."""
    path = tmp_path / "annotations.json"
    coco = register_dataset(path)
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    model = make.oracle(noisy(perfect))
    plain = run(build_evaluator(cfg, coco, {}, None), model, dataset["images"])
    assert list(plain) == ["bbox", "segm"]
    cfg.INSTSEG.MAP_R = True
    scores = {
        rule: run(build_evaluator(cfg, coco, {"map_r_rule": rule}, None), model, dataset["images"])
        for rule in ("voc", "sds")
    }
    for rule, found in scores.items():
        assert all(str(found[task]) == str(plain[task]) for task in plain)
        for figure in ("mAP50", "mAP70", "mAPvol"):
            assert found["map_r"][figure] == found["map_r"][f"{rule}_{figure}"]
        assert found["map_r"]["mAP50"] == pytest.approx(
            np.mean([found["map_r"][f"AP-{c}"] for c in ("disc", "bar")])
        )
    assert 0 < scores["voc"]["map_r"]["mAP70"] < scores["voc"]["map_r"]["mAP50"] <= 100
    assert scores["voc"]["map_r"]["mAPvol"] != scores["sds"]["map_r"]["mAPvol"]
    cfg.INSTSEG.MAP_R_ERRORS = True
    for index, (masks, classes, _) in perfect.items():
        thin = masks & (np.indices(masks.shape)[2] % 3 == 0)
        ranks = [0.5] * len(classes) + [0.9] * len(classes)
        perfect[index] = (np.concatenate([masks, thin]), classes * 2, ranks)
    model = make.oracle(perfect)
    found = run(build_evaluator(cfg, coco, {}, None), model, dataset["images"])["map_r"]
    assert found["gain_localisation"] > 0 == found["gain_similar"]
    assert found["gain_localisation-disc"] > 0
    with pytest.raises(ValueError, match="rules voc and sds, not 'coco'"):
        InstSegSBDEvaluator(coco, rule="coco")


def test_two_processes_and_part_of_the_images(make, name, dataset, perfect, monkeypatch):
    """Two ranks give the numbers of one in spite of ties; images left out may be left alone."""
    answers = noisy(perfect)
    alone = run(InstSegSBDEvaluator(name), make.oracle(answers), dataset["images"])
    part = dataset["images"][:4]
    seen = run(InstSegSBDEvaluator(name, seen_images_only=True), make.oracle(perfect), part)
    assert seen["map_r"]["mAPvol"] == pytest.approx(100)
    ranks = []
    for share in (dataset["images"][::2], dataset["images"][1::2]):
        evaluator = InstSegSBDEvaluator(name)
        monkeypatch.setattr(evaluator_module.comm, "is_main_process", lambda: False)
        assert run(evaluator, make.oracle(answers), share) == {}
        ranks.append(evaluator)
    records = [evaluator._records for evaluator in ranks[::-1]]
    monkeypatch.setattr(evaluator_module.comm, "is_main_process", lambda: True)
    monkeypatch.setattr(evaluator_module.comm, "gather", lambda _mine, dst: records)
    assert str(ranks[0].evaluate()) == str(alone)
