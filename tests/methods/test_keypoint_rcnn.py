"""A tiny Keypoint R-CNN from the annotation file to keypoint AP."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import keypoint_head
from PIL import Image
from torch import nn

import instseg_ext
from instseg_ext.data import build_mapper, build_test_loader, build_train_loader, registration
from instseg_ext.evaluation import build_evaluator, run_inference
from instseg_ext.evaluation.timing import StageTimer
from instseg_ext.modeling import rcnn

NAMES = ["top", "left_side", "right_side"]
TINY = """MODEL.DEVICE cpu MODEL.WEIGHTS ""
MODEL.PIXEL_STD [58.0,57.0,57.0] MODEL.RESNETS.WIDTH_PER_GROUP 8
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.FPN.OUT_CHANNELS 8
MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (8,8)
MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 3 MODEL.ROI_HEADS.NUM_CLASSES 1
MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.KEYPOINT_OKS_SIGMAS [0.1,0.1,0.1]
TEST.DETECTIONS_PER_IMAGE 5 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 2"""


@pytest.fixture
def cfg(tmp_path):
    """Two images of one square each, with its points at the top and at both sides."""
    annotations, images = [], []
    for index, (x, y) in enumerate(((10, 20), (30, 12))):
        pixels = np.full((64, 72, 3), 40, np.uint8)
        pixels[y : y + 24, x : x + 24] = 220
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 72})
        points = [x + 12, y, 2, x, y + 12, 2, x + 23, y + 12, 1]
        square = [x, y, x + 24, y, x + 24, y + 24, x, y + 24]
        annotations.append(
            {"id": index + 1, "image_id": index, "category_id": 1, "iscrowd": 0, "area": 576,
             "bbox": [x, y, 24, 24], "segmentation": [square], "keypoints": points,
             "num_keypoints": 3}
        )  # fmt: skip
    category = {"id": 1, "name": "square", "keypoints": NAMES}
    path = tmp_path / "squares.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [category]})
    )
    registration.register("keypoint_squares", path, tmp_path)
    sets = ["DATASETS.TRAIN", "('keypoint_squares',)", "DATASETS.TEST", "('keypoint_squares',)"]
    yield instseg_ext.get_config("MaskRCNN/keypoint_rcnn_R_50_FPN_1x", [*TINY.split(), *sets])
    DatasetCatalog.remove("keypoint_squares")
    MetadataCatalog.remove("keypoint_squares")
    del registration._REGISTERED["keypoint_squares"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_step(cfg, precision):
    cfg.INSTSEG.PRECISION = precision
    torch.manual_seed(0)
    model = build_model(cfg)
    last = model.roi_heads.keypoint_head.score_lowres
    nn.init.normal_(last.weight, std=1e-4)
    seen = []
    last.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    batch = next(iter(build_train_loader(cfg, build_mapper(cfg, True), seed=0)))
    losses = model(batch)
    assert set(losses) == {
        "loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_keypoint"
    }  # fmt: skip
    # a softmax over the 56 x 56 cells that knows nothing yet
    assert losses["loss_keypoint"].item() == pytest.approx(math.log(56**2), rel=1e-2)
    sum(losses.values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    assert seen == [torch.float32]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_losses_and_keypoints_equal_detectron2(cfg, memory_format):
    cfg.INSTSEG.MEMORY_FORMAT = memory_format
    plain = cfg.clone()
    plain.MODEL.META_ARCHITECTURE, plain.MODEL.ROI_HEADS.NAME = (
        "GeneralizedRCNN",
        "StandardROIHeads",
    )
    torch.manual_seed(0)
    ours, theirs = build_model(cfg), build_model(plain)
    theirs.load_state_dict(ours.state_dict())
    batch = next(iter(build_train_loader(cfg, build_mapper(cfg, True), seed=0)))
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        losses.append({name: value.item() for name, value in model(batch).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with torch.no_grad():
        found, expected = (model.eval()(batch)[0]["instances"] for model in (ours, theirs))
    assert len(found) == len(expected) == 5
    torch.testing.assert_close(found.pred_keypoints, expected.pred_keypoints, rtol=1e-3, atol=1e-2)


def test_global_normaliser_counts_what_detectron2_divides_by(cfg, monkeypatch):
    """In two equal processes nothing changes; twice as many points elsewhere shrink the loss."""
    cfg.INSTSEG.LOSS_NORMALIZER = "global"
    torch.manual_seed(0)
    model = build_model(cfg)
    batch = next(iter(build_train_loader(cfg, build_mapper(cfg, True), seed=0)))
    counts, divisors = [], []
    heads, loss = model.roi_heads, keypoint_head.keypoint_rcnn_loss
    real = heads.loss_counts
    monkeypatch.setattr(heads, "loss_counts", lambda x: counts.append(real(x)) or counts[-1])

    def spy(logits, instances, normalizer):
        whole = loss(logits, instances, normalizer=1.0)
        result = loss(logits, instances, normalizer=normalizer)
        divisors.append(float(whole.detach() / result.detach()))
        return result

    monkeypatch.setattr(keypoint_head, "keypoint_rcnn_loss", spy)
    torch.manual_seed(1)
    alone = model(batch)["loss_keypoint"].item()
    assert counts[0]["loss_keypoint"] == pytest.approx(divisors[0])
    assert counts[0]["loss_keypoint"] > 2
    monkeypatch.setattr(rcnn, "mean_over_processes", lambda value: 2 * value)
    torch.manual_seed(1)
    assert model(batch)["loss_keypoint"].item() == pytest.approx(alone / 2)
    heads.keypoint_head.loss_normalizer = 1.0  # a constant per image needs no correction
    assert "loss_keypoint" not in real([])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference_and_keypoint_ap(cfg, tmp_path, precision):
    cfg.INSTSEG.PRECISION = precision
    torch.manual_seed(0)
    model = build_model(cfg)
    loader = build_test_loader(cfg, "keypoint_squares", build_mapper(cfg, False))
    evaluator = build_evaluator(cfg, "keypoint_squares", {}, tmp_path)
    run_inference(model, loader, evaluator, StageTimer(torch.device("cpu")))
    scores = evaluator.evaluate()
    assert list(scores) == ["bbox", "keypoints"]
    assert 0 <= scores["keypoints"]["AP"] < 50
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(results) == 10
    assert {len(result["keypoints"]) for result in results} == {9}


def test_perfect_keypoints_score_100(cfg, tmp_path):
    """What the reader makes of the file, given back, is right: the half pixel is taken off."""
    evaluator = build_evaluator(cfg, "keypoint_squares", {}, tmp_path)
    evaluator.reset()
    model = build_model(cfg).eval()
    for sample in DatasetCatalog.get("keypoint_squares"):
        annotation = sample["annotations"][0]
        with torch.no_grad():
            output = model([build_mapper(cfg, False)(sample)])[0]["instances"][:1]
        keypoints = torch.tensor(annotation["keypoints"]).reshape(1, 3, 3)
        assert output.pred_keypoints.shape == keypoints.shape
        output.pred_keypoints = keypoints
        evaluator.process([sample], [{"instances": output}])
    assert evaluator.evaluate()["keypoints"]["AP"] == pytest.approx(100)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    truth = json.loads((tmp_path / "squares.json").read_text())["annotations"]
    assert [r["keypoints"] for r in results] == [a["keypoints"] for a in truth]
