"""README and metafile say what the code and each other say."""

import re

from methods.project import Project, assert_key_table_equals_the_config

from instseg_ext.methods.panet.config import add_panet_config

PROJECT = Project("PANet")


def test_key_table_equals_the_config():
    assert_key_table_equals_the_config(PROJECT, add_panet_config, "PANET")


def test_every_file_of_the_authors_names_a_config():
    rows = PROJECT.rows("`e2e_panet")
    assert sorted(row[1].strip("`") for row in rows) == sorted(PROJECT.published)


def test_every_name_of_a_setting_exists():
    """All that is written as KEY VALUE, or with its full path."""
    cfg = PROJECT.config("panet_R_50_FPN_2x_mask")
    text = re.sub(r"```(?:bibtex).*?```", "", PROJECT.text, flags=re.DOTALL)
    paths = set(re.findall(r"\b(?:MODEL|INSTSEG|SOLVER)(?:\.[A-Z][A-Z0-9_]*)+", text))
    assert {"MODEL.PANET.FC_FUSION", "MODEL.ROI_BOX_HEAD.NUM_CONV"} <= paths
    for path in paths:
        node = cfg
        for key in path.split("."):
            assert key in node, path
            node = node[key]
