"""The predictor agrees with ``DefaultPredictor`` and with evaluation; names and thresholds."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor

from instseg_ext import data, evaluation
from instseg_ext.engine.predictor import Predictor, class_names, lower_thresholds
from instseg_ext.structures.rle import decode_masks


@pytest.fixture
def registered(blob_cfg, tmp_path, picture):
    noise = np.random.default_rng(0).integers(0, 40, (60, 90, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "im.png"), picture() + noise // 8)
    content = {
        "images": [{"id": 1, "file_name": "im.png", "height": 60, "width": 90}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 2, "iscrowd": 0, "area": 400,
             "bbox": [5, 10, 40, 10], "segmentation": [[5, 10, 45, 10, 45, 20, 5, 20]]}
        ],
        "categories": [{"id": 1, "name": "tall"}, {"id": 2, "name": "wide"}],
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(content))
    name = f"predictor_{tmp_path.name}"
    data.register(name, tmp_path / "truth.json", tmp_path)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    data.registration._REGISTERED.pop(name)


@pytest.mark.parametrize(("side", "order"), [(0, "BGR"), (96, "RGB")])
def test_default_predictor_predictor_and_evaluation_agree(
    blob_cfg, blob_method, registered, tmp_path, side, order
):
    blob_cfg.DATASETS.TEST = (registered,)
    blob_cfg.DATALOADER.NUM_WORKERS = 0
    blob_cfg.INPUT.MIN_SIZE_TEST = side
    blob_cfg.INPUT.FORMAT = order
    blob_cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.2
    image = cv2.imread(str(tmp_path / "im.png"))
    plain = DefaultPredictor(blob_cfg)(image)["instances"]
    ours = Predictor(blob_cfg, blob_method, threshold=0.2)
    found = ours(image)
    scores = evaluation.evaluate(blob_cfg, ours.model, blob_method)
    path = tmp_path / "out/inference" / registered / "coco_instances_results.json"
    results = json.loads(path.read_text())
    assert len(plain) == len(found) == len(results) == 2
    assert torch.equal(plain.scores, found.scores)
    assert torch.equal(plain.pred_boxes.tensor, found.pred_boxes.tensor)
    assert torch.equal(plain.pred_classes, found.pred_classes)
    assert np.array_equal(plain.pred_masks.numpy(), decode_masks(found.pred_masks_rle))
    assert [r["segmentation"] for r in results] == list(found.pred_masks_rle)
    assert [r["score"] for r in results] == pytest.approx(found.scores.tolist(), abs=1e-6)
    assert scores[registered]["segm"]["AP-wide"] > 80


def test_bool_masks_and_batches(blob_cfg, blob_method, picture):
    predictor = Predictor(blob_cfg, blob_method, threshold=0.3, mask_output="bool")
    first, second = predictor.predict([picture(), picture(shift=9)])
    assert first.pred_masks.dtype == torch.bool
    assert first.pred_masks.shape == (2, 60, 90)
    assert second.pred_boxes.tensor[0].tolist() == [14, 10, 54, 20]
    assert predictor.model.mask_output == "bool"


def test_thresholds_are_lowered_never_raised(blob_cfg, blob_method):
    assert lower_thresholds(blob_cfg, blob_method, 0.7) == []
    assert blob_cfg.MODEL.RETINANET.SCORE_THRESH_TEST == 0.5
    assert lower_thresholds(blob_cfg, blob_method, 0) == list(blob_method.score_threshold_keys)
    assert blob_cfg.MODEL.RETINANET.SCORE_THRESH_TEST == 0.0


def test_class_names_in_order_of_trust(blob_cfg, registered, tmp_path):
    assert class_names(blob_cfg) == ["tall", "wide"]
    blob_cfg.INSTSEG.CLASS_NAMES = []
    assert class_names(blob_cfg) == []
    blob_cfg.DATASETS.TEST = ("no_such_data_set", registered)
    assert class_names(blob_cfg) == ["tall", "wide"]
    content = torch.load(blob_cfg.MODEL.WEIGHTS)
    content["instseg_ext"] = {"class_names": ["a", "b"], "config": ""}
    blob_cfg.MODEL.WEIGHTS = str(tmp_path / "named.pth")
    torch.save(content, blob_cfg.MODEL.WEIGHTS)
    assert class_names(blob_cfg) == ["a", "b"]


def test_random_weights_are_admitted(blob_cfg, blob_method, caplog):
    blob_cfg.MODEL.WEIGHTS = ""
    Predictor(blob_cfg, blob_method)
    assert "random weights" in caplog.text


def test_without_a_threshold_the_config_rules(blob_cfg, blob_method, picture):
    assert len(Predictor(blob_cfg, blob_method)(picture())) == 1
    assert len(Predictor(blob_cfg, blob_method, threshold=0.0)(picture())) == 2
