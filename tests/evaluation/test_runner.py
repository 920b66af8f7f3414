"""``evaluate``: one pass, its timing, its files, its respect for the state of the model."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from instseg_ext import data, evaluation
from instseg_ext.config import add_shared_config
from instseg_ext.evaluation import STAGES, StageTimer, runner
from instseg_ext.evaluation.report import archive_results, null_for_nan, write_json
from instseg_ext.method import Method

METHOD = Method(name="oracle", add_config=lambda cfg: None)


@pytest.fixture
def cfg(tmp_path, dataset):
    for image in dataset["images"]:
        grey = np.zeros((image["height"], image["width"], 3), dtype=np.uint8)
        assert cv2.imwrite(str(tmp_path / image["file_name"]), grey)
    (tmp_path / "a.json").write_text(json.dumps(dataset))
    cfg = get_cfg()
    add_shared_config(cfg)
    data.add_data_config(cfg)
    names = (f"runner_one_{tmp_path.name}", f"runner_two_{tmp_path.name}")
    for name in names:
        data.register(name, tmp_path / "a.json", tmp_path)
    cfg.DATASETS.TEST = names
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.MODEL.WEIGHTS = "some/where.pth"
    cfg.INSTSEG.CONFIG = "Toy/toy"
    yield cfg
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        data.registration._REGISTERED.pop(name)


def test_evaluate_writes_scores_and_speed(make, cfg, perfect, tmp_path, caplog):
    model = make.oracle(perfect).train()
    with caplog.at_level("INFO"):
        results = evaluation.evaluate(cfg, model, METHOD, iteration=7)
    assert list(results) == list(cfg.DATASETS.TEST)
    for name in cfg.DATASETS.TEST:
        assert results[name]["segm"]["AP"] == pytest.approx(100)
        assert (tmp_path / "out/inference" / name / "coco_instances_results.json").is_file()
    text = (tmp_path / "out/results.json").read_text()
    assert "NaN" not in text
    written = json.loads(text)
    assert written["weights"] == "some/where.pth"
    assert written["config"] == "Toy/toy"
    first = written["datasets"][cfg.DATASETS.TEST[0]]
    assert first["segm"]["AP50"] == pytest.approx(100)
    assert first["segm"]["AP-ghost"] is None
    speed = written["speed"]
    assert set(speed["median_ms"]) == set(speed["p95_ms"]) == set(STAGES)
    assert speed["device"] == "cpu"
    assert speed["threads"] == torch.get_num_threads()
    assert speed["images_per_s"] > 0
    assert speed["peak_memory_mb"] > 50
    for words in ("| segm", "APs", "ghost", "backbone", "images/s"):
        assert words in caplog.text
    # run-length masks, no gradients, evaluation mode; and everything as it was afterwards
    assert set(model.asked) == {("rle", False, False)}
    assert model.training
    assert model.mask_output == "bool"
    assert not model.head._forward_hooks


def test_limit_judges_the_first_images(make, cfg, perfect):
    cfg.DATASETS.TEST = cfg.DATASETS.TEST[:1]
    model = make.oracle(perfect)
    results = evaluation.evaluate(cfg, model, METHOD, limit=3)
    assert len(model.asked) == 3
    assert results[cfg.DATASETS.TEST[0]]["segm"]["AP"] == pytest.approx(100)


def test_method_may_bring_its_own_mapper(make, cfg, perfect):
    cfg.DATASETS.TEST = cfg.DATASETS.TEST[:1]
    seen = []

    def build(_cfg, is_train):
        def mapper(entry):
            seen.append((entry["image_id"], is_train))
            return {**entry, "image": torch.zeros(3, 8, 8)}

        return mapper

    method = Method(name="oracle", add_config=lambda cfg: None, build_mapper=build)
    evaluation.evaluate(cfg, make.oracle(perfect), method)
    assert seen == [(image_id, False) for image_id in perfect]


def test_earlier_results_move_away(make, cfg, perfect, tmp_path):
    cfg.DATASETS.TEST = cfg.DATASETS.TEST[:1]
    for iteration in (10, 20, None, None, None):
        evaluation.evaluate(cfg, make.oracle(perfect), METHOD, limit=2, iteration=iteration)
    moved = {p.name: json.loads(p.read_text()) for p in (tmp_path / "out/results").iterdir()}
    assert set(moved) == {"10.json", "20.json", "eval.json", "eval_2.json"}
    assert moved["10.json"]["iteration"] == 10


def test_no_test_set_is_an_error(make, cfg, perfect):
    cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is empty"):
        evaluation.evaluate(cfg, make.oracle(perfect), METHOD)


def test_state_is_restored_after_an_error(make, perfect):
    model = make.oracle(perfect).train()
    with pytest.raises(KeyError), runner.inference_mode(model, "rle"):
        raise KeyError
    assert (model.training, model.mask_output, torch.is_grad_enabled()) == (True, "bool", True)


class _Clock:
    """A clock that only the parts below move."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


class _Part(nn.Module):
    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x):
        self.clock.time += self.seconds
        return x


@pytest.mark.parametrize("two_stage", [False, True])
def test_stages_are_told_apart(monkeypatch, two_stage):
    clock = _Clock()
    timer = StageTimer("cpu", warmup=1)
    monkeypatch.setattr(timer, "now", clock)
    model = nn.Module()
    model.backbone = _Part(clock, 0.020)
    if two_stage:
        model.proposal_generator, model.roi_heads = _Part(clock, 0.010), _Part(clock, 0.030)
        heads = [model.proposal_generator, model.roi_heads]
    else:
        model.head = _Part(clock, 0.040)
        heads = [model.head]
    with timer.attached(model):
        timer.start()
        for batch in range(4):
            clock.time += 0.003 * (100 if batch == 0 else 1)  # loading; the first one is slow
            timer.loaded()
            clock.time += 0.002  # normalisation
            for module in (model.backbone, *heads):
                module(torch.zeros(1))
            clock.time += 0.005 * (batch + 1)
            timer.finish(2)
            clock.time += 1.0  # the evaluator does not count
            timer.start()
    summary = timer.summary()
    expected = {"data": 5, "backbone": 20, "head": 40, "post": 15, "total": 80}
    assert summary["median_ms"] == pytest.approx(expected)
    assert summary["p95_ms"]["post"] == pytest.approx(19.5)
    assert summary["images_per_s"] == pytest.approx(6 / 0.240)


def test_a_single_batch_is_its_own_measurement(monkeypatch):
    clock = _Clock()
    timer = StageTimer("cpu", warmup=3)
    monkeypatch.setattr(timer, "now", clock)
    assert np.isnan(timer.summary()["images_per_s"])
    timer.start()
    clock.time += 0.5
    timer.finish(1)
    assert timer.summary()["median_ms"]["total"] == pytest.approx(500)
    assert timer.summary()["median_ms"]["backbone"] == 0.0


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert archive_results(tmp_path) is None
    assert null_for_nan({"a": [np.float32("inf"), np.int64(3)], 1: (0.5,)}) == {
        "a": [None, 3],
        "1": [0.5],
    }
