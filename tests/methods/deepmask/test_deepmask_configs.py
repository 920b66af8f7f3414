"""The published configs: the authors' architecture and recipe."""

import pytest
from methods.project import Project, build, count
from torch import nn

import instseg_ext
from instseg_ext.engine.optim import build_optimizer, build_scheduler, effective_rate
from instseg_ext.methods.deepmask.config import canonical_size, patch_size

PROJECT = Project("DeepMask")
# Largest scale, as an exponent of 2.
DEEPMASKS = {"deepmask_R_50": 0.5, "deepmask_R_50_zoom": 1, "deepmask_VGG_A": 1}
SHARPMASKS = {"sharpmask_R_50": 0.5, "sharpmask_R_50_zoom": 1, "sharpmask_R_50_zoom2": 1.5}
NUCLEI = ("nuclei_deepmask_R_18", "nuclei_sharpmask_R_18")


def test_no_published_model_is_forgotten():
    assert set(PROJECT.published) == {*DEEPMASKS, *SHARPMASKS}
    assert {*NUCLEI} <= set(PROJECT.configs)


@pytest.mark.parametrize("name", {**DEEPMASKS, **SHARPMASKS})
def test_windows_and_scales(name):
    cfg = PROJECT.config(name)
    node, vgg = cfg.MODEL.DEEPMASK, "VGG" in name
    assert (node.INPUT_SIZE, patch_size(cfg), canonical_size(cfg)) == (
        (224, 224, 128) if vgg else (160, 192, 92)
    )
    assert (224 if vgg else 160 if name in SHARPMASKS else 112) == node.GT_SIZE
    assert node.OUT_SIZE == 56
    first, last = -2 if vgg else -2.5, {**DEEPMASKS, **SHARPMASKS}[name]
    steps = [2 ** (first + k / 2) for k in range(int(2 * (last - first)) + 1)]
    assert pytest.approx(steps, rel=1e-6) == node.TEST_SCALES
    assert (0.1 if vgg else 0.2) == node.MASK_THRESH
    assert (node.NMS_THRESH, cfg.TEST.DETECTIONS_PER_IMAGE) == (1.0, 1000)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.FORMAT) == (0, "RGB")
    assert not any(node[f"LEGACY_{part}"] for part in ("INDEXING", "PASTE", "SAMPLER"))


@pytest.mark.parametrize("name", DEEPMASKS)
def test_recipe_of_deepmask(name):
    cfg = PROJECT.config(name)
    node, solver = cfg.MODEL.DEEPMASK, cfg.SOLVER
    assert (node.SHIFT, node.SCALE, node.SCORE_FREQ) == (16, 0.25, 0.5)
    assert (node.NEG_SHIFT, node.NEG_OCTAVES) == (32, 1)
    assert (node.MASK_LOSS_WEIGHT, node.SCORE_LOSS_WEIGHT) == (32, 1)
    assert (solver.IMS_PER_BATCH, effective_rate(cfg), solver.MOMENTUM) == (64, 0.001, 0.9)
    assert (5e-5 if "VGG" in name else 5e-4) == solver.WEIGHT_DECAY
    assert (solver.WEIGHT_DECAY_BIAS, solver.WARMUP_ITERS) == (None, 0)
    assert [2 * step / 4000 for step in (*solver.STEPS, solver.MAX_ITER)] == [50, 120, 300]
    assert all(p.requires_grad for p in build(cfg).parameters())


@pytest.mark.parametrize("name", SHARPMASKS)
def test_recipe_of_sharpmask(name):
    cfg = PROJECT.config(name)
    solver = cfg.SOLVER
    assert cfg.MODEL.DEEPMASK.SCORE_FREQ == 0
    assert cfg.MODEL.SHARPMASK.DIM == 32
    assert (solver.IMS_PER_BATCH, effective_rate(cfg)) == (32, 0.001)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY, solver.STEPS) == (0, 0, ())
    assert solver.MAX_ITER / 4000 == 300
    model = build(cfg)
    trained = {p for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    assert trained == set(model.head.refine.parameters())


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [(0, 1e-3), (99_999, 1e-3), (100_000, 3.162e-4), (240_000, 1e-4), (599_999, 1e-4)],
)
def test_learning_rate(iteration, rate):
    cfg = PROJECT.config("deepmask_R_50")
    scheduler = build_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1, bias=False)))
    scheduler.last_epoch = iteration
    assert scheduler.get_lr() == pytest.approx([rate], rel=1e-3)


@pytest.mark.parametrize("name", NUCLEI)
def test_nuclei_configs_have_the_data_and_depth_of_the_others(name):
    cfg = PROJECT.config(name)
    baseline = instseg_ext.get_config("MaskRCNN/nuclei_mask_rcnn_R_18_FPN")
    for key in ("TRAIN", "TEST"):
        assert cfg.DATASETS[key] == baseline.DATASETS[key]
    assert cfg.MODEL.RESNETS.DEPTH == baseline.MODEL.RESNETS.DEPTH
    assert cfg.MODEL.WEIGHTS == ""
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 100
    assert count(build(cfg)) < 15e6


def test_nuclei_sharpmask_fits_its_deepmask():
    """It takes the windows, the trunk and both heads of the first phase as they are."""
    deep, sharp = (PROJECT.config(name) for name in NUCLEI)
    given, wanted = (
        {key: p.shape for key, p in build(cfg).state_dict().items()} for cfg in (deep, sharp)
    )
    refinement = {key for key in wanted if key.startswith("head.refine.")}
    assert refinement
    assert {key: shape for key, shape in wanted.items() if key not in refinement} == given
    assert deep.MODEL.DEEPMASK.TEST_SCALES == sharp.MODEL.DEEPMASK.TEST_SCALES
