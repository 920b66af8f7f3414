"""Implicit PointRend against detectron2's."""

from __future__ import annotations

import pytest
import torch
from methods.pointrend.pointrend_heads import (
    SHAPES,
    config,
    detections,
    features,
    pair,
    proposals,
    spread,
)

from instseg_ext.methods.pointrend import implicit
from instseg_ext.methods.pointrend.implicit import ImplicitPointHead, ImplicitPointRendHead

KEYS = {
    "POINT_HEAD__NAME": "ImplicitPointHead",
    "POINT_HEAD__SUBDIVISION_STEPS": 2,
    "POINT_HEAD__FC_DIM": 8,
}
VARIANTS = {
    "default": {},
    "features": {"IMPLICIT_POINTREND__POS_ENC_ENABLED": False},
    "positions": {"IMPLICIT_POINTREND__IMAGE_FEATURE_ENABLED": False},
    "agnostic": {"POINT_HEAD__CLS_AGNOSTIC_MASK": True},
}


def both(**keys):
    return pair(ImplicitPointRendHead, "ImplicitPointRendMaskHead", std=0.12, **KEYS, **keys)


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)
def test_losses_gradients_and_masks_equal_detectron2(keys):
    ours, theirs = both(**keys)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(5)
    losses = ours(features(), proposals())
    torch.manual_seed(5)
    expected = theirs(features(), proposals())
    assert list(losses) == list(expected) == ["loss_l2", "loss_mask_point"]
    for name in losses:
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert float((p.grad - q.grad).abs().max()) <= 1e-4 * float(q.grad.abs().max()), name

    mine, their = detections(), detections()
    with torch.no_grad():
        ours.eval()(features(), mine)
        theirs.eval()(features(), their)
    for a, b in zip(mine, their, strict=True):
        assert a.pred_masks.shape == b.pred_masks.shape == (len(a), 1, 112, 112)
        assert float(((a.pred_masks - b.pred_masks).abs() <= 1e-5).float().mean()) >= 0.999
        assert 0 < float((b.pred_masks >= 0.5).float().mean()) < 1


def test_chunks_do_not_matter_and_the_large_layer_runs_once(monkeypatch):
    head = spread(ImplicitPointRendHead(config(**KEYS), SHAPES), 0.12).eval()
    calls = []
    head.parameter_head.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        whole = head(features(1), detections((7,)))[0].pred_masks
        head.chunk_mb = 1e-3
        chunked = head(features(1), detections((7,)))[0].pred_masks
        assert len(calls) == 2
        monkeypatch.setattr(implicit, "_REGIONS_AT_ONCE", 3)
        several = head(features(1), detections((7,)))[0].pred_masks
        assert len(calls) == 5
    for masks in (chunked, several):
        assert ((whole - masks).abs() <= 1e-5).float().mean() >= 0.999


def test_published_sizes():
    head = ImplicitPointHead(256, num_classes=80)
    assert head.num_params == 283_472
    assert head.positional_encoding_gaussian_matrix.shape == (2, 128)


def test_layout_of_the_parameters():
    head = ImplicitPointHead(256, num_classes=80)
    parameters = torch.zeros(1, head.num_params)
    arguments = torch.randn(1, 256, 3), torch.rand(1, 3, 2)
    assert not head(*arguments, parameters, torch.tensor([7])).any()
    parameters[:, : 512 * 256] = 1
    weights, biases = head._split(parameters)
    assert [bool(x.all()) for x in weights] == [True, False, False, False]
    assert [bool(x.any()) for x in weights] == [True, False, False, False]
    assert not any(bool(x.any()) for x in biases)
    parameters[:, -80 + 7] = 2.5
    assert torch.equal(head(*arguments, parameters, torch.tensor([7])), torch.full((1, 3), 2.5))


@pytest.mark.parametrize("counts", [(0, 0), (2, 0)], ids=["none", "half"])
def test_no_regions(counts):
    head = spread(ImplicitPointRendHead(config(**KEYS), SHAPES))
    losses = head(features(), proposals(counts))
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        result = head.eval()(features(), detections(counts))
    assert [tuple(x.pred_masks.shape) for x in result] == [(n, 1, 112, 112) for n in counts]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"POINT_HEAD__NAME": "StandardPointHead"}, "MODEL.POINT_HEAD.NAME"),
        ({"POINT_HEAD__NUM_FC": 0}, "MODEL.POINT_HEAD.NUM_FC"),
        ({"POINT_HEAD__TRAIN_NUM_POINTS": 0}, "MODEL.POINT_HEAD.TRAIN_NUM_POINTS"),
        ({"POINT_HEAD__SUBDIVISION_NUM_POINTS": 785}, "SUBDIVISION_NUM_POINTS, not 785"),
        (
            {
                "IMPLICIT_POINTREND__POS_ENC_ENABLED": False,
                "IMPLICIT_POINTREND__IMAGE_FEATURE_ENABLED": False,
            },
            "MODEL.IMPLICIT_POINTREND.IMAGE_FEATURE_ENABLED",
        ),
    ],
)
def test_values_that_make_no_head(keys, message):
    with pytest.raises(ValueError, match=message):
        ImplicitPointRendHead(config(**{**KEYS, **keys}), SHAPES)
