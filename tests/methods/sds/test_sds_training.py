"""`instseg train-sds` from pictures to a checkpoint; acceptance checks have their numbers."""

import json

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from methods.sds.sds_toys import TINY
from PIL import Image

import instseg_ext
from instseg_ext.cli.main import main

SIDE = 64
# x1, y1, x2, y2 and class of the objects of four pictures.
SCENES = [
    [(6, 8, 28, 28, 1), (36, 30, 58, 56, 2)],
    [(34, 6, 58, 30, 1), (8, 36, 26, 58, 2)],
    [(10, 10, 34, 30, 2), (40, 40, 60, 60, 1)],
    [(20, 22, 46, 44, 1)],
]
COLOURS = {1: (220, 60, 40), 2: (40, 90, 220)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a COCO file and a folder: rectangles, those of class 2 with a hole, on noise."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, objects in enumerate(SCENES, 1):
        picture = rng.integers(110, 118, (SIDE, SIDE, 3))
        for x1, y1, x2, y2, label in objects:
            noise = rng.integers(-4, 4, (y2 - y1, x2 - x1, 3))
            picture[y1:y2, x1:x2] = np.array(COLOURS[label]) + noise
            ring = [x1, y1, x2, y1, x2, y2, x1, y2]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [ring],
                }
            )
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    file = folder / "annotations.json"
    file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return file, folder


def train(pictures, output, *options):
    file, folder = map(str, pictures)
    data = ["--train-json", file, "--train-images", folder, "--val-json", file]
    tiny = [str(word) for word in TINY]
    opts = f"""OUTPUT_DIR {output} SEED 1 SOLVER.MAX_ITER 4 SOLVER.IMS_PER_BATCH 2
        SOLVER.CHECKPOINT_PERIOD 2 MODEL.SDS.FOREGROUND 4 MODEL.SDS.BACKGROUND 8
        DATALOADER.NUM_WORKERS 0 MODEL.SDS.MAX_REGIONS 100
        INSTSEG.MAP_R True"""
    config = ["--config-file", "SDS/nuclei_sds_R_18", "--val-images", folder]
    return main(["train-sds", *config, *data, *options, *tiny, *opts.split()])


@pytest.fixture(scope="module")
def output(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert train(pictures, folder) == 0
    return folder


def test_training_images_by_heart(output):
    """Check 17: AP^r at 0.5 of the images that were trained on."""
    (tasks,) = json.loads((output / "results.json").read_text())["datasets"].values()
    assert tasks["map_r"]["mAP50"] > 90


def test_default_predictor(output, pictures):
    """Check 17: one checkpoint, detectron2's predictor, masks of the size of the image."""
    cfg = instseg_ext.get_config(str(output / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    picture = np.asarray(Image.open(pictures[1] / "1.png"))[:, :, ::-1]
    found = DefaultPredictor(cfg)(picture)["instances"]
    assert found.pred_masks.dtype is torch.bool
    assert found.pred_masks.shape == (len(found), SIDE, SIDE)
    assert set(found.pred_classes[:2].tolist()) == {0, 1}


def test_finished_stages_are_taken_over(output, pictures, capsys):
    """Nothing is made again; another fit is, where its file is missing."""
    names = ("regions/1.npz", "features/0000000.npy", "fit/svm.pth", "fit/refiner_0001.pth")
    before = {name: (output / name).stat().st_mtime_ns for name in names}
    weights = torch.load(output / "model_final.pth", weights_only=True)["model"]
    (output / "fit/refiner_0001.pth").unlink()
    (output / "features/0000002.npy").unlink()
    assert train(pictures, output, "--resume") == 0
    after = {name: (output / name).stat().st_mtime_ns for name in names}
    assert {name for name in names if before[name] != after[name]} == {"fit/refiner_0001.pth"}
    again = torch.load(output / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert train(pictures, output) == 2
    assert "pass --resume to go on with its run" in capsys.readouterr().err


def test_other_methods_are_refused(pictures, tmp_path, capsys):
    arguments = ["train-sds", "--config-file", "SOLO/nuclei_solov2_R_18_FPN"]
    assert main([*arguments, "OUTPUT_DIR", str(tmp_path)]) == 2
    assert "the config is of SOLO" in capsys.readouterr().err
