"""README and metafile say what the code and each other say."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from detectron2.config import get_cfg
from methods.project import Project, build

from instseg_ext.methods.pointrend.config import add_pointrend_config

PROJECT = Project("PointRend")
PLAIN = "pointrend_rcnn_R_50_FPN_1x_coco"
NODES = (
    "INPUT",
    "INPUT.CROP",
    "MODEL.ROI_MASK_HEAD",
    "MODEL.POINT_HEAD",
    "MODEL.IMPLICIT_POINTREND",
)
ABLATIONS = {
    row[0]: (row[1].strip("`"), int(row[-1]))
    for row in PROJECT.rows("")
    if re.match(r"`MODEL\.\S+ ", row[1]) and row[-1].isdigit()
}
# The columns of the table of recipes.
RECIPES = (PLAIN, "pointrend_rcnn_R_50_FPN_3x_coco", "pointrend_rcnn_R_50_FPN_1x_cityscapes")


def look_up(cfg, key):
    """Return what stands under a dotted key; an empty dict if nothing does."""
    for name in key.split("."):
        cfg = cfg.get(name, {})
    return cfg


def test_key_table_equals_the_config():
    plain, cfg = get_cfg(), get_cfg()
    add_pointrend_config(cfg)
    rows = PROJECT.rows(r"`(MODEL|INPUT)\.")
    table = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows}
    added = {
        f"{node}.{key}"
        for node in NODES
        for key in set(look_up(cfg, node)) - set(look_up(plain, node))
    }
    assert set(table) == added
    for key, value in table.items():
        default = look_up(cfg, key)
        assert value == (list(default) if isinstance(default, tuple) else default), key


def test_every_full_key_exists():
    cfg = PROJECT.config(PLAIN)
    keys = re.findall(
        r"\b((?:MODEL|INPUT|DATASETS|INSTSEG|SOLVER)(?:\.[A-Z0-9_]+)+)\b", PROJECT.text
    )
    assert len(set(keys)) > 25
    assert [key for key in sorted(set(keys)) if look_up(cfg, key) == {}] == []


def test_every_short_key_exists():
    model = PROJECT.config(PLAIN).MODEL
    known = {*model.POINT_HEAD, *model.ROI_MASK_HEAD, *model.IMPLICIT_POINTREND}
    names = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)(?: [\w.]+)?`", PROJECT.text))
    assert {"TRAIN_SAMPLING", "POINT_HEAD_ON", "SUBDIVISION_STEPS"} <= names
    assert names <= known


def test_every_published_file_names_a_config():
    """All but Implicit PointRend's have one."""
    pattern = r"\| `(?:Instance|Semantic)Segmentation/(\w+)/\d+/model_final_\w{6}\.pkl` \|"
    files = re.findall(pattern, PROJECT.text)
    assert sorted(files) == [name for name in sorted(PROJECT.published) if "implicit" not in name]


def test_table_of_recipes_equals_the_configs():
    configs = [PROJECT.config(name) for name in RECIPES]

    def recipe(row):
        (cells,) = PROJECT.rows(f"{row}$")
        return [
            tuple(float(n.replace(",", "")) for n in re.findall(r"\d[\d,.]*", cell))
            for cell in cells[1:]
        ]

    assert recipe("images") == [(cfg.SOLVER.IMS_PER_BATCH,) for cfg in configs]
    assert recipe("learning rate") == [(cfg.SOLVER.BASE_LR,) for cfg in configs]
    assert recipe("iterations") == [(cfg.SOLVER.MAX_ITER,) for cfg in configs]
    assert recipe("rate / 10 at") == [cfg.SOLVER.STEPS for cfg in configs]
    assert recipe("shortest edge, tests") == [(cfg.INPUT.MIN_SIZE_TEST,) for cfg in configs]


def test_ablations_of_the_paper_are_listed():
    text = " ".join(keys for keys, _ in ABLATIONS.values())
    for value in ("OVERSAMPLE_RATIO 10", "RATIO 1.0", "uniform", "grid", "STEPS 2", "'p5'"):
        assert value in text


@pytest.mark.parametrize("what", ABLATIONS)
def test_every_ablation_is_a_model(what):
    keys, side = ABLATIONS[what]
    cfg = PROJECT.config(PLAIN, *shlex.split(keys))
    assert (cfg == PROJECT.config(PLAIN)) == what.endswith("as published")
    # The trunk does not matter here, and takes the time.
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    assert build(cfg).roi_heads.mask_head.final_side == side
