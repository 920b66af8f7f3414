"""Recall of proposals: that of COCOeval without categories, whatever the form of the input."""

import contextlib
import copy
import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import instseg_ext
from instseg_ext.evaluation import InstSegCOCOEvaluator, ProposalEvaluator, build_evaluator
from instseg_ext.evaluation.proposal_recall import (
    AREAS,
    IOU_THRESHOLDS,
    RecallTable,
    counted_objects,
    match_ranks,
)
from instseg_ext.layers.mask_ops import RLEList

COUNTS = [10, 100, 1000]


@pytest.fixture
def name(tmp_path, dataset, register_dataset):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(dataset))
    return register_dataset(path)


def official(dataset, results, iou_type):
    """AR of COCOeval with ``useCats`` 0, read from its array (area, count)."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy({"info": {}, **dataset})
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), iou_type)
        run.params.useCats, run.params.maxDets = 0, COUNTS
        run.evaluate()
        run.accumulate()
    recall = run.eval["recall"][:, 0]
    return np.where(recall > -1, 100 * recall, math.nan).mean(axis=0)


def noisy_proposals(dataset, seed=0, per_object=40):
    """Many proposals around each object, some elsewhere, their scores tied."""
    rng = np.random.default_rng(seed)
    results = []
    for annotation in dataset["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        for _ in range(int(rng.integers(0, per_object))):
            moved = np.roll(mask, rng.integers(-6, 7, size=2), axis=(0, 1))
            moved &= rng.random(moved.shape) < rng.choice([1.0, 0.97, 0.8])
            rle = coco_mask.encode(np.asfortranarray(moved.astype(np.uint8)))
            rle["counts"] = rle["counts"].decode("ascii")
            score = float(np.float32(round(float(rng.random()), 2)))
            results.append(
                {"image_id": annotation["image_id"], "segmentation": rle, "score": score}
            )
    return [{**r, "category_id": 3} for r in results]


def outputs_of(dataset, results, form="rle", boxes=False):
    """One pair of input and output for each image that has a result."""
    for image in dataset["images"]:
        mine = [r for r in results if r["image_id"] == image["id"]]
        size = (image["height"], image["width"])
        found = Instances(size, scores=torch.tensor([r["score"] for r in mine]))
        rles = [r["segmentation"] for r in mine]
        if boxes:
            xywh = torch.from_numpy(np.asarray(coco_mask.toBbox(rles)).reshape(-1, 4)).float()
            corners = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
            found.pred_boxes = Boxes(corners)
        if form == "rle":
            found.pred_masks_rle = RLEList(rles)
        elif form == "bool":
            masks = [coco_mask.decode(rle).astype(bool) for rle in rles]
            found.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, *size))
        if mine:
            yield [{"image_id": image["id"]}], [{"instances": found}]


def run(evaluator, pairs):
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


@pytest.mark.parametrize("seed", range(3))
def test_recall_equals_pycocotools(make, tmp_path, register_dataset, seed):
    """Sheet deepmask 5.5: useCats 0, 10, 100 and 1000 proposals; crowds and an empty image."""
    dataset = make.dataset(seed, images=6)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(dataset))
    results = noisy_proposals(dataset, seed)
    assert any(a["iscrowd"] for a in dataset["annotations"])
    evaluator = ProposalEvaluator(register_dataset(path))
    scores = run(evaluator, outputs_of(dataset, results))["proposals"]
    for kind in ("segm", "bbox"):
        expected = official(dataset, results, kind)
        for column, count in enumerate(COUNTS):
            assert scores[f"{kind}_AR@{count}"] == pytest.approx(expected[0, column], abs=1e-9)
        for row, area in enumerate(AREAS):
            found = scores[f"{kind}_AR{area}@100"]
            assert found == pytest.approx(expected[row, 1], abs=1e-9, nan_ok=True)
    assert 0 < scores["segm_AR@10"] < scores["segm_AR@100"] < 99


def test_objects_as_proposals_are_all_found(name, dataset):
    """Check 13: AR is 100 for masks and boxes; crowds are not asked for."""
    results = [
        {"image_id": a["image_id"], "segmentation": a["segmentation"], "score": 0.5}
        for a in dataset["annotations"]
        if not a["iscrowd"]
    ]
    scores = run(ProposalEvaluator(name), outputs_of(dataset, results))["proposals"]
    for kind in ("segm", "bbox"):
        assert [scores[f"{kind}_AR@{count}"] for count in COUNTS] == [pytest.approx(100)] * 3
        assert scores[f"{kind}_ARs@100"] == pytest.approx(100)


def test_the_form_of_the_masks_does_not_matter(name, dataset):
    results = noisy_proposals(dataset, per_object=8)
    forms = ({"form": "rle"}, {"form": "bool"}, {"form": "rle", "boxes": True})
    first, *others = (
        run(ProposalEvaluator(name), outputs_of(dataset, results, **form)) for form in forms
    )
    assert all(str(other) == str(first) for other in others)
    boxes = run(ProposalEvaluator(name), outputs_of(dataset, results, form="", boxes=True))
    assert "segm_AR@100" not in boxes["proposals"]
    assert boxes["proposals"]["bbox_AUC"] == first["proposals"]["bbox_AUC"]


def test_two_processes_give_the_figures_of_one(name, dataset, monkeypatch):
    pairs = list(outputs_of(dataset, noisy_proposals(dataset, per_object=8)))
    alone = run(ProposalEvaluator(name), pairs)
    parts = []
    for rank in range(2):
        evaluator = ProposalEvaluator(name)
        for inputs, outputs in pairs[rank::2]:
            evaluator.process(inputs, outputs)
        parts.append(evaluator)
    monkeypatch.setattr(comm, "gather", lambda data, dst: [part._found for part in parts])
    assert str(parts[0].evaluate()) == str(alone)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert parts[1].evaluate() == {}


def test_images_without_proposals_count(name, dataset, caplog):
    """What was not processed counts as missed, unless a part of the set is judged."""
    results = noisy_proposals(dataset, per_object=8)
    first = [next(outputs_of(dataset, results))]
    with caplog.at_level(logging.WARNING):
        whole = run(ProposalEvaluator(name), first)["proposals"]
    assert "7 of 8 images" in caplog.text
    part = run(ProposalEvaluator(name, seen_images_only=True), first)["proposals"]
    assert 0 < whole["segm_AR@100"] < part["segm_AR@100"]
    nothing = run(ProposalEvaluator(name), [])["proposals"]
    assert nothing["segm_AR@1000"] == nothing["bbox_AUC"] == 0


def test_scores_that_are_no_numbers_find_nothing(name, dataset, caplog):
    results = [{**r, "score": math.nan} for r in noisy_proposals(dataset, per_object=4)]
    scores = run(ProposalEvaluator(name), outputs_of(dataset, results))["proposals"]
    assert scores["segm_AR@1000"] == 0
    assert "without a finite score" in caplog.text


def test_input_that_makes_no_sense_is_named(name, dataset):
    empty = Instances((4, 4), scores=torch.zeros(1))
    with pytest.raises(ValueError, match="Image 100: proposals have neither"):
        ProposalEvaluator(name).process([{"image_id": 100}], [{"instances": empty}])
    with pytest.raises(ValueError, match="Image id 5 is not in the ground truth"):
        ProposalEvaluator(name).process([{"image_id": 5}], [{"instances": empty}])


def test_equal_overlaps_take_the_last_object():
    """The second proposal, which overlaps the first object alone, finds it nevertheless."""
    iou = np.array([[0.6, 0.6], [0.7, 0.0], [0.9, 0.9]])
    counted = counted_objects([5.0, 5.0], [False, False])
    ranks = match_ranks(iou, counted)
    assert ranks.shape == (4, 10, 2)
    assert ranks[0, 0].tolist() == [1, 0]
    assert ranks[0, -1].tolist() == [-1, -1]
    assert ranks[0, int(np.searchsorted(IOU_THRESHOLDS, 0.8))].tolist() == [-1, 2]
    assert (ranks[2:] == -1).all()  # neither medium nor large


def test_auc_is_the_mean_height_over_the_logarithm():
    """Recall that grows with the logarithm from 0 at one proposal to 1 at 1000 has an AUC of 1/2.

    Objects found at the first proposal give 1, at the last nearly 0.
    """
    counted = counted_objects([5.0], [False])

    def auc(ranks):
        images = [(np.full((4, 10, 1), rank, dtype=np.int32), counted) for rank in ranks]
        return RecallTable(images, 1000).area_under_curve()

    assert auc([0]) == pytest.approx(1)
    assert 0 < auc([999]) < 1e-3
    spread = np.exp(np.linspace(0, np.log(1000), 4001)).astype(int) - 1
    assert auc(spread) == pytest.approx(0.5, abs=0.06)
    none = RecallTable([], 1000)
    assert math.isnan(none.average_recall("", 10))


def test_who_is_judged_by_recall(make, tmp_path, name, dataset, register_dataset):
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    results = noisy_proposals(dataset, per_object=4)
    pairs = list(outputs_of(dataset, results, boxes=True))
    for _, (output,) in pairs:
        found = output["instances"]
        found.pred_classes = torch.zeros(len(found), dtype=torch.int64)
    # A model without classes, on a set with three and on a set with one.
    assert isinstance(build_evaluator(cfg, name, {"proposals": True}, None), ProposalEvaluator)
    single = copy.deepcopy(dataset)
    single["categories"] = single["categories"][:1]
    for annotation in single["annotations"]:
        annotation["category_id"] = single["categories"][0]["id"]
    path = tmp_path / "single.json"
    path.write_text(json.dumps(single))
    both = build_evaluator(cfg, register_dataset(path), {"proposals": True}, None)
    assert both.accepts_rle
    assert list(run(both, pairs)) == ["bbox", "segm", "proposals"]
    # Any model, on request.
    assert isinstance(build_evaluator(cfg, name, {}, None), InstSegCOCOEvaluator)
    cfg.INSTSEG.PROPOSAL_RECALL = True
    assert list(run(build_evaluator(cfg, name, {}, None), pairs)) == ["bbox", "segm", "proposals"]
    maps = register_dataset(path, "sem_seg")
    with pytest.raises(ValueError, match="label maps, in which there is no object to propose"):
        build_evaluator(cfg, maps, {"proposals": True}, None)
