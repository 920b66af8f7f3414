"""README and metafile say what the code and each other say."""

import re
import shlex

import pytest
from methods.project import (
    Project,
    assert_initial_weights_have_their_command,
    assert_key_table_equals_the_config,
    build,
)

from instseg_ext.engine.optim import effective_rate
from instseg_ext.methods.polarmask.config import add_polarmask_config

PROJECT = Project("PolarMask")
ABLATIONS = {
    row[0]: row[1].strip("`")
    for row in PROJECT.rows("")
    if re.match(r"`(MODEL\.POLARMASK\.|INSTSEG\.)", row[1])
}
# The columns of the table of recipes.
RECIPES = (
    "polarmask_R_50_768_1x",
    "polarmask_R_50_768_1x_32gpu",
    "polarmask_X_101_768_1x_32gpu",
    "polarmask_R_50_2x",
    "fcos_R_50_FPN_1x",
)


def recipe(row):
    """Return the numbers in each cell of a row of the table of recipes."""
    (cells,) = PROJECT.rows(f"{row}$")
    return [
        tuple(float(n.replace(",", "")) for n in re.findall(r"\d[\d,.]*", c)) for c in cells[1:]
    ]


def test_key_table_equals_the_config():
    assert_key_table_equals_the_config(PROJECT, add_polarmask_config, "POLARMASK")


def test_every_initial_weight_file_has_the_command_that_writes_it():
    assert_initial_weights_have_their_command(PROJECT, {"resnext101_64x4d"})


def test_every_file_of_the_authors_names_a_config():
    rows = PROJECT.rows("`(4gpu|32gpu|fcos_r50)")
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[1])]
    assert sorted(named) == sorted(PROJECT.published)
    for row in rows:
        assert len(re.findall("`[^`]+`", row[0])) == len(re.findall("`[^`]+`", row[1]))


def test_table_of_recipes_equals_the_configs():
    configs = [PROJECT.config(name) for name in RECIPES]
    assert recipe("images") == [(cfg.SOLVER.IMS_PER_BATCH,) for cfg in configs]
    assert recipe("learning rate") == [(pytest.approx(effective_rate(cfg)),) for cfg in configs]
    assert [n[0] for n in recipe("warm-up.*")] == [cfg.SOLVER.WARMUP_ITERS for cfg in configs]
    assert recipe("iterations") == [(cfg.SOLVER.MAX_ITER,) for cfg in configs]
    assert recipe("rate / 10 at") == [cfg.SOLVER.STEPS for cfg in configs]
    divisors = [(cfg.MODEL.POLARMASK.SIZE_DIVISIBILITY,) for cfg in configs]
    assert recipe("padding to multiples of") == divisors
    clip = [(cfg.INSTSEG.CLIP_GRAD_NORM,) if cfg.INSTSEG.CLIP_GRAD_NORM else () for cfg in configs]
    assert recipe("gradient norm.*") == clip


def test_ablations_of_the_paper_are_listed():
    text = " ".join(ABLATIONS.values())
    for rays in (18, 24, 36, 72):
        assert f"NUM_RAYS {rays}" in text
    for value in ("smooth_l1", "WITH_BOX False", "CENTER box", "fcos", "soft", "exact"):
        assert value in text


@pytest.fixture(scope="module")
def plain():
    return PROJECT.config("polarmask_R_50_768_1x")


@pytest.mark.parametrize("what", ABLATIONS)
def test_every_ablation_is_a_model(what, plain):
    cfg = PROJECT.config("polarmask_R_50_768_1x", *shlex.split(ABLATIONS[what]))
    assert (cfg == plain) == (what == "36 rays")
    # The trunk does not matter here, and takes the time.
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    model = build(cfg)
    node = cfg.MODEL.POLARMASK
    assert model.head.ray_pred.out_channels == node.NUM_RAYS
    assert (model.head.box_pred is None) == (not node.WITH_BOX)
    assert (model.head.ctrness is None) == (node.CENTERNESS == "none")


def test_every_name_in_capitals_is_a_key():
    node = PROJECT.config("polarmask_R_50_768_1x").MODEL.POLARMASK
    text = re.sub(r"```.*?```", "", PROJECT.text, flags=re.DOTALL)
    names = set(re.findall(r"`([A-Z][A-Z0-9_]+)(?: [\w.]+)?`", text))
    assert {"COORDINATES", "INIT_LENGTH", "RAY_ORIGIN"} <= names
    assert [name for name in sorted(names) if name not in node] == []
