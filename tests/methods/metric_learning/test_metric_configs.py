"""The configs: architecture, recipe, and the protocol of the nuclei."""

import pytest
from methods.project import Project, assert_nuclei_protocol, build, count
from torch import nn

from instseg_ext.engine.optim import build_optimizer, build_scheduler, effective_rate

PROJECT = Project("MetricLearning")
VOC, COCO, NUCLEI = "metric_R_101_voc", "metric_R_50_coco", "nuclei_metric_R_18"
# Stem and res2 to res5.
TRUNKS = {VOC: 42_394_816, COCO: 23_454_912}
SCALES = {VOC: [0.25, 0.5, 1.0, 2.0], COCO: [0.5, 1.0]}


def test_no_published_model_is_forgotten():
    assert set(PROJECT.published) == set(TRUNKS)
    assert NUCLEI in PROJECT.configs


@pytest.mark.parametrize("name", TRUNKS)
def test_architecture(name):
    model = build(PROJECT.config(name))
    classes = 20 if name == VOC else 80
    scales = SCALES[name]
    assert count(model.backbone) == TRUNKS[name]
    assert model.backbone.scales == tuple(scales)
    assert model.backbone.size_divisibility == (32 if 0.25 in scales else 16)
    for shape in model.backbone.output_shape().values():
        assert (shape.channels, shape.stride) == (2048, 8)
    head = model.head
    assert head.reduce.weight.shape == (256, 2048, 1, 1)
    assert len(head.embed_head.convs) == len(head.cls_head.convs) == 0
    assert head.embed_head.predictor.weight.shape == (64, 256 * len(scales), 1, 1)
    assert head.cls_head.predictor.weight.shape == (4 * (classes + 1), 256 * len(scales), 1, 1)
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}


def test_names_in_checkpoints():
    names = build(PROJECT.config(COCO, "MODEL.DEEP_METRIC.HEAD_CONVS", 2)).state_dict()
    heads = {name for name in names if not name.startswith("backbone.bottom_up.")}
    assert heads == {
        f"head.{name}"
        for name in ["reduce.weight", "reduce.bias"]
        + [
            f"{branch}.{layer}"
            for branch in ("embed_head", "cls_head")
            for layer in (
                *(f"convs.{i}.{part}" for i in (0, 1) for part in ("weight", "norm.weight")),
                *(f"convs.{i}.norm.bias" for i in (0, 1)),
                "predictor.weight",
                "predictor.bias",
            )
        ]
    }


@pytest.mark.parametrize("name", TRUNKS)
def test_recipe(name):
    cfg = PROJECT.config(name)
    node, solver = cfg.MODEL.DEEP_METRIC, cfg.SOLVER
    assert SCALES[name] == node.INPUT_SCALES
    assert (node.EMBED_DIM, node.PIXELS_PER_INSTANCE, node.LAMBDA) == (64, 10, 0.2)
    assert node.TAUS == [0.25, 0.5, 0.75, 0.9]
    assert (solver.IMS_PER_BATCH, effective_rate(cfg)) == (16, 0.0025)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 0.0001)
    assert (30_000 if name == VOC else 90_000) == solver.MAX_ITER
    assert cfg.INSTSEG.CLIP_GRAD_NORM == 10.0
    assert (node.LAMBDA_START, node.LAMBDA_END) == (0.1, 0.3)
    assert cfg.MODEL.WEIGHTS.endswith(f"MSRA/R-{cfg.MODEL.RESNETS.DEPTH}.pkl")
    assert cfg.INPUT.FORMAT == "BGR"
    assert cfg.MODEL.RESNETS.NORM == "FrozenBN"


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [(0, 0.0000025), (15_000, 0.5**0.9 * 0.0025), (29_999, (1 / 30_000) ** 0.9 * 0.0025)],
)
def test_learning_rate(iteration, rate):
    """A straight line to the power of 0.9, after the warm-up."""
    cfg = PROJECT.config(VOC)
    scheduler = build_scheduler(cfg, build_optimizer(cfg, nn.Linear(1, 1, bias=False)))
    scheduler.last_epoch = iteration
    assert scheduler.get_lr() == pytest.approx([rate], rel=0.01)


def test_nuclei_config_has_the_budget_and_data_of_the_baseline():
    assert_nuclei_protocol(PROJECT.config(NUCLEI))
