"""README and metafile say what the code and each other say."""

import re

from methods.project import Project, assert_key_table_equals_the_config

from instseg_ext.methods.metric_learning.config import add_metric_config

PROJECT = Project("MetricLearning")


def test_key_table_equals_the_config():
    assert_key_table_equals_the_config(PROJECT, add_metric_config, "DEEP_METRIC")


def test_every_name_of_a_setting_exists():
    """Names with their full path, and names in capitals, which are keys of the method."""
    cfg = PROJECT.config("metric_R_50_coco")
    text = re.sub(r"```(?:bibtex).*?```", "", PROJECT.text, flags=re.DOTALL)
    paths = set(re.findall(r"\b(?:MODEL|INSTSEG|SOLVER|TEST)(?:\.[A-Z][A-Z0-9_]*)+", text))
    assert {"MODEL.RESNETS.RES5_DILATION", "INSTSEG.ACCUMULATE"} <= paths
    for path in paths:
        node = cfg
        for key in path.split("."):
            assert key in node, path
            node = node[key]
    names = set(re.findall(r"`([A-Z][A-Z0-9_]+)(?: [^`]*)?`", text))
    assert {"COORD_UNIT", "ALPHA"} <= names
    assert [name for name in sorted(names) if name not in cfg.MODEL.DEEP_METRIC] == []
