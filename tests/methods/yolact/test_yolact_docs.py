"""README and metafile say what the code and each other say."""

import json
import re

import numpy as np
import torchvision
import yaml
from detectron2.config import get_cfg
from scipy.io import savemat

import instseg_ext
from instseg_ext import resources
from instseg_ext.config import config_names
from instseg_ext.methods.yolact.config import add_yolact_config

PROJECT = resources.root() / "projects" / "YOLACT"
NAMES = [name for name in config_names() if name.startswith("YOLACT/")]


def readme_rows(first_cell):
    """Return the cells of the table rows whose first cell matches."""
    text = (PROJECT / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if re.match(first_cell, row[0])]


def leaves(node, prefix=""):
    for key, value in node.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_key_table_equals_the_config():
    cfg = get_cfg()
    add_yolact_config(cfg)
    rows = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in readme_rows("`[A-Z]")}
    assert rows == dict(leaves(cfg.MODEL.YOLACT))


def test_detailed_table_agrees_with_the_model_table():
    models = yaml.safe_load((PROJECT / "metafile.yml").read_text())["Models"]
    of_papers = sorted(m["published_mask_AP"] for m in models if m["source"] == "paper")
    assert sorted(float(row[1]) for row in readme_rows(r"(\+\+ )?(R-|DarkNet)")) == of_papers


def test_every_initial_weight_file_has_the_command_that_writes_it():
    text = (PROJECT / "README.md").read_text()
    files = {instseg_ext.get_config(name).MODEL.WEIGHTS for name in NAMES}
    local = {file for file in files if file and "://" not in file}
    assert len(local) == 3
    for file in local - {"weights/darknet53_yolact.pth"}:
        model = file.removeprefix("weights/").removesuffix("_torchvision.pth")
        url = torchvision.models.get_model_weights(model).IMAGENET1K_V1.url
        assert f"instseg convert --from torchvision {url} {file}\n" in text
    darknet = r"instseg convert --from yolact https://\S+/darknet53\.pth (\S+)\n"
    assert {*re.findall(darknet, text)} == local & {"weights/darknet53_yolact.pth"}


def test_every_converted_file_names_a_config():
    rows = readme_rows("`yolact_")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert {f"YOLACT/{name}" for name in named} == {n for n in NAMES if "nuclei" not in n}


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
    entries = instseg_ext.get_config("YOLACT/yolact_R_50_550_sbd").INSTSEG.DATASETS
    monkeypatch.chdir(tmp_path)
    script = re.search(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)[1]
    exec(compile(script, "README.md", "exec"), {})

    written = {path.name for path in tmp_path.glob("*.json")}
    assert {entry["JSON"].rpartition("/")[2] for entry in entries} == written
    file = json.loads((tmp_path / "pascal_sbd_train.json").read_text())
    assert file["images"] == [{"id": 1, "file_name": "2008_000001.jpg", "height": 6, "width": 8}]
    found = [(a["category_id"], a["bbox"], a["area"]) for a in file["annotations"]]
    assert found == [(20, [2, 1, 5, 3], 15), (1, [0, 5, 1, 1], 1)]
    assert [c["name"] for c in file["categories"]][::19] == ["aeroplane", "tvmonitor"]
