"""Layers of stages 2 and 3 (acceptance checks 6 and 7), and what they are loaded from."""

import pytest
import torch
import torch.nn.functional as F
from methods.mnc.mnc_toys import C4, config, model_of
from torch import nn

from instseg_ext.checkpoint import InstSegCheckpointer
from instseg_ext.methods.mnc.stages import MaskHead, Res5Tower, build_tower, resize_masks


def test_acceptance_check_6_masks_are_resized_from_their_corner():
    ramp = torch.arange(21.0).expand(1, 21, 21)
    columns = resize_masks(ramp, 14)[0]
    torch.testing.assert_close(columns, (torch.arange(14) * 1.5).expand(14, 14))
    torch.testing.assert_close(resize_masks(ramp.mT, 14)[0], columns.T)


@pytest.mark.parametrize(("side", "size"), [(21, 14), (28, 14), (14, 14), (7, 14), (21, 7)])
def test_resizing_equals_bilinear_sampling_at_multiples(side, size):
    masks = torch.rand(3, side, side)
    place = torch.arange(size) * (side / size)
    grid = torch.stack(torch.meshgrid(place, place, indexing="xy"), dim=-1) * 2 / (side - 1) - 1
    expected = F.grid_sample(
        masks[:, None], grid.expand(3, -1, -1, -1), align_corners=True, padding_mode="border"
    )
    torch.testing.assert_close(resize_masks(masks, size), expected[:, 0])


def test_resizing_passes_gradients_and_takes_no_masks():
    masks = torch.rand(2, 21, 21, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize_masks(x, 14), masks)
    assert resize_masks(torch.zeros(0, 21, 21), 14).shape == (0, 14, 14)


def test_acceptance_check_7_the_mask_tower_comes_first():
    heads = model_of().roi_heads.eval()
    for tower in (heads.box_tower, heads.mask_tower):
        nn.init.uniform_(tower.fc1.bias, -1, 1)
    regions = torch.randn(5, 16, 14, 14)
    full = heads.join(regions, torch.ones(5, 21, 21))
    none = heads.join(regions, torch.zeros(5, 21, 21))
    dim = heads.mask_tower.out_dim
    assert torch.equal(full[:, dim:], none[:, dim:])
    only_biases = heads.mask_tower.fc2(heads.mask_tower.fc1.bias.relu()[None]).relu()
    torch.testing.assert_close(none[:, :dim], only_biases.expand(5, -1))
    assert not torch.allclose(full[:, :dim], none[:, :dim])


def test_towers_halve_regions_alike_with_and_without_gradients():
    tower = model_of().roi_heads.box_tower
    regions = torch.randn(3, 16, 14, 14).relu().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = tower(regions)
    assert torch.equal(plain, tower(regions.requires_grad_()))


def test_shapes_of_the_published_head():
    with torch.device("meta"):
        head = MaskHead(512, pool_size=14, mask_size=21, fc_dim=256)
        assert head(torch.empty(2, 512, 14, 14)).shape == (2, 21, 21)
    assert head.fc1.weight.shape == (256, 100352)
    assert head.predictor.weight.shape == (441, 256)


def test_classes_of_boxes_are_not_computed_at_inference():
    heads = model_of().roi_heads
    regions, masks = torch.randn(2, 16, 14, 14), torch.rand(2, 21, 21)
    assert heads.train().classify(regions, masks).box_logits.shape == (2, 4)
    assert heads.eval().classify(regions, masks).box_logits is None


def test_the_mask_tower_starts_from_the_box_tower_of_a_file():
    heads = model_of().roi_heads
    weights = {k: v for k, v in heads.state_dict().items() if not k.startswith("mask_tower.")}
    given = dict(weights)
    missing = heads.load_state_dict(weights).missing_keys
    assert not missing
    assert weights == given
    assert torch.equal(heads.mask_tower.fc1.weight, heads.box_tower.fc1.weight)
    # a file that knows both is left alone, and one that knows neither leaves both alone
    own = model_of(seed=1).roi_heads
    other = own.state_dict()["mask_tower.fc1.weight"].clone()
    own.load_state_dict(own.state_dict())
    own.load_state_dict({"cls_score.bias": own.cls_score.bias.detach()}, strict=False)
    assert torch.equal(own.mask_tower.fc1.weight, other)


def load(model, weights, tmp_path):
    """Load names that are not the model's, as those of ImageNet models."""
    torch.save({"model": weights, "matching_heuristics": True}, tmp_path / "imagenet.pth")
    InstSegCheckpointer(model).load(str(tmp_path / "imagenet.pth"))


def test_res5_towers_start_from_an_imagenet_model(tmp_path):
    source, model = model_of(C4, seed=3), model_of(C4)
    names = {"backbone.": "", "roi_heads.box_tower.blocks.": "res5."}
    weights = {
        new + name.removeprefix(old): value
        for old, new in names.items()
        for name, value in source.state_dict().items()
        if name.startswith(old)
    }
    load(model, weights, tmp_path)
    expected = source.roi_heads.box_tower.blocks[2].conv3.weight
    for tower in (model.roi_heads.box_tower, model.roi_heads.mask_tower):
        assert torch.equal(tower.blocks[2].conv3.weight, expected)
    assert torch.equal(model.backbone.stem.conv1.weight, source.backbone.stem.conv1.weight)


@pytest.mark.parametrize("both", [False, True])
def test_fc_towers_start_from_a_vgg(tmp_path, both):
    source, model = model_of(seed=3), model_of()
    heads = source.roi_heads
    parts = {"fc6": heads.box_tower.fc1, "fc7": heads.box_tower.fc2}
    if both:
        parts |= {"fc6_mask": heads.mask_tower.fc1, "fc7_mask": heads.mask_tower.fc2}
    weights = {f"{name}.weight": part.weight.detach() for name, part in parts.items()}
    load(model, {**weights, "stem.conv1.weight": torch.ones(8, 3, 7, 7)}, tmp_path)
    assert torch.equal(model.roi_heads.box_tower.fc2.weight, heads.box_tower.fc2.weight)
    mask_source = heads.mask_tower if both else heads.box_tower
    assert torch.equal(model.roi_heads.mask_tower.fc1.weight, mask_source.fc1.weight)
    assert model.backbone.bottom_up.stem.conv1.weight.unique().tolist() == [1]


def test_res5_tower():
    with torch.device("meta"):
        tower = build_tower(config([*C4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256]), 1024)
        assert isinstance(tower, Res5Tower)
        assert tower(torch.empty(3, 1024, 14, 14)).shape == (3, 2048)


@pytest.mark.parametrize("opts", [["MODEL.MNC.TOWER", "res5"], [*C4, "MODEL.RESNETS.DEPTH", 34]])
def test_res5_needs_res4_of_a_deep_resnet(opts):
    cfg = config(opts)
    with pytest.raises(ValueError, match=r"MODEL\.MNC\.TOWER res5 reads res4"):
        build_tower(cfg, 16)
