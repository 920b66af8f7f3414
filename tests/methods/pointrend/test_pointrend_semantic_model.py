"""Label maps from end to end: the segmentor, training, evaluation, prediction."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from methods.pointrend.pointrend_heads import oracle
from methods.pointrend.semantic_scenes import CLASSES, TINY, registered, scene, write_scenes
from methods.project import build

import instseg_ext
from instseg_ext import data, zoo
from instseg_ext.cli import main as cli
from instseg_ext.cli import train
from instseg_ext.evaluation import evaluate
from instseg_ext.evaluation.benchmark import measure_speed, synthetic_batch
from instseg_ext.evaluation.report import class_table, metric_table
from instseg_ext.modeling.semantic import label_regions

CONFIG = "PointRend/pointrend_semantic_R_101_FPN_1x_cityscapes"
NUMBERS = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "MODEL.POINT_HEAD.NUM_CLASSES", 3]
ALL_CELLS = ["MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS", 10000]
OFFICIAL_YAML = """
MODEL:
  META_ARCHITECTURE: "SemanticSegmentor"
  BACKBONE:
    NAME: "build_resnet_fpn_backbone"
    FREEZE_AT: 0
  RESNETS:
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
  FPN:
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
  SEM_SEG_HEAD:
    NAME: "{name}"
    NUM_CLASSES: 19
  POINT_HEAD:
    NUM_CLASSES: 19
    FC_DIM: 256
    NUM_FC: 3
    IN_FEATURES: ["p2"]
    TRAIN_NUM_POINTS: 2048
    SUBDIVISION_STEPS: 2
    SUBDIVISION_NUM_POINTS: 8192
    COARSE_SEM_SEG_HEAD_NAME: "SemSegFPNHead"
    COARSE_PRED_EACH_LAYER: False
INPUT:
  CROP:
    ENABLED: True
    TYPE: "absolute"
    SIZE: (512, 1024)
    SINGLE_CATEGORY_MAX_AREA: 0.75
  COLOR_AUG_SSD: True
DATASETS:
  TRAIN: ("cityscapes_fine_sem_seg_train",)
  TEST: ("cityscapes_fine_sem_seg_val",)
VERSION: 2
"""


def config(*opts):
    return instseg_ext.get_config(CONFIG, [*TINY, *NUMBERS, *opts])


def batch(sizes=((45, 61), (52, 48))):
    gen = np.random.default_rng(1)
    result = []
    for height, width in sizes:
        image, labels = scene(height, width, gen)
        result.append(
            {
                "image": torch.from_numpy(image.transpose(2, 0, 1).copy()),
                "sem_seg": torch.from_numpy(labels.astype(np.int64)),
                "height": 2 * height - 3,
                "width": width + 9,
            }
        )
    return result


@pytest.fixture(scope="module")
def models():
    """Ours, and detectron2's segmentor with detectron2's head, of the same weights.

    Every cell is predicted: which cells are chosen is a matter of the head alone.
    """
    oracle()
    torch.manual_seed(0)
    ours = build_model(config(*ALL_CELLS))
    for parameter in ours.sem_seg_head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = build_model(
        config(
            *ALL_CELLS,
            *("MODEL.META_ARCHITECTURE", "SemanticSegmentor"),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
            *("MODEL.SEM_SEG_HEAD.NAME", "PointRendSemSegHead"),
        )
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_losses_of_odd_sizes_equal_detectron2(models):
    results = []
    for model in models:
        torch.manual_seed(3)
        results.append(model.train()(batch()))
    losses, expected = results
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5)


def test_logits_of_odd_sizes_equal_detectron2(models):
    with torch.no_grad():
        ours, theirs = (model.eval()(batch()) for model in models)
    for result, expected, item in zip(ours, theirs, batch(), strict=True):
        logits, wanted = result["sem_seg"], expected["sem_seg"]
        assert logits.shape == (3, item["height"], item["width"])
        assert logits.dtype is torch.float32
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_head_works_within_detectron2s_segmentor(models):
    """What a config file of detectron2 with one changed line gives."""
    ours, _ = models
    plain = build_model(config(*ALL_CELLS, "MODEL.META_ARCHITECTURE", "SemanticSegmentor"))
    assert type(plain).__name__ == "SemanticSegmentor"
    plain.load_state_dict(ours.state_dict())
    assert set(plain.train()(batch())) == {"loss_sem_seg", "loss_sem_seg_point"}
    plain.load_state_dict(ours.state_dict())  # training moves the statistics of batch norms
    with torch.no_grad():
        logits, expected = plain.eval()(batch())[0]["sem_seg"], ours.eval()(batch())[0]["sem_seg"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_and_memory_format(models):
    ours, _ = models
    with torch.no_grad():
        expected = ours.eval()(batch())[0]["sem_seg"].argmax(0)
        for opts in (("INSTSEG.PRECISION", "bf16"), ("INSTSEG.MEMORY_FORMAT", "contiguous")):
            other = build_model(config(*ALL_CELLS, *opts)).eval()
            other.load_state_dict(ours.state_dict())
            logits = other(batch())[0]["sem_seg"]
            assert logits.dtype is torch.float32
            least = 0.95 if "bf16" in opts else 0.999
            assert (logits.argmax(0) == expected).float().mean() > least
    losses = build_model(config("INSTSEG.PRECISION", "bf16")).train()(batch())
    assert all(value.dtype is torch.float32 for value in losses.values())
    sum(losses.values()).backward()


def test_every_parameter_learns_also_without_labels():
    inputs = batch()
    for item in inputs:
        item["sem_seg"].fill_(255)
    model = build_model(config()).train()
    losses = model(inputs)
    assert all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_stretch_is_undone():
    opts = ("INSTSEG.STRETCH", [64, 96], "INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.MIN_SIZE_TEST", 0)
    model = build_model(config(*opts)).eval()
    with torch.no_grad():
        assert model(batch())[0]["sem_seg"].shape == (3, 87, 70)


def test_missing_labels_are_named():
    item = batch()[0]
    del item["sem_seg"]
    with pytest.raises(ValueError, match="but street has none"):
        build_model(config()).train()([{**item, "file_name": "street"}])


def test_class_count_belongs_to_both_heads():
    cfg = instseg_ext.get_config(CONFIG)
    assert zoo.class_count(cfg) == 19
    assert zoo.method_of(cfg).name == "PointRend"
    changed = zoo.set_class_count(cfg, 3)
    assert changed == ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "MODEL.POINT_HEAD.NUM_CLASSES"]
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    with pytest.raises(ValueError, match=r"SEM_SEG_HEAD\.NUM_CLASSES 3 was typed"):
        zoo.set_class_count(cfg, 4, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES"])


def test_config_is_the_published_one():
    cfg = instseg_ext.get_config(CONFIG)
    assert cfg.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.BACKBONE.FREEZE_AT) == (101, 0)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (32, 0.01)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == ((40000, 55000), 65000)
    assert tuple(range(512, 2049, 256)) == cfg.INPUT.MIN_SIZE_TRAIN
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST) == (4096, 1024)
    assert cfg.INPUT.MAX_SIZE_TEST == 2048


def test_one_changed_line_of_detectron2s_file(tmp_path):
    """The model is the one of our config, and of detectron2's, by names and shapes."""
    official, ours = tmp_path / "official.yaml", tmp_path / "ours.yaml"
    official.write_text(OFFICIAL_YAML.format(name="PointRendSemSegHead"))
    ours.write_text(OFFICIAL_YAML.format(name="PointRendSemanticHead"))
    cfg = instseg_ext.get_config(str(ours))
    published = instseg_ext.get_config(CONFIG, ["MODEL.RESNETS.DEPTH", 50])
    assert dict(cfg.MODEL.POINT_HEAD) == dict(published.MODEL.POINT_HEAD)
    assert cfg.INPUT.CROP == published.INPUT.CROP
    assert zoo.method_of(cfg) is zoo.method_of(published)
    shapes = {name: value.shape for name, value in build(cfg).state_dict().items()}
    assert {name: value.shape for name, value in build(published).state_dict().items()} == shapes
    project = oracle()
    theirs = get_cfg()
    project.add_pointrend_config(theirs)
    theirs.merge_from_file(str(official))
    assert {name: value.shape for name, value in build(theirs).state_dict().items()} == shapes


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder of a short training, evaluated on the training images."""
    folder = tmp_path_factory.mktemp("scenes")
    output = tmp_path_factory.mktemp("run")
    with registered("test_scenes", write_scenes(folder, sizes_known=False)):
        argv = [
            "--config-file", CONFIG, *map(str, TINY), "OUTPUT_DIR", str(output),
            "DATASETS.TRAIN", "('test_scenes',)", "DATASETS.TEST", "('test_scenes',)",
            "SOLVER.MAX_ITER", "40", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "5",
            "SOLVER.BASE_LR", "0.003", "INSTSEG.OPTIMIZER", "adamw", "SEED", "2",
            "VIS_PERIOD", "40", "INSTSEG.BEST.METRIC", "sem_seg/mIoU",
        ]  # fmt: skip
        assert train.main(argv) == 0
        yield folder, output, argv


def test_training_learns_label_maps(run):
    _, output, _ = run
    results = json.loads((output / "results.json").read_text())["datasets"]["test_scenes"]
    scores = results["sem_seg"]
    assert {"mIoU", "fwIoU", "pACC", "mACC", *(f"IoU-{name}" for name in CLASSES)} <= set(scores)
    assert scores["mIoU"] > 45  # ground everywhere has less than 30
    assert (output / "model_best.pth").is_file()
    assert list(output.glob("events.out*"))


def test_evaluation_alone_gives_the_same(run):
    _, output, argv = run
    trained = json.loads((output / "results.json").read_text())["datasets"]
    folder = output / "again"
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(folder)]
    assert train.main([*argv[:2], "--eval-only", *argv[2:], *weights]) == 0
    assert json.loads((folder / "results.json").read_text())["datasets"] == trained


def test_instances_are_not_label_maps(run):
    """A data set and a model that do not belong together: one sentence."""
    cfg = config("DATASETS.TEST", ("nuclei_val",), "DATASETS.TRAIN", ("nuclei_train",))
    method = zoo.method_of(cfg)
    words = "holds instances, but the configured model predicts label maps"
    with pytest.raises(ValueError, match=words):
        evaluate(cfg, torch.nn.Linear(1, 1), method)
    with pytest.raises(ValueError, match=words):
        data.build_train_loader(cfg, method.build_mapper(cfg, True), seed=0)
    cfg.DATASETS.TRAIN = ("test_scenes",)
    with pytest.raises(ValueError, match=r"holds label maps, .* predicts instances"):
        data.build_train_loader(cfg, data.InstSegDatasetMapper(cfg, True), seed=0)


def test_default_predictor(run):
    folder, output, _ = run
    cfg = config("MODEL.WEIGHTS", str(output / "model_final.pth"))
    image = cv2.imread(str(folder / "image_0.png"))
    logits = DefaultPredictor(cfg)(image)["sem_seg"]
    labels = cv2.imread(str(folder / "labels_0.png"), cv2.IMREAD_UNCHANGED)
    assert logits.shape == (3, *labels.shape)
    hit = logits.argmax(0).numpy() == labels
    assert hit[labels < 255].mean() > 0.75


def test_predict_draws_the_label_map(run, tmp_path):
    folder, output, _ = run
    argv = [
        "predict", "--weights", str(output / "model_final.pth"),
        "--input", str(folder / "image_0.png"), "--output", str(tmp_path),
        "--confidence-threshold", "0.0", "MODEL.DEVICE", "cpu",
    ]  # fmt: skip
    assert cli.main(argv) == 0
    found = json.loads((tmp_path / "predictions.json").read_text())
    names = json.loads((tmp_path / "images.json").read_text())["categories"]
    assert [category["name"] for category in names] == CLASSES
    regions = [result["category_id"] for result in found]
    assert len(regions) == len(set(regions)) > 1
    drawn, image = (cv2.imread(str(file / "image_0.png")) for file in (tmp_path, folder))
    image = cv2.resize(image, drawn.shape[1::-1])
    assert (drawn != image).any(axis=2).mean() > 0.9


def test_visualize(run, tmp_path, capsys):
    _, _, argv = run
    options = [*argv[:2], "--output", str(tmp_path), *argv[2:]]
    assert cli.main(["visualize", "data", *options[:4], "--count", "2", *options[4:]]) == 0
    assert (tmp_path / "samples.png").is_file()
    other = [*argv[:2], "--output", str(tmp_path / "no"), *argv[2:]]
    assert cli.main(["visualize", "predictions", *other]) == 2
    assert "`instseg predict` draws label maps" in capsys.readouterr().err


def test_speed_of_label_maps():
    figures = measure_speed(build_model(config()), synthetic_batch((64, 64), 1), repeat=1, warmup=0)
    assert figures["detections"] == 0
    assert figures["median_ms"]["head"] > 0
    assert figures["ratio_to_floor"] > 0


def test_regions_of_a_label_map():
    logits = torch.full((4, 6, 8), -2.0)
    logits[1] = 0.0
    logits[3, 2:4, 5:] = 9.0
    regions = label_regions(logits)
    assert regions.pred_classes.tolist() == [1, 3]
    assert regions.pred_boxes.tensor.tolist() == [[0, 0, 8, 6], [5, 2, 8, 4]]
    assert 0.6 < regions.scores[0] < 0.8 < regions.scores[1]
    assert regions.image_size == (6, 8)
    assert [rle["size"] for rle in regions.pred_masks_rle] == [[6, 8]] * 2


def test_tables_show_one_metric_by_class():
    scores = {"sem_seg": {"mIoU": 50.0, "IoU-road": 60.0, "ACC-road": 70.0}}
    assert "IoU-road" not in metric_table(scores)
    assert "ACC-road" not in metric_table(scores)
    assert "| road" in class_table(scores)
    assert "60.00" in class_table(scores)
