"""README and metafile say what the code and each other say."""

import re

from methods.project import Project, assert_key_table_equals_the_config

from instseg_ext.methods.fcis.config import add_fcis_config

PROJECT = Project("FCIS")


def test_key_table_equals_the_config():
    assert_key_table_equals_the_config(PROJECT, add_fcis_config, "FCIS")


def test_every_name_of_a_setting_exists():
    """All that is written with its full path."""
    cfg = PROJECT.config("fcis_R_101_ohem_coco")
    text = re.sub(r"```(?:bibtex).*?```", "", PROJECT.text, flags=re.DOTALL)
    paths = set(re.findall(r"\b(?:MODEL|INSTSEG|SOLVER)(?:\.[A-Z][A-Z0-9_]*)+", text))
    assert {"MODEL.FCIS.LEGACY_BOXES", "MODEL.RESNETS.RES5_DILATION"} <= paths
    for path in paths:
        node = cfg
        for key in path.split("."):
            assert key in node, path
            node = node[key]
