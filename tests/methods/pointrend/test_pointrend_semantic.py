"""The semantic head, against detectron2's."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils import comm
from methods.pointrend.pointrend_heads import oracle

import instseg_ext
from instseg_ext.layers import reduce
from instseg_ext.methods.pointrend.config import add_pointrend_config
from instseg_ext.methods.pointrend.semantic import (
    PointRendSemanticHead,
    point_labels,
    top_margin,
)

CLASSES = 5
SHAPES = {f"p{n}": ShapeSpec(channels=8, stride=2**n) for n in (2, 3, 4, 5)}
SIZE = (96, 128)  # padded images; coarse logits have a quarter of it
LEVELS = (["p2"], ["p2", "p4"])


def add_keys(cfg, **keys):
    """Keys of a narrow head; ``POINT_HEAD__FC_DIM=8`` sets ``MODEL.POINT_HEAD.FC_DIM``."""
    values = {
        "SEM_SEG_HEAD__NAME": "PointRendSemanticHead",
        "SEM_SEG_HEAD__NUM_CLASSES": CLASSES,
        "SEM_SEG_HEAD__CONVS_DIM": 32,
        "POINT_HEAD__NUM_CLASSES": CLASSES,
        "POINT_HEAD__FC_DIM": 16,
        "POINT_HEAD__TRAIN_NUM_POINTS": 40,
        "POINT_HEAD__SUBDIVISION_STEPS": 2,
        "POINT_HEAD__SUBDIVISION_NUM_POINTS": 300,
        "POINT_HEAD__COARSE_PRED_EACH_LAYER": False,
        **keys,
    }
    for key, value in values.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


def config(add=add_pointrend_config, **keys):
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    add(cfg)
    return add_keys(cfg, **keys)


def spread(head):
    """Give a head weights with which classes differ from point to point."""
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head


def pair(**keys):
    """Our head and detectron2's with the same weights."""
    project = oracle()
    theirs = SEM_SEG_HEADS_REGISTRY.get("PointRendSemSegHead")(
        config(project.add_pointrend_config, **keys), SHAPES
    )
    ours = PointRendSemanticHead(config(**keys), SHAPES)
    ours.load_state_dict(spread(theirs).state_dict())
    return ours, theirs


def features(num=2):
    gen = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(num, 8, SIZE[0] // s.stride, SIZE[1] // s.stride, generator=gen)
        for name, s in SHAPES.items()
    }


def labels(ignore=255, num=2):
    """Blocks of 8 pixels of one label each, a tenth of them ignored, and ignored padding."""
    gen = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, CLASSES, (num, SIZE[0] // 8, SIZE[1] // 8), generator=gen)
    blocks[torch.rand(blocks.shape, generator=gen) < 0.1] = ignore
    result = blocks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    result[:, :, -11:] = ignore
    return result


def losses_and_gradients(head, targets):
    maps = {name: value.requires_grad_() for name, value in features().items()}
    torch.manual_seed(5)
    _, losses = head.train()(maps, targets)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    return losses, gradients | {name: value.grad for name, value in maps.items()}


@pytest.mark.parametrize("each_layer", [False, True])
def test_names_shapes_and_initial_weights_are_detectron2s(each_layer):
    project = oracle()
    keys = {"POINT_HEAD__COARSE_PRED_EACH_LAYER": each_layer}
    torch.manual_seed(0)
    ours = PointRendSemanticHead(config(**keys), SHAPES).state_dict()
    torch.manual_seed(0)
    theirs = SEM_SEG_HEADS_REGISTRY.get("PointRendSemSegHead")(
        config(project.add_pointrend_config, **keys), SHAPES
    ).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    parts = {name.split(".")[1] for name in ours if name.startswith("coarse")}
    assert parts == {"p2", "p3", "p4", "p5", "predictor"}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("ignore", [255, -1])
def test_losses_and_gradients_equal_detectron2(levels, ignore):
    keys = {"POINT_HEAD__IN_FEATURES": levels, "SEM_SEG_HEAD__IGNORE_VALUE": ignore}
    ours, theirs = pair(**keys)
    targets = labels(ignore)
    losses, gradients = losses_and_gradients(ours, targets)
    expected, wanted = losses_and_gradients(theirs, targets)
    assert losses.keys() == expected.keys() == {"loss_sem_seg", "loss_sem_seg_point"}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), abs=1e-6, rel=1e-6)
    for name, value in gradients.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_logits_equal_detectron2(levels, steps, monkeypatch):
    """Where steps are left out, the logits are enlarged to the size of the image at last."""
    ours, theirs = pair(POINT_HEAD__IN_FEATURES=levels, POINT_HEAD__SUBDIVISION_STEPS=steps)
    if len(levels) > 1:
        module = pytest.importorskip("detectron2.projects.point_rend.semantic_seg")
        monkeypatch.setattr(module, "cat", functools.partial(torch.cat, dim=1))
    with torch.no_grad():
        (logits, none), (expected, _) = ours.eval()(features()), theirs.eval()(features())
    if steps < 2:
        expected = torch.nn.functional.interpolate(
            expected, scale_factor=4 // 2**steps, mode="bilinear", align_corners=False
        )
    assert none == {}
    assert logits.shape == (2, CLASSES, *SIZE)
    differs = (logits - expected).abs().amax(dim=1) > 2e-5
    # a tie at the edge of the chosen cells may fall either way
    assert differs.float().mean() <= 1e-4
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 0.9999


def test_points_change_the_label_map():
    ours, _ = pair()
    with torch.no_grad():
        logits, _ = ours.eval()(features())
        coarse = ours.coarse_sem_seg_head.layers(features())
    plain = coarse
    for _ in range(2):
        plain = torch.nn.functional.interpolate(plain, scale_factor=2, mode="bilinear")
    changed = (logits != plain).any(dim=1).flatten(1).sum(dim=1)
    # 300 cells in the last step; each of the 300 before reaches the pixels around it
    assert (changed >= 300).all()
    assert (changed <= 300 + 300 * 16).all()
    assert (logits.argmax(1) != plain.argmax(1)).any()


@pytest.mark.parametrize("ignore", [255, -1])
def test_images_without_labels_are_finite(ignore):
    ours = spread(PointRendSemanticHead(config(SEM_SEG_HEAD__IGNORE_VALUE=ignore), SHAPES))
    losses, gradients = losses_and_gradients(ours, torch.full_like(labels(), ignore))
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    assert all(not value.any() for value in gradients.values())


def test_one_image_without_labels_changes_nothing_for_the_other():
    ours, theirs = pair()
    targets = labels()
    targets[1] = 255
    losses, _ = losses_and_gradients(ours, targets)
    expected, _ = losses_and_gradients(theirs, targets)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-6)


def test_global_normaliser_divides_by_the_mean_count(monkeypatch):
    """A process with as many labels as the average has the same losses as under local."""
    ours, _ = pair()
    local, _ = losses_and_gradients(ours, labels())
    ours.loss_normalizer = "global"
    alone, _ = losses_and_gradients(ours, labels())
    module = "instseg_ext.methods.pointrend.semantic.mean_over_processes"
    monkeypatch.setattr(module, lambda count: reduce.mean_over_processes(count) * 2)
    half, _ = losses_and_gradients(ours, labels())
    assert comm.get_world_size() == 1
    for name, value in local.items():
        assert alone[name].item() == pytest.approx(value.item(), rel=1e-6)
        assert half[name].item() == pytest.approx(value.item() / 2, rel=1e-6)


def test_margin_is_that_of_the_two_highest():
    logits = torch.randn(3, CLASSES, 50)
    highest = logits.topk(2, dim=1).values
    assert torch.equal(top_margin(logits), highest[:, 0] - highest[:, 1])


def test_labels_come_from_the_nearest_pixel():
    targets = torch.arange(12).view(1, 3, 4)
    points = torch.tensor([[[0.0, 0.0], [0.3, 0.1], [0.9, 0.5], [1.0, 1.0]]])
    assert point_labels(targets, points).tolist() == [[0, 1, 7, 11]]


def test_a_traced_head_takes_maps_of_other_sizes():
    ours, _ = pair()
    ours.eval()
    names = list(SHAPES)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = ours

        def forward(self, *maps):
            return self.head(dict(zip(names, maps, strict=True)))[0]

    first = features()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a comparison that is the same for all such sizes
        traced = torch.jit.trace(Logits(), tuple(first.values()), check_trace=False)
        other = tuple(torch.randn(1, 8, 128 // s.stride, 160 // s.stride) for s in SHAPES.values())
        logits, expected = traced(*other), Logits()(*other)
    differs = (logits - expected).abs().amax(dim=1) > 2e-5
    assert logits.shape == (1, CLASSES, 128, 160)
    assert differs.float().mean() <= 1e-4


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"POINT_HEAD__NUM_CLASSES": 4}, "must equal MODEL.SEM_SEG_HEAD.NUM_CLASSES 5"),
        (
            {"POINT_HEAD__NUM_CLASSES": 1, "SEM_SEG_HEAD__NUM_CLASSES": 1},
            "NUM_CLASSES must be at least 2",
        ),
        ({"POINT_HEAD__CLS_AGNOSTIC_MASK": True}, "CLS_AGNOSTIC_MASK to False"),
        ({"POINT_HEAD__IN_FEATURES": ["p9"]}, "must name some of the backbone's maps: p2, p3"),
        ({"POINT_HEAD__SUBDIVISION_STEPS": 5}, "set it to 2 or less"),
        ({"POINT_HEAD__SUBDIVISION_STEPS": -1}, "must not be negative"),
        ({"POINT_HEAD__NAME": "ImplicitPointHead"}, "must be one of StandardPointHead"),
    ],
)
def test_impossible_values_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        PointRendSemanticHead(config(**keys), SHAPES)
