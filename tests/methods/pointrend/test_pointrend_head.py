"""PointRend's mask head against detectron2's."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import PolygonMasks
from methods.pointrend.pointrend_heads import (
    CLASSES,
    SHAPES,
    SIZE,
    config,
    detections,
    features,
    oracle,
    pair,
    proposals,
    spread,
)
from torch.utils._python_dispatch import TorchDispatchMode

from instseg_ext.methods.pointrend import subdivision
from instseg_ext.methods.pointrend.mask_head import PointRendHead
from instseg_ext.structures.matched_masks import MatchedBitMasks

VARIANTS = {
    "default": {},
    "levels": {
        "ROI_MASK_HEAD__IN_FEATURES": ("p2", "p3"),
        "POINT_HEAD__IN_FEATURES": ("p3", "p2"),
    },
    "agnostic": {"POINT_HEAD__CLS_AGNOSTIC_MASK": True},
    "coarse_once": {"POINT_HEAD__COARSE_PRED_EACH_LAYER": False},
    "one_class": {"ROI_HEADS__NUM_CLASSES": 1, "POINT_HEAD__NUM_CLASSES": 1},
    "more_classes_than_coarse_cells": {
        "ROI_HEADS__NUM_CLASSES": 50,
        "POINT_HEAD__NUM_CLASSES": 50,
    },
}


def masks_of(instances):
    return torch.cat([x.pred_masks for x in instances])


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)
def test_names_shapes_and_initial_weights_are_detectron2s(keys):
    project = oracle()
    torch.manual_seed(7)
    theirs = project.PointRendMaskHead(config(project.add_pointrend_config, **keys), SHAPES)
    torch.manual_seed(7)
    ours = PointRendHead(config(**keys), SHAPES)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_published_sizes():
    with torch.device("meta"):
        head = PointRendHead(
            config(
                ROI_HEADS__NUM_CLASSES=80,
                POINT_HEAD__NUM_CLASSES=80,
                POINT_HEAD__FC_DIM=256,
                ROI_MASK_HEAD__CONV_DIM=256,
                ROI_MASK_HEAD__FC_DIM=1024,
            ),
            {"p2": ShapeSpec(channels=256, stride=4)},
        )
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert sum(p.numel() for p in head.parameters()) == 18_461_856
    assert sum(p.numel() for p in head.point_head.parameters()) == 285_776
    assert shapes["coarse_head.reduce_spatial_dim_conv.weight"] == (256, 256, 2, 2)
    assert shapes["coarse_head.fc1.weight"] == (1024, 12544)
    assert shapes["coarse_head.prediction.weight"] == (3920, 1024)
    assert shapes["point_head.fc3.weight"] == (256, 336, 1)
    assert shapes["point_head.predictor.weight"] == (80, 336, 1)


@pytest.mark.parametrize("counts", [(1, 0), (3, 4), (31, 29)], ids=["1", "7", "60"])
def test_masks_equal_detectron2(counts):
    ours, theirs = pair()
    mine, expected = detections(counts), detections(counts)
    with torch.no_grad():
        ours.eval()(features(), mine)
        theirs.eval()(features(), expected)
    mine, expected = masks_of(mine), masks_of(expected)
    assert mine.shape == expected.shape == (sum(counts), 1, 224, 224)
    assert expected.min() < 0.4
    assert expected.max() > 0.6
    same = (mine - expected).abs() <= 2e-6
    assert float(same.float().mean()) >= 0.9999
    # what is left are cells that one of the two chose at the edge of a top-k, and ties
    assert float(((mine >= 0.5) != (expected >= 0.5)).float().mean()) <= 1e-5


def test_masks_equal_detectron2_everywhere_if_the_same_cells_are_chosen(monkeypatch):
    ours, theirs = pair()
    project = importlib.import_module("detectron2.projects.point_rend.mask_head")
    choose, chosen = project.get_uncertain_point_coords_on_grid, []

    def record(*arguments):
        chosen.append(choose(*arguments))
        return chosen[-1]

    monkeypatch.setattr(project, "get_uncertain_point_coords_on_grid", record)
    mine, expected = detections((20,)), detections((20,))
    with torch.no_grad():
        theirs.eval()(features(1), expected)
        cells = iter(chosen)
        monkeypatch.setattr(subdivision, "uncertain_cells", lambda *_: next(cells))
        ours.eval()(features(1), mine)
    assert len(chosen) == 3
    assert float((masks_of(mine) - masks_of(expected)).abs().max()) <= 1e-5


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)
def test_losses_gradients_and_masks_of_variants_equal_detectron2(keys):
    # many classes add up to large logits, whose last digits would be compared
    few = keys.get("ROI_HEADS__NUM_CLASSES", CLASSES) <= CLASSES
    ours, theirs = pair(std=0.2 if few else 0.1, **keys)
    data = proposals()
    for instances in data:
        instances.gt_classes %= keys.get("ROI_HEADS__NUM_CLASSES", CLASSES)
    maps, their_maps = features(), features()
    for level in (*maps.values(), *their_maps.values()):
        level.requires_grad_()
    torch.manual_seed(5)
    losses = ours(maps, data)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    expected = theirs(their_maps, data)
    assert torch.equal(state, torch.get_rng_state())
    assert list(losses) == list(expected) == ["loss_mask", "loss_mask_point"]
    for name in losses:
        assert abs(losses[name] - expected[name]) < 1e-6, name
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name
    for name, level in maps.items():
        if level.grad is not None:
            assert torch.allclose(level.grad, their_maps[name].grad, rtol=1e-4, atol=1e-6), name

    if keys:
        mine, their = detections((2, 1)), detections((2, 1))
        for instances in (*mine, *their):
            instances.pred_classes %= keys.get("ROI_HEADS__NUM_CLASSES", CLASSES)
        with torch.no_grad():
            ours.eval()(features(), mine)
            theirs.eval()(features(), their)
        same = (masks_of(mine) - masks_of(their)).abs() <= 2e-6
        assert float(same.float().mean()) >= 0.9999


def test_boxes_that_are_no_numbers_give_losses_that_are_none():
    """As in detectron2's head; the trainer then says which images these were."""
    ours, theirs = pair()
    for bad in (float("nan"), float("inf")):
        data = proposals()
        data[0].proposal_boxes.tensor[1, 2] = bad
        losses, expected = ours(features(), data), theirs(features(), data)
        assert expected["loss_mask_point"].isnan()
        assert all(loss.isnan() for loss in losses.values())


def test_shared_masks_give_the_same_losses():
    head = spread(PointRendHead(config(), SHAPES))
    losses = []
    for share in (False, True):
        data = proposals()
        for instances in data:
            if share:
                instances.gt_masks = MatchedBitMasks(instances.gt_masks)
        torch.manual_seed(5)
        losses.append(head(features(), data))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("counts", [(0, 0), (2, 0)], ids=["none", "half"])
@pytest.mark.parametrize("point_head", [True, False])
def test_no_foreground(counts, point_head):
    head = PointRendHead(config(ROI_MASK_HEAD__POINT_HEAD_ON=point_head), SHAPES)
    losses = head(features(), proposals(counts))
    assert list(losses) == ["loss_mask", "loss_mask_point"][: 1 + point_head]
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("counts", [(0, 0), (0, 2)], ids=["none", "half"])
def test_no_detections(counts):
    head = PointRendHead(config(), SHAPES).eval()
    with torch.no_grad():
        result = head(features(), detections(counts))
    assert [tuple(x.pred_masks.shape) for x in result] == [(n, 1, 224, 224) for n in counts]


def test_without_point_head_the_coarse_mask_is_the_result():
    head = spread(PointRendHead(config(ROI_MASK_HEAD__POINT_HEAD_ON=False), SHAPES)).eval()
    assert not [name for name in head.state_dict() if name.startswith("point_head")]
    with torch.no_grad():
        first, second = head(features(), detections((3, 0)))
    assert first.pred_masks.shape == (3, 1, 7, 7)
    assert second.pred_masks.shape == (0, 1, 7, 7)
    assert ((first.pred_masks > 0) & (first.pred_masks < 1)).all()


def test_chunks_and_order_do_not_matter():
    head = spread(PointRendHead(config(), SHAPES)).eval()
    order = torch.tensor([4, 2, 0, 1, 3])
    with torch.no_grad():
        whole = head(features(1), detections((5,)))[0].pred_masks
        head.chunk_mb = 2.5 * 4 * head.values_per_region(head.maps(features(1), 0)) / 2**20
        chunked = head(features(1), detections((5,)))[0].pred_masks
        permuted = head(features(1), [detections((5,))[0][order]])[0].pred_masks
    assert ((whole - chunked).abs() <= 1e-6).float().mean() >= 0.9999
    assert ((whole[order] - permuted).abs() <= 1e-6).float().mean() >= 0.9999


def test_weights_are_applied_to_the_maps_or_to_what_is_read_from_them():
    """The maps have fewer cells than all points together, but more than those of three regions."""
    keys = dict.fromkeys(("ROI_MASK_HEAD__IN_FEATURES", "POINT_HEAD__IN_FEATURES"), ("p2", "p3"))
    head = spread(PointRendHead(config(**keys), SHAPES)).eval()
    maps = head.maps(features(1, (480, 640)), 0)
    boxes, classes = detections((20,))[0].pred_boxes.tensor * 3, torch.arange(20) % CLASSES
    points = head.subdivision.total_points
    assert 3 * points < sum(level.rows.shape[0] for level in maps.values()) < 20 * points
    with torch.no_grad():
        many = head.predict(maps, boxes, classes)
        few = head.predict(maps, boxes[:3], classes[:3])
    assert ((many[:3] - few).abs() <= 2e-6).float().mean() >= 0.9999


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                stored = value.untyped_storage().nbytes() // value.element_size()
                self.elements = max(self.elements, stored)
        return result


def test_memory_with_many_classes():
    num, many = 50, 1203
    keys = {"ROI_HEADS__NUM_CLASSES": many, "POINT_HEAD__NUM_CLASSES": many}
    head = PointRendHead(config(POINT_HEAD__SUBDIVISION_STEPS=3, **keys), SHAPES).eval()
    with torch.no_grad(), _Largest() as largest:
        head(features(1), detections((num,)))
    assert largest.elements <= head.chunk_mb * 2**20 / 4
    assert largest.elements < num * many * 784


def test_bfloat16_keeps_coordinates_and_logits():
    head = spread(PointRendHead(config(), SHAPES)).eval()
    with torch.no_grad():
        exact = head(features(1), detections((4,)))[0].pred_masks
        with torch.autocast("cpu", torch.bfloat16):
            half = {name: level.bfloat16() for name, level in features(1).items()}
            rounded = head(half, detections((4,)))[0].pred_masks
    assert rounded.dtype == torch.float32
    assert float((exact - rounded).abs().mean()) < 0.01
    with torch.autocast("cpu", torch.bfloat16):
        losses = head.train()(features(), proposals())
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def test_traced_head_fits_other_counts_and_sizes():
    head = spread(PointRendHead(config(), SHAPES)).eval()

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, p2, boxes, classes):
            return self.head.predict(self.head.maps({"p2": p2}, 0), boxes, classes)

    def arguments(num, size):
        one = detections((num,))[0]
        return features(1, size)["p2"], one.pred_boxes.tensor, one.pred_classes

    with torch.no_grad():
        traced = torch.jit.trace(Wrapper(), arguments(2, SIZE), check_trace=False)
        other = arguments(4, (96, 240))
        assert ((traced(*other) - Wrapper()(*other)).abs() <= 1e-6).float().mean() >= 0.9999


def test_old_names_load_into_the_head():
    head = PointRendHead(config(), SHAPES)
    weights = spread(copy.deepcopy(head)).state_dict()
    old = "coarse_head.coarse_mask_fc"
    head.load_state_dict({k.replace("coarse_head.fc", old): v for k, v in weights.items()})
    assert all(torch.equal(value, weights[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ROI_MASK_HEAD__POOLER_TYPE": "ROIAlignV2"}, "MODEL.ROI_MASK_HEAD.POOLER_TYPE"),
        ({"POINT_HEAD__NUM_CLASSES": 4}, "MODEL.POINT_HEAD.NUM_CLASSES 4 must equal"),
        ({"POINT_HEAD__NAME": "Other"}, "MODEL.POINT_HEAD.NAME"),
        ({"POINT_HEAD__NUM_FC": 0}, "MODEL.POINT_HEAD.NUM_FC"),
        ({"POINT_HEAD__IN_FEATURES": ("p7",)}, "MODEL.POINT_HEAD.IN_FEATURES"),
        ({"ROI_MASK_HEAD__IN_FEATURES": ("res2",)}, "MODEL.ROI_MASK_HEAD.IN_FEATURES"),
        ({"ROI_MASK_HEAD__NUM_FC": 0}, "MODEL.ROI_MASK_HEAD.NUM_FC"),
        ({"ROI_MASK_HEAD__CONV_DIM": 13}, "MODEL.ROI_MASK_HEAD.CONV_DIM 13"),
        ({"ROI_MASK_HEAD__POOLER_RESOLUTION": 7}, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION"),
    ],
)
def test_values_that_make_no_head(keys, message):
    with pytest.raises(ValueError, match=message):
        PointRendHead(config(**keys), SHAPES)


def test_polygons_are_refused():
    head = PointRendHead(config(), SHAPES)
    data = proposals((1, 0))
    square = [10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]
    data[0].gt_masks = PolygonMasks([[square]])
    with pytest.raises(ValueError, match=r"INPUT\.MASK_FORMAT"):
        head(features(), data)
