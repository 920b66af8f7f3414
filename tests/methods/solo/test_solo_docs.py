"""README and metafile say what the code and each other say."""

import re

import yaml
from detectron2.config import get_cfg

from instseg_ext import resources
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
