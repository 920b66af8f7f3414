"""Anchors of the first Faster R-CNN codes."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.modeling.box_regression import Box2BoxTransform

from instseg_ext.modeling.legacy_anchors import LegacyAnchorGenerator, legacy_cell_anchors

# (width, height) for ratios 0.5, 1 and 2, of the models with a pyramid.
TABLE = {
    4: (32, [(48, 24), (32, 32), (24, 48)]),
    8: (64, [(88, 48), (64, 64), (48, 96)]),
    16: (128, [(184, 96), (128, 128), (88, 176)]),
    32: (256, [(360, 176), (256, 256), (184, 368)]),
    64: (512, [(728, 368), (512, 512), (360, 720)]),
}


def generator():
    cfg = get_cfg()
    node = cfg.MODEL.ANCHOR_GENERATOR
    node.NAME, node.SIZES = "LegacyAnchorGenerator", [[size] for size, _ in TABLE.values()]
    return build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in TABLE])


@pytest.mark.parametrize("stride", TABLE)
def test_sides_equal_the_table(stride):
    size, expected = TABLE[stride]
    x0, y0, x1, y1 = legacy_cell_anchors(stride, [size], [0.5, 1.0, 2.0]).unbind(1)
    assert list(zip((x1 - x0).tolist(), (y1 - y0).tolist(), strict=True)) == expected
    assert not (x0 + x1).any()
    assert not (y0 + y1).any()


def test_first_cell_and_steps():
    anchors = generator()
    assert isinstance(anchors, LegacyAnchorGenerator)
    boxes = anchors([torch.zeros(1, 1, 64 // s, 128 // s) for s in TABLE])
    assert [len(b) for b in boxes] == [3 * (64 // s) * (128 // s) for s in TABLE]
    first = boxes[0].tensor
    assert first[:3].tolist() == [[-22, -10, 26, 14], [-14, -14, 18, 18], [-10, -22, 14, 26]]
    assert (first[3:6] - first[:3]).tolist() == [[4, 0, 4, 0]] * 3  # along a row
    assert (first[96:99] - first[:3]).tolist() == [[0, 4, 0, 4]] * 3  # 32 cells later
    assert anchors.num_anchors == [3] * 5
    assert not anchors.state_dict()


def test_several_sizes_go_before_ratios():
    every = legacy_cell_anchors(16, [128, 256, 512], [0.5, 1.0, 2.0])
    assert every.shape == (9, 4)
    for i, size in enumerate((128, 256, 512)):
        one = legacy_cell_anchors(16, [size], [0.5, 1.0, 2.0])
        assert torch.equal(every[3 * i : 3 * i + 3], one)
        assert torch.equal(one, every[:3] * (size / 128))


def test_no_deltas_give_the_anchor_back():
    """Widths with the old codes' +1 are those of the continuous box."""
    anchors = generator()([torch.zeros(1, 1, 64 // s, 64 // s) for s in TABLE])[2].tensor
    deltas = torch.zeros(len(anchors), 4)
    assert torch.equal(Box2BoxTransform((1.0,) * 4).apply_deltas(deltas, anchors), anchors)
    inclusive = anchors - torch.tensor([0.0, 0, 1, 1])
    wide = inclusive[:, 2] - inclusive[:, 0] + 1
    assert torch.equal(wide, anchors[:, 2] - anchors[:, 0])
