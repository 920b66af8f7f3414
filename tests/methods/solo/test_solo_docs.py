"""README and metafile say what the code and each other say."""

import re

import torchvision
import yaml
from detectron2.config import get_cfg

import instseg_ext
from instseg_ext import resources
from instseg_ext.config import config_names
from instseg_ext.methods.solo.config import add_solo_config

PROJECT = resources.root() / "projects" / "SOLO"


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
    add_solo_config(cfg)
    rows = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in readme_rows("`[A-Z]")}
    assert rows == dict(leaves(cfg.MODEL.SOLO))


def test_every_initial_weight_file_has_the_command_that_writes_it():
    text = (PROJECT / "README.md").read_text()
    names = [name for name in config_names() if name.startswith("SOLO/")]
    files = {instseg_ext.get_config(name).MODEL.WEIGHTS for name in names}
    local = {file for file in files if file and "://" not in file}
    assert len(local) == 4
    for file in local:
        model = file.removeprefix("weights/").removesuffix("_torchvision.pth")
        url = torchvision.models.get_model_weights(model).IMAGENET1K_V1.url
        assert f"instseg convert --from torchvision {url} {file}\n" in text
