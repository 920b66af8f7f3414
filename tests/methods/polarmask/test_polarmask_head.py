"""The network of PolarMask behind its pyramid: sizes, names, initial state, order of outputs."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from instseg_ext.methods.polarmask.head import (
    PolarMaskHead,
    PolarMaskOutputs,
    distances,
    to_reference_layout,
)

LEVELS = ("p3", "p4", "p5", "p6", "p7")
SIZES = ((6, 8), (3, 4), (2, 2), (1, 1), (1, 1))
COUNT = 48 + 12 + 4 + 1 + 1


def head_of(channels=256, levels=LEVELS, **options):
    shapes = {name: ShapeSpec(channels=channels, stride=2 ** int(name[1:])) for name in levels}
    return PolarMaskHead(shapes, **{"in_features": levels, "num_classes": 80, **options})


def tiny_head(**options):
    small = {"num_classes": 3, "num_convs": 2, "width": 32, "num_rays": 8}
    return head_of(8, **{**small, **options})


def pyramid(channels=8, sizes=SIZES, num=2, memory_format=torch.contiguous_format):
    maps = [torch.randn(num, channels, *size) for size in sizes]
    return {name: x.to(memory_format=memory_format) for name, x in zip(LEVELS, maps, strict=True)}


def sizes_of(raw):
    return [None if x is None else tuple(x.shape) for x in raw[:4]]


# --- acceptance check 10: counts, sizes, initial state --------------------------------------------

TOWER = 4 * (9 * 256 * 256 + 2 * 256)
# Bias, and offsets and factors of nine taps.
DEFORMABLE = 4 * (256 + 27 * (9 * 256 + 1))


def predictor(channels):
    return (9 * 256 + 1) * channels


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 7_362_947),
        ({"deform": True}, 7_362_947 + 3 * DEFORMABLE),
        ({"with_mask": False}, 7_362_947 - TOWER - predictor(36) - 5),
        ({"with_box": False}, 7_362_947 - TOWER - predictor(4) - 5),
        ({"with_centerness": False}, 7_362_947 - predictor(1)),
        ({"num_rays": 72}, 7_362_947 + predictor(36)),
        ({"num_classes": 1}, 7_362_947 - predictor(79)),
    ],
    ids=["published", "DCN", "no mask", "no box", "no centerness", "72 rays", "one class"],
)
def test_parameter_counts(options, parameters):
    with torch.device("meta"):
        head = head_of(**options)
    assert sum(p.numel() for p in head.parameters()) == parameters


def test_sizes_of_the_published_input():
    sizes = ((96, 160), (48, 80), (24, 40), (12, 20), (6, 10))
    with torch.device("meta"):
        raw = head_of()(pyramid(256, sizes))
    assert raw.level_sizes == sizes
    assert sizes_of(raw) == [(2, 20460, 80), (2, 20460), (2, 20460, 4), (2, 20460, 36)]


def test_initial_outputs():
    raw = head_of(64, width=64, num_classes=80)(pyramid(64, num=1))
    assert raw.class_logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.05)
    for logs in (raw.ray_logs, raw.box_logs):
        assert distances(logs).mean().item() == pytest.approx(1, abs=0.1)
        assert distances(logs).std() < 0.3
    assert raw.ctr_logits.abs().max() < 0.5


@pytest.mark.parametrize("deform", [False, True])
def test_initial_parameters(deform):
    head = tiny_head(deform=deform)
    for name, value in head.named_parameters():
        if name.endswith("scale"):
            assert (value.dim(), value.item()) == (0, 1), name
        elif name == "cls_logits.bias":
            torch.testing.assert_close(value.sigmoid(), torch.full((3,), 0.01))
        elif name.endswith("bias") or ".offset." in name:
            assert not value.any(), name
        elif name.endswith("norm.weight"):
            assert (value == 1).all(), name
        else:
            uniform = (9 * value.shape[1]) ** -0.5 / 3**0.5
            expected = uniform if deform and "tower" in name else 0.01
            assert value.std().item() == pytest.approx(expected, rel=0.1), name


# --- names ----------------------------------------------------------------------------------------


def names_of(branches, block):
    names = set()
    for tower, predictors, scales in branches:
        names |= {f"{tower}.{i}.{key}" for i in range(2) for key in block}
        names |= {f"{layer}.{key}" for layer in predictors for key in ("weight", "bias")}
        names |= {f"{scales}.{level}.scale" for level in range(5) if scales}
    return names


BLOCK = ("weight", "norm.weight", "norm.bias")
CLASSES = ("cls_tower", ("cls_logits", "ctrness"), None)
BOX = ("box_tower", ("box_pred",), "scales_box")
RAYS = ("mask_tower", ("ray_pred",), "scales_ray")


@pytest.mark.parametrize(
    ("options", "branches", "block"),
    [
        ({}, [CLASSES, BOX, RAYS], BLOCK),
        (
            {"deform": True},
            [CLASSES, BOX, RAYS],
            (*BLOCK, "bias", "offset.weight", "offset.bias"),
        ),
        ({"with_box": False}, [CLASSES, RAYS], BLOCK),
        ({"with_mask": False}, [CLASSES, BOX], BLOCK),
        (
            {"with_centerness": False},
            [("cls_tower", ("cls_logits",), None), BOX, RAYS],
            BLOCK,
        ),
    ],
    ids=["published", "DCN", "no box", "no mask", "no centerness"],
)
def test_state_dict_names(options, branches, block):
    assert set(tiny_head(**options).state_dict()) == names_of(branches, block)


# --- outputs --------------------------------------------------------------------------------------


def test_absent_branches_have_no_output():
    features = pyramid()
    shapes = sizes_of(tiny_head()(features))
    assert shapes == [(2, COUNT, 3), (2, COUNT), (2, COUNT, 4), (2, COUNT, 8)]
    for option, absent in (("with_centerness", 1), ("with_box", 2), ("with_mask", 3)):
        expected = [None if i == absent else shape for i, shape in enumerate(shapes)]
        raw = tiny_head(**{option: False})(features)
        assert sizes_of(raw) == expected
        assert len(to_reference_layout(raw)) == 3


def by_hand(head, features):
    """Per level what the authors' head computes, written out."""
    levels = []
    for index, name in enumerate(LEVELS):
        maps = [features[name]] * 3
        for i in range(len(head.cls_tower)):
            towers = (head.cls_tower, head.box_tower, head.mask_tower)
            for branch, tower in enumerate(towers):
                x = F.conv2d(maps[branch], tower[i].weight, padding=1)
                norm = tower[i].norm
                maps[branch] = F.relu(F.group_norm(x, 32, norm.weight, norm.bias))
        classes, box, rays = maps
        levels.append(
            {
                "cls_scores": head.cls_logits(classes),
                "bbox_preds": (head.box_pred(box) * head.scales_box[index].scale).exp(),
                "centernesses": head.ctrness(classes),
                "mask_preds": (head.ray_pred(rays) * head.scales_ray[index].scale).exp(),
            }
        )
    return levels


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reference_layout_is_what_the_layers_give_per_level(memory_format):
    head = tiny_head().to(memory_format=memory_format)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    features = pyramid(memory_format=memory_format)
    reference = to_reference_layout(head(features))
    assert list(reference) == ["cls_scores", "bbox_preds", "centernesses", "mask_preds"]
    for level, expected in enumerate(by_hand(head, features)):
        for name, values in expected.items():
            torch.testing.assert_close(reference[name][level], values, rtol=1e-4, atol=1e-5)


def test_locations_are_level_major_then_row_major():
    head = tiny_head()
    raw = head(pyramid())
    assert raw.level_sizes == SIZES
    layout = to_reference_layout(raw)
    start = 0
    for level, (height, width) in enumerate(SIZES):
        for i, j in ((0, 0), (0, width - 1), (height - 1, 0)):
            location = start + i * width + j
            rays = layout["mask_preds"][level][:, :, i, j]
            assert torch.equal(rays, distances(raw.ray_logs[:, location]))
            centerness = layout["centernesses"][level][:, 0, i, j]
            assert torch.equal(centerness, raw.ctr_logits[:, location])
        start += height * width
    assert start == COUNT


def test_the_factors_belong_to_their_level_and_branch():
    head, features = tiny_head(), pyramid()
    before = head(features)
    with torch.no_grad():
        head.scales_ray[1].scale.fill_(2.0)
        head.scales_box[2].scale.fill_(3.0)
    after = head(features)
    factors = torch.ones(COUNT, 1)
    factors[48:60] = 2
    torch.testing.assert_close(after.ray_logs, before.ray_logs * factors)
    factors = torch.ones(COUNT, 1)
    factors[60:64] = 3
    torch.testing.assert_close(after.box_logs, before.box_logs * factors)
    assert torch.equal(after.class_logits, before.class_logits)


def test_the_quality_branch_is_on_the_tower_of_the_classes():
    head, features = tiny_head(), pyramid()
    before = head(features)
    with torch.no_grad():
        head.cls_tower[0].weight.neg_()
    after = head(features)
    changed = [not torch.equal(a, b) for a, b in zip(before[:4], after[:4], strict=True)]
    assert changed == [True, True, False, False]


class Calls(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_joining_the_levels_is_the_only_copy_of_channels_last_maps():
    head = tiny_head().to(memory_format=torch.channels_last)
    features = pyramid(memory_format=torch.channels_last)
    with torch.no_grad(), Calls() as calls:
        raw = head(features)
    assert calls.names.count("cat") == 4
    assert not {"clone", "copy_", "contiguous", "_to_copy", "_reshape_copy"} & set(calls.names)
    assert all(x.is_contiguous() for x in raw[:4])


def test_autocast_keeps_logarithms_half_and_lengths_whole():
    head, features = tiny_head(), pyramid()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        raw = head(features)
        rays = distances(raw.ray_logs)
    assert [x.dtype for x in raw[:4]] == [torch.bfloat16] * 4
    assert rays.dtype == torch.float32
    torch.testing.assert_close(rays, raw.ray_logs.float().exp())
    torch.testing.assert_close(raw.ray_logs.float(), head(features).ray_logs, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lengths_of_logarithms_of_20_are_finite(dtype):
    lengths = distances(torch.tensor([-20.0, 20.0], dtype=dtype))
    torch.testing.assert_close(lengths, torch.tensor([-20.0, 20.0]).exp())


def test_deformable_towers_run_and_train():
    head = tiny_head(deform=True)
    raw = head(pyramid())
    sum(x.float().sum() for x in raw[:4]).backward()
    assert all(p.grad is not None for p in head.parameters())
    assert head.cls_tower[0].offset.weight.grad.any()


def test_reference_layout_of_a_head_without_branches():
    raw = PolarMaskOutputs(torch.randn(1, 5, 2), None, None, None, ((1, 3), (2, 1)))
    layout = to_reference_layout(raw)
    assert {name: [tuple(x.shape) for x in maps] for name, maps in layout.items()} == {
        "cls_scores": [(1, 2, 1, 3), (1, 2, 2, 1)]
    }


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, r"MODEL.POLARMASK.NUM_CLASSES must be at least 1, not 0"),
        ({"num_convs": 0}, r"MODEL.POLARMASK.NUM_CONVS must be at least 1"),
        ({"num_rays": 2}, r"MODEL.POLARMASK.NUM_RAYS must be at least 3"),
        ({"prior_prob": 0.0}, r"MODEL.POLARMASK.PRIOR_PROB must be between 0 and 1"),
        ({"prior_prob": 1.0}, r"MODEL.POLARMASK.PRIOR_PROB"),
        ({"norm": "XN"}, r"MODEL.POLARMASK.NORM 'XN'"),
        ({"width": 40}, r"MODEL.POLARMASK.NORM 'GN' .* MODEL.POLARMASK.WIDTH 40"),
        ({"in_features": ()}, r"MODEL.POLARMASK.IN_FEATURES must name at least one"),
        ({"in_features": ("p3", "p9")}, r"MODEL.POLARMASK.IN_FEATURES must be one of .*'p9'"),
        ({"with_box": False, "with_mask": False}, r"WITH_BOX and MODEL.POLARMASK.WITH_MASK"),
    ],
)
def test_what_makes_no_head_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_head(**options)


def test_levels_of_different_width_are_refused():
    shapes = {"p3": ShapeSpec(channels=8, stride=8), "p4": ShapeSpec(channels=16, stride=16)}
    with pytest.raises(ValueError, match=r"MODEL.POLARMASK.IN_FEATURES .* are \[8, 16\]"):
        PolarMaskHead(shapes, in_features=("p3", "p4"), num_classes=3)
