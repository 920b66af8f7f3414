"""The project page says what the code says."""

import re

import yaml
from detectron2.config import get_cfg
from methods.project import Project

from instseg_ext.methods.deepmask.config import add_deepmask_config

PROJECT = Project("DeepMask")


def test_key_table_equals_the_config():
    """Every key of both nodes stands on the page with its default, and no other."""
    cfg = get_cfg()
    add_deepmask_config(cfg)
    rows = PROJECT.rows("`[A-Z]")
    table = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows}
    sharp = {f"SHARPMASK.{key}": value for key, value in cfg.MODEL.SHARPMASK.items()}
    assert table == {**cfg.MODEL.DEEPMASK, **sharp}


def test_every_name_of_a_setting_exists():
    """All that is written with its full path."""
    cfg = PROJECT.config("sharpmask_R_50")
    text = re.sub(r"```(?:bibtex).*?```", "", PROJECT.text, flags=re.DOTALL)
    paths = set(re.findall(r"\b(?:MODEL|INSTSEG|SOLVER)(?:\.[A-Z][A-Z0-9_]*)+", text))
    assert {"MODEL.DEEPMASK.TEST_SCALES", "MODEL.SHARPMASK.FREEZE_TRUNK"} <= paths
    for path in paths:
        node = cfg
        for key in path.split("."):
            assert key in node, path
            node = node[key]
