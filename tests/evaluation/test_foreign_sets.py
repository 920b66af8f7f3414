"""LVIS and Cityscapes in miniature, from the files to AP."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import cityscapes, lvis
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.modeling import build_model
from PIL import Image

import instseg_ext
from instseg_ext import zoo
from instseg_ext.cli import train
from instseg_ext.data import build_mapper, build_train_loader, cheap_check, check_dataset
from instseg_ext.data.foreign import is_lvis
from instseg_ext.engine import defaults
from instseg_ext.evaluation import build_evaluator, evaluate

HEIGHT, WIDTH = 64, 96
# One object of 24 x 24 pixels in each image: left, top.
SQUARES = [(8, 16), (60, 4), (30, 36)]
TINY = shlex.split("""MODEL.DEVICE cpu MODEL.WEIGHTS ""
MODEL.PIXEL_STD [58.0,57.0,57.0] MODEL.RESNETS.WIDTH_PER_GROUP 8
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.FPN.OUT_CHANNELS 8
MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.BACKBONE.FREEZE_AT 0
TEST.DETECTIONS_PER_IMAGE 20 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
MODEL.RPN.POST_NMS_TOPK_TEST 8 DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 2""")


def picture(path, square):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    x, y = square
    pixels[y : y + 24, x : x + 24] = 220
    Image.fromarray(pixels).save(path)


def corners(x, y):
    return [x, y, x + 24, y, x + 24, y + 24, x, y + 24]


@pytest.fixture
def registered():
    """Register with detectron2; forgotten after the test."""
    names = []

    def register(name, load, **metadata):
        names.append(name)
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_lvis(folder, categories, used):
    """Three images with one object each, in the layout of detectron2's folder of data sets.

    Args:
        categories: of the file.
        used: category id of each object.
    """
    images, annotations = [], []
    for index, (x, y) in enumerate(SQUARES):
        picture(folder / "coco" / "val2017" / f"{index}.png", (x, y))
        images.append(
            {"id": index, "coco_url": f"http://images.cocodataset.org/val2017/{index}.png",
             "height": HEIGHT, "width": WIDTH, "neg_category_ids": [], "date_captured": "",
             "not_exhaustive_category_ids": []}
        )  # fmt: skip
        annotations.append(
            {"id": index + 1, "image_id": index, "category_id": used[index], "area": 576,
             "bbox": [x, y, 24, 24], "segmentation": [corners(x, y)]}
        )  # fmt: skip
    path = folder / "lvis" / "annotations.json"
    path.parent.mkdir()
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps({**content, "info": {}, "licenses": []}))
    return path, f"{folder}/coco/"


def lvis_set(registered, name, path, root):
    meta = lvis.get_lvis_instances_meta(name)
    places = {"json_file": str(path), "image_root": root, "evaluator_type": "lvis"}
    return registered(name, lambda: lvis.load_lvis_json(str(path), root, name), **places, **meta)


@pytest.fixture
def lvis_v1(tmp_path, registered):
    """A set with LVIS's 1203 classes, of which three have an object."""
    meta = lvis.get_lvis_instances_meta("lvis_v1")
    categories = [
        {"id": i + 1, "name": n, "frequency": "f"} for i, n in enumerate(meta["thing_classes"])
    ]
    return lvis_set(registered, "lvis_v1_mini", *write_lvis(tmp_path, categories, [3, 700, 1203]))


@pytest.fixture
def cocofied(tmp_path, registered):
    """A set with three of COCO's classes under COCO's ids."""
    names = {1: "person", 44: "bottle", 90: "toothbrush"}
    categories = [{"id": i, "name": n, "frequency": "f"} for i, n in names.items()]
    files = write_lvis(tmp_path, categories, list(names))
    return lvis_set(registered, "lvis_v0.5_mini_cocofied", *files)


@pytest.fixture
def cityscapes_set(tmp_path, registered):
    """A car, a person and a bus, each in a picture of its own."""
    images, truth = tmp_path / "leftImg8bit", tmp_path / "gtFine"
    for index, (square, label) in enumerate(
        zip(SQUARES, (("car", 26), ("person", 24), ("bus", 28)), strict=True)
    ):
        x, y = square
        stem = f"aachen_00000{index}_000019_"
        picture(images / "aachen" / f"{stem}leftImg8bit.png", square)
        (truth / "aachen").mkdir(parents=True, exist_ok=True)
        ids = np.zeros((HEIGHT, WIDTH), np.uint16)
        ids[y : y + 24, x : x + 24] = label[1] * 1000
        Image.fromarray(ids).save(truth / "aachen" / f"{stem}gtFine_instanceIds.png")
        classes = np.where(ids > 0, label[1], 7).astype(np.uint8)
        Image.fromarray(classes).save(truth / "aachen" / f"{stem}gtFine_labelIds.png")
        # Corners are whole pixels, and the last ones belong to the object.
        outline = [[x, y], [x + 23, y], [x + 23, y + 23], [x, y + 23]]
        objects = [{"label": label[0], "polygon": outline}]
        content = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}
        (truth / "aachen" / f"{stem}gtFine_polygons.json").write_text(json.dumps(content))
    return registered(
        "cityscapes_mini",
        lambda: cityscapes.load_cityscapes_instances(str(images), str(truth)),
        image_dir=str(images), gt_dir=str(truth), evaluator_type="cityscapes_instance",
        **_get_builtin_metadata("cityscapes"),
    )  # fmt: skip


def config(name, dataset, *opts):
    sets = ["DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (dataset,)]
    return instseg_ext.get_config(name, [*TINY, *sets, *opts])


def judge(make, cfg, classes, limit=None):
    """Evaluate a model that knows the squares, and says of each that it is of that class."""
    dicts = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    answers = {}
    for record, (x, y), category in zip(dicts, SQUARES, classes, strict=True):
        mask = np.zeros((1, HEIGHT, WIDTH), dtype=bool)
        mask[0, y : y + 24, x : x + 24] = True
        answers[record["image_id"]] = (mask, [category], [0.9])
    results = evaluate(cfg, make.oracle(answers), zoo.method_of(cfg), limit=limit)
    return results[cfg.DATASETS.TEST[0]]


@pytest.fixture
def run(monkeypatch):
    """Run ``train_net.py`` in this process."""
    # detectron2's set-up cuts the logger off from its parents, and so from caplog, for good.
    monkeypatch.setattr(defaults, "setup_logger", lambda *args, **kwargs: None)
    return lambda *words: train.main([str(word) for word in words])


LVIS_CONFIG = "MaskRCNN/mask_rcnn_R_50_FPN_1x_lvis_v1"
CITYSCAPES_CONFIG = "MaskRCNN/mask_rcnn_R_50_FPN_cityscapes"


def test_lvis_ap(make, lvis_v1, tmp_path):
    pytest.importorskip("lvis")
    cfg = config(LVIS_CONFIG, lvis_v1, "OUTPUT_DIR", str(tmp_path / "out"))
    found = judge(make, cfg, [2, 699, 1202])
    assert {t: s["AP"] for t, s in found.items()} == pytest.approx({"bbox": 100, "segm": 100})
    assert {"APr", "APc", "APf"} < set(found["segm"])
    assert judge(make, cfg, [2, 699, 0])["segm"]["AP"] == pytest.approx(200 / 3, abs=0.1)
    # images that were left out do not count as missed
    assert judge(make, cfg, [2, 699, 1202], limit=1)["segm"]["AP"] == pytest.approx(100)


def test_coco_models_on_cocofied_lvis(make, cocofied, tmp_path):
    """AP* of the PointRend paper: a COCO model's classes under COCO's ids."""
    pytest.importorskip("lvis")
    cfg = config("PointRend/pointrend_rcnn_R_50_FPN_1x_coco", cocofied)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    classes = MetadataCatalog.get(cocofied).thing_classes
    wanted = [classes.index(name) for name in ("person", "bottle", "toothbrush")]
    assert judge(make, cfg, wanted)["segm"]["AP"] == pytest.approx(100)


def test_lvis_trains_with_all_its_classes(lvis_v1):
    pytest.importorskip("lvis")
    cfg = config(LVIS_CONFIG, lvis_v1)
    loader = build_train_loader(cfg, build_mapper(cfg, True), seed=0)
    batch = next(iter(loader))
    assert {int(c) for sample in batch for c in sample["instances"].gt_classes} <= {2, 699, 1202}
    model = build_model(cfg)
    assert model.roi_heads.box_predictor.cls_score.out_features == 1204
    losses = model(batch)
    assert all(torch.isfinite(value) for value in losses.values())


def test_lvis_files_are_checked(lvis_v1):
    report = cheap_check(lvis_v1)
    assert not report.errors
    assert report.num_classes == 1203
    metadata = MetadataCatalog.get(lvis_v1)
    path = Path(metadata.json_file)
    content = json.loads(path.read_text())
    assert is_lvis(content)
    del content["images"][0]["neg_category_ids"], content["categories"][5]["frequency"]
    content["images"][1]["coco_url"] = "http://images.cocodataset.org/val2017/9.png"
    path.write_text(json.dumps(content))
    report = check_dataset(path, metadata.image_root, lvis=True)
    kinds = {(f.kind, f.image_id) for f in report.errors}
    assert kinds == {("missing-key", 0), ("missing-key", None), ("missing-image", 1)}
    with pytest.raises(ValueError, match="missing-image"):
        cheap_check(lvis_v1, training=False)


def test_evaluation_of_a_model_on_lvis(lvis_v1, tmp_path, run):
    """``train_net.py --eval-only``, with as many classes as the data set has."""
    pytest.importorskip("lvis")
    words = ["DATASETS.TEST", f"('{lvis_v1}',)", "OUTPUT_DIR", tmp_path, *TINY]
    assert run("--config-file", LVIS_CONFIG, "--eval-only", *words) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["datasets"][lvis_v1]) == {"bbox", "segm"}


def test_cityscapes_ap(make, cityscapes_set, tmp_path):
    pytest.importorskip("cityscapesscripts")
    pytest.importorskip("shapely")
    cfg = config(CITYSCAPES_CONFIG, cityscapes_set, "OUTPUT_DIR", str(tmp_path / "out"))
    names = MetadataCatalog.get(cityscapes_set).thing_classes
    car, person, bus = (names.index(name) for name in ("car", "person", "bus"))
    found = judge(make, cfg, [car, person, bus])["segm"]
    assert [found[key] for key in ("AP", "AP50", "AP-car")] == pytest.approx([100] * 3)
    assert np.isnan(found["AP-train"])
    assert judge(make, cfg, [car, person, car])["segm"]["AP-bus"] == 0
    # the scripts would end the program at an image without prediction
    assert judge(make, cfg, [car, person, bus], limit=2)["segm"]["AP"] == pytest.approx(100)
    loader = build_train_loader(cfg, build_mapper(cfg, True), seed=0)
    (sample, *_) = next(iter(loader))
    assert sample["instances"].gt_masks.tensor.sum() == pytest.approx(24 * 24, abs=50)


def test_semantic_cityscapes(cityscapes_set, registered):
    pytest.importorskip("cityscapesscripts")
    metadata = MetadataCatalog.get(cityscapes_set)
    kind = {"gt_dir": metadata.gt_dir, "evaluator_type": "cityscapes_sem_seg"}
    name = registered("cityscapes_mini_semantic", list, **kind)
    cfg = config(CITYSCAPES_CONFIG, name)
    evaluator = build_evaluator(cfg, name, {}, None, seen_images_only=True)
    evaluator.reset()
    for index, (x, y) in list(enumerate(SQUARES))[:2]:
        # road (0) and, on it, a car (13) or a person (11)
        logits = torch.zeros(19, HEIGHT, WIDTH)
        logits[0] = 1
        logits[(13, 11)[index], y : y + 24, x : x + 24] = 2
        file_name = f"{metadata.image_dir}/aachen/aachen_00000{index}_000019_leftImg8bit.png"
        evaluator.process([{"file_name": file_name}], [{"sem_seg": logits}])
    assert evaluator.evaluate()["sem_seg"]["IoU"] == pytest.approx(100)
    whole = build_evaluator(cfg, name, {}, None)
    whole.reset()
    with pytest.raises(FileNotFoundError, match="was not given the image"):
        whole.evaluate()


def test_dry_run_on_cityscapes(cityscapes_set, tmp_path, run):
    pytest.importorskip("cityscapesscripts")
    pytest.importorskip("shapely")
    sets = [f"DATASETS.{key}" for key in ("TRAIN", "TEST")]
    words = [word for key in sets for word in (key, f"('{cityscapes_set}',)")]
    words += ["OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2, *TINY]
    assert run("--config-file", CITYSCAPES_CONFIG, "--dry-run", *words) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert "segm" in results["datasets"][cityscapes_set]


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("lvis_v1_val", "lvis", "lvis"),
        ("cityscapes_fine_instance_seg_val", "cityscapesscripts", "cityscapesScripts"),
        ("cityscapes_fine_instance_seg_val", "shapely", "shapely"),
    ],
)
def test_a_missing_package_is_named_at_once(name, module, package, run, monkeypatch, capsys):
    for other in ("lvis", "cityscapesscripts", "shapely"):
        stand_in = None if other == module else ModuleType(other)
        monkeypatch.setitem(sys.modules, other, stand_in)
    words = ["--config-file", LVIS_CONFIG, "--eval-only", "DATASETS.TEST", f"('{name}',)"]
    assert run(*words, *TINY) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{name!r} needs the package {package}: pip install" in error


def test_missing_files_are_named_at_once(registered, run, tmp_path, capsys):
    """Before anything is built, and also where the annotations are not to be checked."""
    for kind in ("image_dir", "json_file"):
        name = registered(f"absent_{kind}", list, thing_classes=["a"], evaluator_type="coco")
        MetadataCatalog.get(name).set(**{kind: str(tmp_path / "nowhere")})
        words = ["--config-file", LVIS_CONFIG, "--eval-only", "DATASETS.TEST", f"('{name}',)"]
        assert run(*words, "--skip-check", *TINY) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"needs {tmp_path}/nowhere, which does not exist" in error
        assert "DETECTRON2_DATASETS" in error
