"""The evaluator: forms of masks, class ids, ranking fields, processes, files."""

import copy
import importlib
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    SemSegEvaluator,
)
from detectron2.structures import Boxes, Instances

import instseg_ext
from instseg_ext.evaluation import InstSegCOCOEvaluator, build_evaluator, instances_to_results
from instseg_ext.evaluation import coco as evaluator_module
from instseg_ext.evaluation.report import class_table, metric_table


@pytest.fixture
def name(tmp_path, dataset, register_dataset):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(dataset))
    return register_dataset(path)


def run(evaluator, model, dataset, mask_output="bool", images=None):
    model.mask_output = mask_output
    evaluator.reset()
    for image in dataset["images"] if images is None else images:
        batch = [{"image_id": image["id"], "height": image["height"], "width": image["width"]}]
        evaluator.process(batch, model(batch))
    return evaluator.evaluate()


def test_perfect_predictions_score_100(make, name, dataset, perfect):
    scores = run(InstSegCOCOEvaluator(name), make.oracle(perfect), dataset)
    for task in ("bbox", "segm"):
        assert scores[task]["AP"] == pytest.approx(100)
        assert scores[task]["AP-disc"] == pytest.approx(100)
        assert math.isnan(scores[task]["AP-ghost"])


def test_swapped_classes_lower_ap(make, name, dataset, perfect):
    swapped = {i: (m, [1 - c for c in classes], s) for i, (m, classes, s) in perfect.items()}
    assert run(InstSegCOCOEvaluator(name), make.oracle(swapped), dataset)["segm"]["AP"] < 30


def test_run_lengths_equal_bool_masks(make, tmp_path, name, dataset, perfect):
    rng = np.random.default_rng(0)
    for image_id, (masks, classes, _) in perfect.items():
        noisy = masks & (rng.random(masks.shape) < 0.8)
        perfect[image_id] = (noisy, classes, rng.random(len(masks)).tolist())
    files, scores = [], []
    for form in ("bool", "rle"):
        evaluator = InstSegCOCOEvaluator(name, tmp_path / form)
        scores.append(run(evaluator, make.oracle(perfect), dataset, form))
        files.append((tmp_path / form / "coco_instances_results.json").read_text())
    assert files[0] == files[1]
    assert str(scores[0]) == str(scores[1])
    assert 0 < scores[0]["segm"]["AP"] < 99
    assert not list((tmp_path / "bool").glob(".*"))


def test_result_file_holds_dataset_category_ids(make, tmp_path, name, dataset, perfect):
    run(InstSegCOCOEvaluator(name, tmp_path), make.oracle(perfect), dataset)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    wanted = [a["category_id"] for a in dataset["annotations"] if not a["iscrowd"]]
    assert sorted(r["category_id"] for r in results) == sorted(wanted)


def test_without_predictions_ap_is_zero(make, name, dataset, perfect):
    empty = {i: (m[:0], [], []) for i, (m, _, _) in perfect.items()}
    for form in ("bool", "rle"):
        scores = run(InstSegCOCOEvaluator(name), make.oracle(empty), dataset, form)
        assert scores["segm"]["AP"] == scores["bbox"]["AP"] == 0.0


def test_mask_scores_rank_masks_only(make, name, dataset, perfect):
    """Halve every mask in a low-scoring double: AP of masks falls when mask scores prefer it."""
    doubled = {}
    for image_id, (masks, classes, _) in perfect.items():
        eroded = masks & (np.indices(masks.shape)[2] % 2 == 0)
        doubled[image_id] = (
            np.concatenate([masks, eroded]),
            classes * 2,
            [0.9] * len(classes) + [0.1] * len(classes),
        )

    class Ranked(make.oracle):
        def instances(self, image):
            found = super().instances(image)
            found.mask_scores = 1 - found.scores
            return found

    plain = run(InstSegCOCOEvaluator(name), Ranked(doubled), dataset)
    ranked = run(
        InstSegCOCOEvaluator(name, segm_score_field="mask_scores"), Ranked(doubled), dataset
    )
    assert plain["segm"]["AP"] == pytest.approx(100)
    assert ranked["segm"]["AP"] < 60
    assert ranked["bbox"]["AP"] == pytest.approx(plain["bbox"]["AP"])
    with pytest.raises(KeyError, match="mask_scores"):
        run(
            InstSegCOCOEvaluator(name, segm_score_field="mask_scores"),
            make.oracle(perfect),
            dataset,
        )


def test_boundary_ap_on_request(make, name, dataset, perfect, monkeypatch):
    """Its own row; the same detections; no row for a model without masks."""
    for image_id, (masks, classes, scores) in perfect.items():
        perfect[image_id] = (np.roll(masks, 2, axis=2), classes, scores)
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    cfg.INSTSEG.BOUNDARY_AP = True
    plain = run(InstSegCOCOEvaluator(name), make.oracle(perfect), dataset)
    scores = run(build_evaluator(cfg, name, {}, None), make.oracle(perfect), dataset)
    assert list(scores) == ["bbox", "segm", "boundary"]
    assert all(str(scores[task]) == str(plain[task]) for task in plain)
    assert 0 < scores["boundary"]["AP"] < scores["segm"]["AP"]
    assert 0 < scores["boundary"]["AP-disc"] < 100
    assert metric_table(scores).count("| boundary") == 1
    assert class_table(scores).count("| boundary") == 3  # one for each class
    evaluator = build_evaluator(cfg, name, {}, None)
    found = _instances(pred_boxes=Boxes(torch.ones(1, 4)), scores=torch.ones(1),
                       pred_classes=torch.zeros(1, dtype=torch.int64))  # fmt: skip
    evaluator.process([{"image_id": 100}], [{"instances": found}])
    assert list(evaluator.evaluate()) == ["bbox"]
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"INSTSEG\.BOUNDARY_AP needs .*pip install"):
        build_evaluator(cfg, name, {}, None)


def test_two_processes_equal_one(make, name, dataset, perfect, monkeypatch):
    """Gathering from two ranks gives the numbers of one, in spite of tied scores."""
    rng = np.random.default_rng(1)
    for image_id, (masks, classes, scores) in perfect.items():
        perfect[image_id] = (masks & (rng.random(masks.shape) < 0.75), classes, scores)
    alone = run(InstSegCOCOEvaluator(name), make.oracle(perfect), dataset)
    ranks = []
    for share in (dataset["images"][::2], dataset["images"][1::2]):
        evaluator = InstSegCOCOEvaluator(name)
        monkeypatch.setattr(evaluator_module.comm, "is_main_process", lambda: False)
        assert run(evaluator, make.oracle(perfect), dataset, images=share) == {}
        ranks.append(evaluator)
    records = [evaluator._records for evaluator in ranks[::-1]]
    monkeypatch.setattr(evaluator_module.comm, "is_main_process", lambda: True)
    monkeypatch.setattr(evaluator_module.comm, "gather", lambda _mine, dst: records)
    assert str(ranks[0].evaluate()) == str(alone)


def test_images_left_out_count_as_missed_unless_told(make, name, dataset, perfect, caplog):
    part = dataset["images"][:4]
    with caplog.at_level(logging.WARNING):
        whole = run(InstSegCOCOEvaluator(name), make.oracle(perfect), dataset, images=part)
    assert "4 of 8 images" in caplog.text
    assert whole["segm"]["AP"] < 90
    seen = InstSegCOCOEvaluator(name, seen_images_only=True)
    assert run(seen, make.oracle(perfect), dataset, images=part)["segm"]["AP"] == pytest.approx(100)


def test_annotations_may_be_secret_or_without_masks(
    make, tmp_path, dataset, perfect, register_dataset
):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({k: v for k, v in dataset.items() if k != "annotations"}))
    evaluator = InstSegCOCOEvaluator(register_dataset(secret), tmp_path)
    assert run(evaluator, make.oracle(perfect), dataset) == {}
    assert (tmp_path / "coco_instances_results.json").is_file()
    boxes = copy.deepcopy(dataset)
    for annotation in boxes["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    name = register_dataset(tmp_path / "boxes.json")
    scores = run(InstSegCOCOEvaluator(name), make.oracle(perfect), dataset)
    assert list(scores) == ["bbox"]


def _instances(**fields):
    found = Instances((8, 8))
    for key, value in fields.items():
        found.set(key, value)
    return found


def test_odd_instances():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 1:7] = True
    good = {"scores": torch.tensor([0.5, float("nan")]), "pred_classes": torch.tensor([0, 0])}
    results = instances_to_results(_instances(pred_masks=masks, **good), 4, [11])
    assert [r["bbox"] for r in results] == [[1, 2, 6, 3]]  # from the mask; the NaN score is gone
    assert results[0]["category_id"] == 11
    scored = {**good, "scores": torch.tensor([0.5, 0.4]), "rank": torch.tensor([float("nan"), 0.3])}
    results = instances_to_results(_instances(pred_masks=masks, **scored), 4, [11], "rank")
    assert [r["mask_score"] for r in results] == pytest.approx([0.3])
    half = {"scores": torch.tensor([0.5]).bfloat16(), "pred_classes": torch.tensor([0])}
    boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
    keypoints = torch.tensor([[[1.5, 2.5, 2.0]]])
    found = _instances(pred_boxes=boxes, pred_keypoints=keypoints, **half)
    assert instances_to_results(found, 4, [11])[0] == {
        "image_id": 4, "category_id": 11, "score": 0.5, "bbox": [1, 2, 2, 3], "keypoints": [1, 2, 2]
    }  # fmt: skip
    with pytest.raises(ValueError, match="Image 4: predicted class 0 but the data set has 0"):
        instances_to_results(found, 4, [])
    with pytest.raises(ValueError, match="neither"):
        instances_to_results(_instances(**half), 4, [11])


def test_evaluator_is_chosen_by_metadata(name, tmp_path, register_dataset, monkeypatch):
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    assert isinstance(build_evaluator(cfg, name, {}, None), InstSegCOCOEvaluator)
    for kind, message in {
        "panoramas": r"evaluator type 'panoramas', known are .*coco.*lvis",
        None: r"evaluator type None.*evaluator_type",
    }.items():
        odd = register_dataset(tmp_path / "annotations.json", kind)
        with pytest.raises(ValueError, match=message):
            build_evaluator(cfg, odd, {}, None)
    for kind, package in {"lvis": "lvis", "cityscapes_sem_seg": "cityscapesScripts"}.items():
        monkeypatch.setitem(sys.modules, package.lower(), None)
        odd = register_dataset(tmp_path / "annotations.json", kind)
        with pytest.raises(ImportError, match=f"{odd}.*{package}"):
            build_evaluator(cfg, odd, {}, None)


def test_semantic_and_panoptic_sets(name, tmp_path, register_dataset, caplog):
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    semantic = register_dataset(tmp_path / "annotations.json", "sem_seg")
    MetadataCatalog.get(semantic).set(stuff_classes=["a", "b"], ignore_label=255)
    assert isinstance(build_evaluator(cfg, semantic, {}, None), SemSegEvaluator)
    assert "BOUNDARY_AP" not in caplog.text
    cfg.INSTSEG.BOUNDARY_AP = True
    build_evaluator(cfg, semantic, {}, None)
    assert f"BOUNDARY_AP has no effect on {semantic}" in caplog.text
    panoptic = register_dataset(tmp_path / "annotations.json", "coco_panoptic_seg")
    assert isinstance(build_evaluator(cfg, panoptic, {}, None), InstSegCOCOEvaluator)
    assert "only its instances" in caplog.text


@pytest.fixture
def cityscapes_scripts(tmp_path, monkeypatch):
    """Empty modules where the package has its scripts."""
    for folder, modules in {
        "evaluation": (
            "evalInstanceLevelSemanticLabeling",
            "evalPixelLevelSemanticLabeling",
        ),
        "helpers": ("labels",),
    }.items():
        path = tmp_path / "site" / "cityscapesscripts" / folder
        path.mkdir(parents=True)
        for module in ("__init__", *modules):
            (path / f"{module}.py").write_text("import numpy as np\n")
    (path.parent / "__init__.py").write_text("")
    (tmp_path / "site" / "shapely.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "site")
    before = dict(sys.modules)
    yield
    for module in set(sys.modules) - set(before):
        if module.startswith(("cityscapesscripts", "deeplearning", "shapely")):
            del sys.modules[module]


def test_cityscapes_scripts_answer_to_both_names(cityscapes_scripts, tmp_path, register_dataset):
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    for kind, wanted in {
        "cityscapes_instance": CityscapesInstanceEvaluator,
        "cityscapes_sem_seg": CityscapesSemSegEvaluator,
    }.items():
        cityscapes = register_dataset(tmp_path / "annotations.json", kind)
        assert isinstance(build_evaluator(cfg, cityscapes, {}, None), wanted)
    alias = "deeplearning.projects.cityscapesApi.cityscapesscripts"
    for module in ("helpers.labels", "evaluation.evalInstanceLevelSemanticLabeling"):
        theirs = importlib.import_module(f"cityscapesscripts.{module}")
        assert importlib.import_module(f"{alias}.{module}") is theirs


def test_pycocotools_stands_in(make, name, dataset, perfect, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with caplog.at_level(logging.INFO):
        scores = run(InstSegCOCOEvaluator(name), make.oracle(perfect), dataset)
    assert scores["segm"]["AP"] == pytest.approx(100)
    assert caplog.text.count("faster-coco-eval is not installed") == 1
