"""Pooling from all levels (acceptance checks 4 and 14)."""

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from methods.panet.panet_toys import STRIDES, box_lists, narrow, no_boxes, pyramid, regions

from instseg_ext.methods.panet.pooler import AllLevelPooler
from instseg_ext.modeling.poolers import build_pooler

SCALES = [1 / s for s in STRIDES]


@pytest.mark.parametrize(("kind", "aligned"), [("ROIAlignV2", True), ("ROIAlign", False)])
def test_acceptance_check_4_every_level_is_plain_roi_align(kind, aligned):
    maps = pyramid(height=832, width=832, channels=3)
    boxes = [[100.0, 100, 108, 108], [10, 20, 810, 820], [5, 5, 405, 105]]
    lists = [Boxes(torch.tensor(boxes[:2])), Boxes(torch.tensor(boxes[2:]))]
    pooled = AllLevelPooler(kind, 7, SCALES, 2)(maps, lists)
    assert len(pooled) == 3
    rois = torch.tensor([[0.0, *boxes[0]], [0, *boxes[1]], [1, *boxes[2]]])
    for i, scale in enumerate(SCALES):
        expected = torchvision.ops.roi_align(maps[i], rois, 7, scale, 2, aligned)
        assert torch.equal(pooled.level(i), expected)


def test_one_call_per_level():
    calls = []
    pooled = regions()
    for pooler in pooled.poolers:
        operator = pooler.level_poolers[0]
        operator.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[1])))
    for i in range(4):
        pooled.level(i)
    assert calls == [5] * 4


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIPool", "ROIWarp"])
def test_other_kinds(kind):
    maps = pyramid()
    pooled = AllLevelPooler(kind, 4, SCALES, 2)(maps, box_lists())
    for i, scale in enumerate(SCALES):
        expected = build_pooler(kind, 4, [scale], 2)(maps[i : i + 1], box_lists())
        assert torch.equal(pooled.level(i), expected)
    assert pooled.whole_first_image().level(3).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu(dtype):
    maps = pyramid(dtype=dtype)
    pooler = AllLevelPooler("ROIAlignV2", 4, SCALES, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = pooler(maps, box_lists()).level(1)
    assert out.dtype == dtype
    expected = pooler([m.float() for m in maps], box_lists()).level(1)
    assert torch.equal(out, expected.to(dtype))


def test_no_regions():
    pooled = regions(boxes=no_boxes())
    assert len(pooled) == 0
    assert [tuple(pooled.level(i).shape) for i in range(4)] == [(0, 8, 4, 4)] * 4


def test_the_stand_in_is_the_whole_first_image():
    pooled = regions(boxes=no_boxes())
    whole = pooled.whole_first_image()
    assert [len(boxes) for boxes in whole.boxes] == [1, 0]
    assert whole.boxes[0].tensor.tolist() == [[0, 0, 96, 64]]
    one = [Boxes(torch.tensor([[0.0, 0, 96, 64]])), *no_boxes(1)]
    expected = build_pooler("ROIAlignV2", 4, [1 / 8], 2)(pooled.maps[1:2], one)
    assert torch.equal(whole.level(1), expected)


@pytest.mark.parametrize("part", ["ROI_BOX_HEAD", "ROI_MASK_HEAD"])
def test_acceptance_check_14_adaptive_sampling_is_refused(part):
    key = f"MODEL.{part}.POOLER_SAMPLING_RATIO"
    with pytest.raises(ValueError, match=f"{key} must be at least 1, not 0: .* have 2"):
        build_model(narrow([key, 0]))


def test_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"POOLER_TYPE must be one of .*'RoIAlign'"):
        build_model(narrow(["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "RoIAlign"]))
