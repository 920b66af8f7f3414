"""A user's own data, as the README says: check, dry run, predict from the checkpoint alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from contract.cases import TINY_RESNET, first_of_each_method

from instseg_ext.cli import main as cli
from instseg_ext.cli import train
from instseg_ext.data import make_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Annotation file and images of a training and a validation set of 3 classes."""
    folder = tmp_path_factory.mktemp("own")
    return make_shapes(folder / "train", 8, 64, 1), make_shapes(folder / "val", 4, 64, 2)


def own_data(shapes):
    (train_json, train_images), (val_json, val_images) = shapes
    return [
        "--train-json", str(train_json), "--train-images", str(train_images),
        "--val-json", str(val_json), "--val-images", str(val_images),
    ]  # fmt: skip


def tiny(case, output):
    opts = [str(opt) for opt in (*TINY_RESNET, *case.opts)]
    return [*opts, "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(output)]


CASES = first_of_each_method()
# A process per call, of which none has seen a data set; what they share is the import of others'
# packages. One call starts as a user's does.
PREDICT = """
import json, multiprocessing, sys
import detectron2.engine
from instseg_ext.cli.main import main

def call(argv):
    sys.exit(main(argv))

codes = []
for argv in json.loads(sys.argv[1]):
    process = multiprocessing.get_context("fork").Process(target=call, args=(argv,))
    process.start()
    process.join()
    codes.append(process.exitcode)
sys.exit(any(codes))
"""


@pytest.fixture(scope="module")
def runs(shapes, tmp_path_factory):
    """The output folders of dry runs of 3 iterations."""
    folders = {case.name: tmp_path_factory.mktemp("run") for case in CASES}
    for case in CASES:
        words = [*own_data(shapes), *tiny(case, folders[case.name]), "SOLVER.MAX_ITER", "3"]
        assert train.main(["--config-file", case.config, "--dry-run", *words]) == 0, case.name
    return folders


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def run(request, runs):
    return request.param, runs[request.param.name]


@pytest.fixture(scope="module")
def drawn(runs, shapes, tmp_path_factory):
    """What ``predict`` writes for the checkpoint of every run."""
    image = sorted(Path(shapes[1][1]).iterdir())[0]
    parent = tmp_path_factory.mktemp("drawn")
    folders = {name: parent / name for name in runs}
    calls = [
        [
            "predict", "--weights", str(output / "model_final.pth"), "--input", str(image),
            "--output", str(folders[name]), "--confidence-threshold", "0.0", "MODEL.DEVICE", "cpu",
        ]
        for name, output in runs.items()
    ]  # fmt: skip
    for words in (
        ["-m", "instseg_ext.cli.main", *calls[0]],
        ["-c", PREDICT, json.dumps(calls[1:])],
    ):
        done = subprocess.run(
            [sys.executable, *words],
            check=False,
            capture_output=True,
            text=True,
            cwd=parent,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert done.returncode == 0, done.stderr
    return folders


def test_dry_run_writes_results_in_the_agreed_form(run):
    case, output = run
    results = json.loads((output / "results.json").read_text())
    assert set(results) >= {"config", "weights", "datasets", "speed"}
    assert results["config"] == case.config
    (name,) = results["datasets"]
    assert name.startswith("own_val")
    tasks = results["datasets"][name]
    if case.classes:
        assert {"AP", "AP50", "AP75"} <= set(tasks["segm"])
    else:
        assert {"segm_AR@10", "segm_AR@100", "bbox_AR@1000"} <= set(tasks["proposals"])
    stages = {"data", "backbone", "head", "post", "total"}
    assert set(results["speed"]["median_ms"]) == stages
    assert set(results["speed"]["p95_ms"]) == stages
    assert results["speed"]["images_per_s"] > 0
    assert {"peak_memory_mb", "device", "threads"} <= set(results["speed"])


def test_a_second_run_into_the_same_folder_is_refused(run, shapes, capsys):
    case, output = run
    argv = ["--config-file", case.config, "--dry-run", *own_data(shapes), *tiny(case, output)]
    before = (output / "model_final.pth").read_bytes()
    assert train.main(argv) == 2
    assert "--resume" in capsys.readouterr().err
    assert (output / "model_final.pth").read_bytes() == before


def test_predict_in_a_fresh_process_knows_the_class_names(run, drawn):
    """Nothing is registered there; config and names come out of the checkpoint."""
    folder = drawn[run[0].name]
    assert list(folder.glob("*.png")) or list(folder.glob("*.jpg"))
    images = json.loads((folder / "images.json").read_text())
    assert [c["name"] for c in images["categories"]] == ["circle", "square", "triangle"]


def test_eval_only_gives_the_same_results(run, shapes, tmp_path):
    _, output = run
    argv = [
        "--config-file", str(output / "config.yaml"), "--eval-only", "--dry-run",
        "MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path),
    ]  # fmt: skip
    assert train.main(argv) == 0
    first = json.loads((output / "results.json").read_text())["datasets"]
    assert json.loads((tmp_path / "results.json").read_text())["datasets"] == first


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train-json", "x.json"], "--train-json needs --train-images"),
        (["--val-images", "x"], "--val-images needs --val-json"),
        (
            ["--train-json", "no.json", "--train-images", "no"],
            "no.json",
        ),
        (["DATASETS.TRAIN", "('nuclei_trian',)"], "nuclei_trian"),
        (["MODEL.SOLO.NUM_CLASSES", "4"], "4 was typed, but the training set has 1 classes"),
        (["MODEL.WEIGHTS", "no_such_file.pth"], "no_such_file.pth"),
        (["--register", "x=y"], "--register wants NAME=ANNOTATIONS.json:IMAGE_DIR"),
    ],
)
def test_wrong_input_is_one_sentence_before_any_work(argv, message, tmp_path, capsys):
    config = ["--config-file", "SOLO/nuclei_solov2_R_18_FPN", "OUTPUT_DIR", str(tmp_path / "out")]
    assert train.main([*config, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_validation_classes_must_be_those_of_the_training_set(shapes, tmp_path, capsys):
    (json_file, images), _ = shapes
    argv = [
        "--config-file", "SOLO/nuclei_solov2_R_18_FPN", "OUTPUT_DIR", str(tmp_path / "out"),
        "--train-json", str(json_file), "--train-images", str(images),
    ]  # fmt: skip
    val = ["--val-json", str(tmp_path / "one.json"), "--val-images", str(images)]
    content = json.loads(Path(json_file).read_text())
    content["categories"] = content["categories"][:1]
    (tmp_path / "one.json").write_text(json.dumps(content))
    assert train.main([*argv, *val]) == 2
    assert "must have the same classes" in capsys.readouterr().err


def test_check_dataset_passes_on_clean_data(shapes, capsys):
    json_file, images = shapes[0]
    assert cli.main(["check-dataset", str(json_file), str(images)]) == 0
