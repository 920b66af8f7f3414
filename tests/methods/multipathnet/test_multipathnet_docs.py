"""README and metafile say what the code and each other say."""

import re

from methods.project import (
    Project,
    assert_initial_weights_have_their_command,
    assert_key_table_equals_the_config,
)

from instseg_ext.methods.multipathnet.config import add_multipathnet_config

PROJECT = Project("MultiPathNet")


def test_key_table_equals_the_config():
    assert_key_table_equals_the_config(PROJECT, add_multipathnet_config, "MULTIPATH")


def test_initial_weights_have_their_command():
    assert_initial_weights_have_their_command(
        PROJECT, ["resnet18"], others=["weights/vgg16_caffe.pth"]
    )
    assert "instseg convert --from vgg-caffe" in PROJECT.text


def test_every_name_of_a_setting_exists():
    """All that is written with its full path."""
    cfg = PROJECT.config("multipathnet_VGG_16_coco")
    text = re.sub(r"```(?:bibtex).*?```", "", PROJECT.text, flags=re.DOTALL)
    paths = set(re.findall(r"\b(?:MODEL|INSTSEG|SOLVER|DATASETS)(?:\.[A-Z][A-Z0-9_]*)+", text))
    assert {"MODEL.MULTIPATH.SCALES", "MODEL.ROI_HEADS.NAME"} <= paths
    for path in paths:
        node = cfg
        for key in path.split("."):
            assert key in node, path
            node = node[key]
