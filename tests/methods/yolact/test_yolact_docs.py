"""README and metafile say what the code and each other say."""

import json
import re

import numpy as np
from methods.project import (
    Project,
    assert_initial_weights_have_their_command,
    assert_key_table_equals_the_config,
)
from scipy.io import savemat

from instseg_ext.methods.yolact.config import add_yolact_config

PROJECT = Project("YOLACT")


def test_key_table_equals_the_config():
    assert_key_table_equals_the_config(PROJECT, add_yolact_config, "YOLACT")


def test_detailed_table_agrees_with_the_model_table():
    of_papers = sorted(m["published_mask_AP"] for m in PROJECT.models if m["source"] == "paper")
    assert sorted(float(row[1]) for row in PROJECT.rows(r"(\+\+ )?(R-|DarkNet)")) == of_papers


def test_every_initial_weight_file_has_the_command_that_writes_it():
    darknet = r"instseg convert --from yolact https://\S+/darknet53\.pth (\S+)\n"
    others = re.findall(darknet, PROJECT.text)
    assert len(others) == 1
    assert_initial_weights_have_their_command(PROJECT, {"resnet101", "mobilenet_v2"}, others)


def test_every_converted_file_names_a_config():
    rows = PROJECT.rows("`yolact_")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert named == set(PROJECT.published)


def test_recipe_for_sbd_writes_what_the_config_reads(tmp_path, monkeypatch):
    """The page's script, run on a made-up release of two images."""
    numbers = np.zeros((6, 8), dtype=np.uint8)
    numbers[1:4, 2:7], numbers[5, 0] = 1, 2
    truth = np.zeros((1, 1), dtype=[("Segmentation", object), ("Categories", object)])
    truth[0, 0] = (numbers, np.array([[20], [1]], dtype=np.uint8))
    (tmp_path / "inst").mkdir()
    for split, name in (("train", "2008_000001"), ("val", "2008_000002")):
        savemat(tmp_path / "inst" / f"{name}.mat", {"GTinst": truth})
        (tmp_path / f"{split}.txt").write_text(f"{name}\n")
    entries = PROJECT.config("yolact_R_50_550_sbd").INSTSEG.DATASETS
    monkeypatch.chdir(tmp_path)
    script = re.search(r"```python\n(.*?)```", PROJECT.text, re.DOTALL)[1]
    exec(compile(script, "README.md", "exec"), {})

    written = {path.name for path in tmp_path.glob("*.json")}
    assert {entry["JSON"].rpartition("/")[2] for entry in entries} == written
    file = json.loads((tmp_path / "pascal_sbd_train.json").read_text())
    assert file["images"] == [{"id": 1, "file_name": "2008_000001.jpg", "height": 6, "width": 8}]
    found = [(a["category_id"], a["bbox"], a["area"]) for a in file["annotations"]]
    assert found == [(20, [2, 1, 5, 3], 15), (1, [0, 5, 1, 1], 1)]
    assert [c["name"] for c in file["categories"]][::19] == ["aeroplane", "tvmonitor"]
