"""The meta-architecture: towers, windows, losses, inference."""

import pytest
import torch
from contract.cases import blobs
from detectron2.modeling import build_model
from methods.sds.sds_toys import tiles, tiny_cfg

from instseg_ext.methods.sds.towers import CaffeNet, TwoPathway


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(tiny_cfg()).eval()


def sample(**fields):
    return {**blobs(60, 60, [(5, 5, 25, 25)]), **fields}


def test_caffenet_has_the_published_size():
    with torch.device("meta"):
        tower = CaffeNet(227)
        assert tower.fc6.weight.shape == (4096, 9216)
        assert sum(p.numel() for p in tower.parameters()) == 56_868_224
        assert tower.eval()(torch.zeros(2, 3, 227, 227)).shape == (2, 4096)
    with pytest.raises(ValueError, match="too small"):
        CaffeNet(8)


def test_the_region_network_sees_the_region_alone():
    towers = TwoPathway(CaffeNet(67, 4, 8), CaffeNet(67, 4, 8)).eval()
    assert towers.num_features == 16
    for weight in towers.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    windows, inside = torch.randn(2, 3, 67, 67), torch.zeros(2, 67, 67, dtype=torch.bool)
    inside[:, 10:30] = True
    other = torch.where(inside[:, None], windows, torch.randn(2, 3, 67, 67))
    first, second = towers(windows, inside), towers(other, inside)
    assert torch.equal(first[:, 8:], second[:, 8:])
    assert not torch.equal(first[:, :8], second[:, :8])


def test_one_network_starts_both_pathways():
    towers = TwoPathway(CaffeNet(67, 4, 8), CaffeNet(67, 4, 8))
    weights = {"conv1.weight": 1, "fc7.bias": 2}
    towers.rename_old_names(weights, "backbone.")
    assert weights == {
        "backbone.box.conv1.weight": 1,
        "backbone.box.fc7.bias": 2,
        "backbone.region.conv1.weight": 1,
        "backbone.region.fc7.bias": 2,
    }
    own = {"backbone.box.conv1.weight": 1}
    towers.rename_old_names(own, "backbone.")
    assert list(own) == ["backbone.box.conv1.weight"]


def test_features_in_chunks(model):
    regions = tiles(10, 6, [[i, i + 1] for i in range(12)])
    with torch.no_grad():
        together = model.features(sample(), regions)
        windows = model.cut_windows(sample(), regions, slice(3, 4))
        torch.testing.assert_close(model.backbone(*windows)[0], together[3], atol=1e-5, rtol=1e-4)
    assert together.shape == (12, model.backbone.num_features)


def test_detections_are_the_given_regions(model):
    """Before the linear models are fitted, the softmax scores regions, which stay as they are."""
    regions = tiles(10, 6, [[0, 1], [1, 2], [30], [31]])
    found = model([sample(region_proposals=regions)])[0]["instances"]
    masks = regions.masks()
    assert len(found) == 3  # two share a superpixel
    assert all(any(torch.equal(mask, own) for own in masks) for mask in found.pred_masks)
    half = model([sample(region_proposals=regions, height=30, width=120)])[0]["instances"]
    assert half.pred_masks.shape == (3, 30, 120)
    assert torch.equal(half.pred_masks[:, :, ::2], found.pred_masks[:, ::2])


def test_fitted_classes_have_their_own_scores(model):
    regions = tiles(10, 6, [[0, 1], [30], [31]])
    features = model.features(sample(), regions)
    head = model.head
    try:
        head.svm_weight[0] = features[1]
        head.svm_bias[0] = -0.1
        head.feature_scale.fill_(0.5)
        head.svm_fitted[0] = True
        margins = features @ features[1] * 0.5 - 0.1
        torch.testing.assert_close(head.scores(features)[:, 0], margins.sigmoid())
        head.svm_bias[0] = -1000
        assert len(model([sample(region_proposals=regions)])[0]["instances"]) == 0
    finally:
        head.svm_fitted[0] = False


def test_no_regions(model):
    """Check 18: none are given, or nothing is to be seen."""
    none = tiles(10, 6, [])
    plain = {"image": torch.full((3, 60, 60), 127.0), "height": 60, "width": 60}
    for x in (sample(region_proposals=none), plain):
        found = model([x])[0]["instances"]
        assert found.pred_masks.shape[1:] == (60, 60)
        assert len(found.scores) == len(found.pred_boxes) == len(found.pred_masks)
    assert len(model([sample(region_proposals=none)])[0]["instances"]) == 0
    model.train()
    losses = model([{**blobs(60, 60, []), "region_proposals": none}])
    model.eval()
    assert losses["loss_cls"].item() == 0


def test_regions_of_another_image_are_refused(model):
    with pytest.raises(ValueError, match="blobs: its regions are of an image of size"):
        model([sample(region_proposals=tiles(5, 6, [[0]]))])


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"MODEL\.SDS\.CONTEXT 16 .* MODEL\.SDS\.WINDOW 32"):
        build_model(tiny_cfg("MODEL.SDS.CONTEXT", 16))
    with pytest.raises(ValueError, match=r"MODEL\.SDS\.SVM\.C must be in"):
        build_model(tiny_cfg("MODEL.SDS.SVM.C", 0.0))
