"""The config keys are those of detectron2's project."""

from __future__ import annotations

from detectron2.config import get_cfg
from methods.pointrend.pointrend_heads import oracle

from instseg_ext.methods.pointrend.config import add_pointrend_config


def test_keys_and_defaults_are_detectron2s():
    ours, theirs = get_cfg(), get_cfg()
    add_pointrend_config(ours)
    oracle().add_pointrend_config(theirs)
    assert ours.MODEL.POINT_HEAD.pop("TRAIN_SAMPLING") == "importance"
    assert ours == theirs
