"""README and metafile say what the code and each other say."""

from methods.project import (
    Project,
    assert_initial_weights_have_their_command,
    assert_key_table_equals_the_config,
)

from instseg_ext.methods.solo.config import add_solo_config

PROJECT = Project("SOLO")


def test_key_table_equals_the_config():
    assert_key_table_equals_the_config(PROJECT, add_solo_config, "SOLO")


def test_every_initial_weight_file_has_the_command_that_writes_it():
    names = {"resnet18", "resnet34", "resnet101", "resnext101_64x4d"}
    assert_initial_weights_have_their_command(PROJECT, names)
