"""Sizes and beginnings of the towers (acceptance checks 2 and 4)."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from methods.multipathnet.multipathnet_toys import heads_of
from methods.project import Project, build, count

from instseg_ext.methods.multipathnet.towers import Mixer, MultiPathBoxHead, SharedLayers, Tower

PROJECT = Project("MultiPathNet")


def test_acceptance_check_2_published_sizes():
    heads = build(PROJECT.config("multipathnet_VGG_16_coco")).roi_heads
    towers = heads.box_head.towers
    assert [tower.mix.in_channels for tower in towers] == [1280, 1024, 1024, 512, 1280]
    assert {tower.mix.out_channels for tower in towers} == {512}
    assert {tuple(tower.fc6.weight.shape) for tower in towers} == {(4096, 25088)}
    assert {tuple(tower.fc7.weight.shape) for tower in towers} == {(4096, 4096)}
    assert (heads.box_head.class_dim, heads.box_head.box_dim) == (16384, 4096)
    predictor = heads.box_predictor
    assert [tuple(x.weight.shape) for x in predictor.cls_score] == [(81, 16384)] * 6
    assert predictor.bbox_pred.weight.shape == (320, 4096)
    # The authors' box layer has four more rows, of the background, which nothing reads.
    assert count(heads) + 4 * 4097 == 609_643_818


def test_released_model():
    heads = build(PROJECT.config("fast_rcnn_integral_R_18_coco")).roi_heads
    (tower,) = heads.box_head.towers
    assert [block.stride for block in tower.blocks] == [2, 1]
    assert (heads.box_head.class_dim, heads.box_head.box_dim) == (512, 512)
    assert [tuple(x.weight.shape) for x in heads.box_predictor.cls_score] == [(81, 512)] * 6
    assert heads.box_pooler.poolers[0].output_size == (14, 14)


def test_acceptance_check_4_constant_factors_begin_as_the_first_map_alone():
    mixer = Mixer(12, 8, copied=8)
    maps = torch.randn(3, 8, 7, 7), torch.randn(3, 4, 7, 7)
    assert torch.equal(mixer(maps), maps[0])
    heads = heads_of(
        "MODEL.MULTIPATH.SKIP_NORM", "constant", "MODEL.MULTIPATH.MIX_DIM", 8,
        "MODEL.MULTIPATH.SHARE_TOWERS", False,
    )  # fmt: skip
    for tower in heads.box_head.towers:
        assert torch.equal(tower.mix.weight[:, :8, 0, 0], torch.eye(8))
        assert tower.mix.weight[:, 8:].eq(0).all()
        assert tower.mix.bias.eq(0).all()


def test_features_are_flattened_channel_by_channel():
    """As VGG's fc6 reads them, and detectron2's head."""
    tower = Tower(4, 0, size=7, out_dim=16, dropout=0.5).eval()
    theirs = FastRCNNConvFCHead(ShapeSpec(4, 7, 7), conv_dims=[], fc_dims=[16, 16])
    theirs.fc1.load_state_dict(tower.fc6.state_dict())
    theirs.fc2.load_state_dict(tower.fc7.state_dict())
    x = torch.randn(3, 4, 7, 7)
    assert torch.equal(tower([x]), theirs(x))
    assert (tower.train()([x]) == 0).float().mean() > 0.5


def test_shared_layers():
    mixers = [Mixer(8, 6), Mixer(4, 6), Mixer(8, 6)]
    shared = SharedLayers(6 * 49, 16, 0.0)
    head = MultiPathBoxHead(mixers, het=True, shared=shared)
    maps = [[torch.randn(2, c, 7, 7)] for c in (8, 4, 8)]
    found = head(maps)
    expected = [shared(mixer(x)) for mixer, x in zip(mixers, maps, strict=True)]
    assert torch.equal(found.classes, torch.cat(expected[:2], dim=1))
    assert torch.equal(found.boxes, expected[2])
    assert (head.class_dim, head.box_dim) == (32, 16)


@pytest.mark.parametrize("shared", [True, False])
def test_all_towers_start_from_imagenet(shared):
    heads = heads_of(
        "MODEL.MULTIPATH.SHARE_TOWERS", shared, "MODEL.ROI_BOX_HEAD.FC_DIM", 16
    ).box_head
    fc6, fc7 = torch.randn(16, 8 * 49), torch.randn(16, 16)
    weights = {
        "fc6.weight": fc6, "fc6.bias": torch.ones(16), "fc7.weight": fc7, "fc7.bias": fc6[:, 0],
        "fc8.weight": fc7,
    }  # fmt: skip
    heads.take_imagenet_layers(weights, "x.")
    assert sorted(name for name in weights if not name.startswith("x.")) == ["fc8.weight"]
    names = ["x.shared"] if shared else [f"x.towers.{i}" for i in range(5)]
    assert all(torch.equal(weights[f"{name}.fc6.weight"], fc6) for name in names)
    assert all(torch.equal(weights[f"{name}.fc7.weight"], fc7) for name in names)
    assert len(weights) == 1 + 4 * len(names)
