"""Crops, what is pooled from them, and how it is normalised (acceptance checks 1 and 3)."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from methods.multipathnet.multipathnet_toys import features_of
from torch import nn

from instseg_ext.methods.multipathnet.regions import FovealPooler, SkipNorm, View, foveal_boxes
from instseg_ext.modeling.poolers import build_pooler

SCALES = (1.0, 1.5, 2.0, 4.0)
VIEWS = [*(View(*pair) for pair in zip(SCALES, (3, 2, 2, 1), strict=True)), View(1.5, 3)]


def test_acceptance_check_1_foveal_boxes():
    boxes = torch.tensor([[10.0, 20, 30, 60], [5, 5, 5, 9]])
    crops = torch.stack([foveal_boxes(boxes, scale) for scale in SCALES])
    assert crops[:, 0].tolist() == [
        [10, 20, 30, 60], [5, 10, 35, 70], [0, 0, 40, 80], [-20, -40, 60, 120]
    ]  # fmt: skip
    sides = crops[..., 2:] - crops[..., :2]
    areas = sides[:, 0].prod(dim=1)
    assert (areas / areas[0]).tolist() == [1, 2.25, 4, 16]
    centres = crops[..., 2:] + crops[..., :2]
    assert torch.equal(centres, centres[:1].expand_as(centres))
    assert crops[:, 1].isfinite().all()
    assert sides[:, 1, 0].tolist() == [0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acceptance_check_3_every_crop_of_a_map_has_the_norm(dtype):
    pooled = torch.randn(5, 8, 7, 7) * torch.tensor([1e-3, 1, 30, 1, 1e3]).view(-1, 1, 1, 1)
    pooled[3] = 0
    norms = SkipNorm("l2", 1000.0, ())(pooled.to(dtype), 0).flatten(1).norm(dim=1)
    # the smallest crop has an energy near the constant that keeps zeros zero
    assert norms[[1, 2, 4]].tolist() == pytest.approx([1000] * 3, rel=1e-3)
    assert norms[3] == 0
    assert norms[0] == pytest.approx(1000, rel=1e-2)


def test_large_values_do_not_overflow():
    pooled = torch.full((1, 1280, 7, 7), 300.0, dtype=torch.float16)
    assert pooled.square().sum().isinf()
    assert SkipNorm("l2", 1000.0, ())(pooled, 0).norm() == pytest.approx(1000, rel=1e-3)


def test_other_norms():
    pooled = torch.randn(2, 4, 7, 7)
    assert torch.equal(SkipNorm("constant", 0.0, (1.0, 0.5))(pooled, 1), pooled * 0.5)
    assert SkipNorm("none", 0.0, ())(pooled, 0) is pooled


class Counted(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.pooler, self.calls = build_pooler("ROIAlignV2", 7, [1 / stride], 0), 0

    def forward(self, maps, boxes):
        self.calls += 1
        return self.pooler(maps, boxes)


def test_each_crop_of_a_map_is_pooled_once():
    poolers = [Counted(stride) for stride in (16, 8, 4)]
    pool = FovealPooler(poolers, SkipNorm("none", 0.0, ()), VIEWS)
    features = features_of(images=2)
    maps = [features[name] for name in ("p4", "p3", "p2")]
    boxes = [Boxes(torch.tensor([[10.0, 8, 30, 60]])), Boxes(torch.tensor([[0.0, 0, 64, 64]]))]
    pooled = pool(maps, boxes)
    assert [pooler.calls for pooler in poolers] == [4, 3, 2]
    assert [len(of_view) for of_view in pooled] == [3, 2, 2, 1, 3]
    # crop by crop, map by map
    for view, of_view in zip(VIEWS, pooled, strict=True):
        crops = [Boxes(foveal_boxes(x.tensor, view.scale)) for x in boxes]
        for pooler, level, found in zip(poolers, maps, of_view, strict=False):
            assert torch.equal(found, pooler.pooler([level], crops))
    assert pooled[1][0] is pooled[4][0]


def test_a_crop_outside_the_image_is_zero():
    pool = FovealPooler(
        [build_pooler("ROIAlignV2", 7, [1 / 16], 2)], SkipNorm("l2", 10.0, ()), [View(4.0, 1)]
    )
    # whose far corners lie outside
    found = pool([features_of()["p4"]], [Boxes(torch.tensor([[0.0, 0, 32, 32]]))])[0][0]
    assert found[0, :, 0].eq(0).all()
    assert float(found.norm()) == pytest.approx(10, rel=1e-3)
    far = pool([features_of()["p4"]], [Boxes(torch.tensor([[900.0, 900, 932, 932]]))])[0][0]
    assert far.eq(0).all()
    assert not math.isnan(float(far.sum()))
