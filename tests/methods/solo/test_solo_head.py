"""Shapes, parameter counts, initial state and the kernel-to-cell correspondence of the head."""

import pytest
import torch
import torch.nn.functional as F
from methods.project import count
from methods.solo.toys import pyramid

from instseg_ext.methods.solo.grid_head import flatten_cells, resize_to_stride
from instseg_ext.methods.solo.head import SOLOv2Outputs
from instseg_ext.methods.solo.mask_features import MaskFeatures
from instseg_ext.modeling.towers import DeformOptions


@pytest.mark.parametrize(
    ("options", "instance", "mask"),
    [
        ({}, 18_081_104, 1_659_392),
        ({"num_convs": 2, "width": 256, "kernel_dim": 128}, 2_845_392, 1_642_752),
    ],
)
def test_shapes_and_parameter_counts(make_head, options, instance, mask):
    with torch.device("meta"):
        head = make_head(**options)
        raw = head(pyramid(256, 384, 256))
    dim = options.get("kernel_dim", 256)
    sides = (40, 36, 24, 16, 12)
    assert [tuple(x.shape) for x in raw.category_logits] == [(1, 80, s, s) for s in sides]
    assert [tuple(x.shape) for x in raw.kernels] == [(1, dim, s, s) for s in sides]
    assert tuple(raw.mask_features.shape) == (1, dim, 64, 96)
    assert count(head.mask_features) == mask
    assert count(head) - count(head.mask_features) == instance


def test_state_dict_names_are_the_documented_ones(make_head):
    head = make_head(dim=32, num_convs=2, width=32, kernel_dim=32, mask_width=32)
    names = set(head.state_dict())
    blocks = [f"{tower}_tower.{q}" for tower in ("category", "kernel") for q in (0, 1)]
    blocks += [f"mask_features.levels.{m}.{q}" for m in range(4) for q in range(max(m, 1))]
    blocks += ["mask_features.pred"]
    expected = {f"{b}.{k}" for b in blocks for k in ("weight", "norm.weight", "norm.bias")}
    expected |= {f"{p}_pred.{k}" for p in ("category", "kernel") for k in ("weight", "bias")}
    assert names == expected


def test_initial_state(make_head):
    head = make_head(dim=32, num_convs=1, width=32, kernel_dim=32, mask_width=32, num_classes=3)
    torch.testing.assert_close(head.category_pred.bias.sigmoid(), torch.full((3,), 0.01))
    assert not head.kernel_pred.bias.any()
    for name, parameter in head.named_parameters():
        if parameter.dim() == 4:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.2), name


def test_towers_see_resized_features_and_coordinates(make_head):
    head = make_head(dim=32, num_convs=1, width=32, kernel_dim=32, mask_width=32).eval()
    inputs = {}
    for tower in ("category", "kernel"):
        module = getattr(head, f"{tower}_tower")
        module.register_forward_pre_hook(
            lambda _, args, tower=tower: inputs.setdefault(tower, args[0].detach())
        )
    maps = pyramid(64, 96, 32)
    head(maps)
    halved = F.interpolate(maps["p2"], scale_factor=0.5, mode="bilinear")
    height, width = halved.shape[-2:]
    x = torch.linspace(-1, 1, width).expand(1, 1, height, width)
    y = torch.linspace(-1, 1, height)[:, None].expand(1, 1, height, width)
    joined = F.interpolate(torch.cat([halved, x, y], 1), size=(40, 40), mode="bilinear")
    torch.testing.assert_close(inputs["kernel"], joined, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs["category"], joined[:, :-2], atol=1e-5, rtol=1e-5)


def test_level_sizes_of_an_odd_p5():
    maps = pyramid(96, 160, 2)  # P5 is 3 x 5, P6 is 2 x 3
    resized = resize_to_stride(list(maps.values()), (8, 8, 16, 32, 32), finest=4)
    assert [tuple(x.shape[-2:]) for x in resized] == [(12, 20), (12, 20), (6, 10), (3, 5), (3, 5)]
    assert resized[3] is maps["p5"]
    torch.testing.assert_close(resized[0], F.avg_pool2d(maps["p2"], 2))


def test_mask_features_equal_the_plain_sum_of_upsampled_levels():
    module = MaskFeatures(in_dim=32, width=32, out_dim=64, strides=(4, 8, 16, 32), norm="GN").eval()
    maps = list(pyramid(64, 96, 32).values())[:4]
    total = module.levels[0][0](maps[0])
    for m in (1, 2, 3):
        x = maps[m]
        if m == 3:
            h, w = x.shape[-2:]
            xs = torch.linspace(-1, 1, w).expand(1, 1, h, w)
            ys = torch.linspace(-1, 1, h)[:, None].expand(1, 1, h, w)
            x = torch.cat([x, xs, ys], dim=1)
        for block in module.levels[m]:
            x = F.interpolate(block(x), scale_factor=2, mode="bilinear")
        total = total + x
    torch.testing.assert_close(module(maps), module.pred(total), atol=1e-5, rtol=1e-5)


def test_mask_features_refuse_unfit_strides():
    with pytest.raises(ValueError, match="fine to coarse"):
        MaskFeatures(in_dim=32, width=32, out_dim=32, strides=(8, 4), norm="GN")


def test_masks_equal_one_convolution_per_candidate(make_head):
    head = make_head(dim=32, num_convs=1, width=32, kernel_dim=32, mask_width=32)
    kernels = [torch.randn(2, 8, 4, 4), torch.randn(2, 8, 2, 2)]
    raw = SOLOv2Outputs([k[:, :3] for k in kernels], kernels, torch.rand(2, 8, 6, 5))
    selection = [torch.tensor([0, 7, 7, 19]), torch.tensor([], dtype=torch.int64)]
    masks = head.masks(raw, selection)
    assert [tuple(m.shape) for m in masks] == [(4, 6, 5), (0, 6, 5)]
    for cell, mask in zip(selection[0].tolist(), masks[0], strict=True):
        level, k, side = (0, cell, 4) if cell < 16 else (1, cell - 16, 2)
        kernel = raw.kernels[level][0, :, k // side, k % side].view(1, -1, 1, 1)
        expected = F.conv2d(raw.mask_features[:1], kernel).sigmoid()[0, 0]
        torch.testing.assert_close(mask, expected)
    everything = head.masks(raw)
    assert tuple(everything[1].shape) == (20, 6, 5)
    torch.testing.assert_close(everything[0][selection[0]], masks[0])
    last = raw._replace(
        mask_features=raw.mask_features.contiguous(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(head.masks(last, selection)[0], masks[0])


def test_flatten_is_level_major_then_row_major():
    levels = [torch.arange(4.0).view(1, 1, 2, 2), torch.arange(4.0, 13).view(1, 1, 3, 3)]
    assert flatten_cells(levels).flatten().tolist() == list(range(13))


def test_deformable_convolutions_are_where_they_were_asked_for(make_head):
    narrow = {"dim": 32, "num_convs": 2, "width": 32, "kernel_dim": 32, "mask_width": 32}

    def offsets(**options):
        head = make_head(**narrow, deform=DeformOptions(**options))
        head(pyramid(64, 64, 32))
        shapes = {
            k: v.shape[0] for k, v in head.state_dict().items() if k.endswith("offset.weight")
        }
        return {key.removesuffix(".offset.weight"): value for key, value in shapes.items()}

    assert offsets() == {}
    assert offsets(towers="last") == {"category_tower.1": 18, "kernel_tower.1": 18}
    everywhere = offsets(towers="all", mask_features=True, modulated=True)
    assert len(everywhere) == 4 + 8
    assert everywhere["mask_features.pred"] == 3
    assert everywhere["category_tower.0"] == 27
