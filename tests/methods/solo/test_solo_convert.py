"""Files of three code bases become our models: every name, every flavour, and nothing else."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods.foreign import block, tensors
from methods.solo import foreign_files as files

import instseg_ext
from instseg_ext import zoo
from instseg_ext.checkpoint import (
    ConversionError,
    Report,
    check_fit,
    convert,
    convert_with_variant,
    model_shapes,
)
from instseg_ext.config import find_config
from instseg_ext.methods.solo.config import add_solo_config
from instseg_ext.methods.solo.convert import FAMILIES

V1, V2 = 18, 27  # channels of an offset convolution with nine taps
AUTHORS, MMDET = "solo-authors", "solo-mmdet"


def solo(family, depth=50):
    return files.resnet(depth) | files.vanilla_head(family)


def decoupled(family, depth=50):
    return files.resnet(depth) | files.decoupled_head(family)


def light(family, offsets=0):
    return files.resnet(50, offsets=offsets) | files.decoupled_head(
        family, light=True, convs=4, deform=(0, 0, 0, offsets)
    )


def v2(family, depth=50):
    return files.resnet(depth) | files.solov2_head(family) | files.mask_features(family)


def v2_dcn(family, groups=1):
    return (
        files.resnet(101, offsets=V2, groups=groups)
        | files.solov2_head(family, deform=(V2,) * 4)
        | files.mask_features(family, offsets=V2)
    )


def v2_light(family, depth=50):
    return (
        files.resnet(depth)
        | files.solov2_head(family, convs=2, width=256, kernels=128)
        | files.mask_features(family, kernels=128)
    )


def v2_light_dcn(family, offsets=V1):
    return (
        files.resnet(50, offsets=offsets)
        | files.solov2_head(family, convs=3, width=256, kernels=128, deform=(0, 0, offsets))
        | files.mask_features(family, kernels=128)
    )


def flavours(family):
    return [
        (family, solo(family), "solo_R_50_FPN_3x"),
        (family, solo(family, 101), "solo_R_101_FPN_3x"),
        (family, decoupled(family), "decoupled_solo_R_50_FPN_3x"),
        (family, decoupled(family, 101), "decoupled_solo_R_101_FPN_3x"),
        (family, light(family), "decoupled_solo_light_R_50_FPN_3x"),
        (family, light(family, V1), "decoupled_solo_light_dcn_R_50_FPN_3x"),
        (family, v2(family), "solov2_R_50_FPN_3x"),
        (family, v2(family, 101), "solov2_R_101_FPN_3x"),
        (family, v2(family, 34), "solov2_R_34_FPN_1x"),
        (family, v2_dcn(family), "solov2_R_101_DCN_FPN_3x"),
        (family, v2_dcn(family, groups=64), "solov2_X_101_DCN_FPN_3x"),
        (family, v2_light(family, 18), "solov2_light_448_R_18_FPN_3x"),
        (family, v2_light(family, 34), "solov2_light_448_R_34_FPN_3x"),
        (family, v2_light(family), "solov2_light_448_R_50_FPN_3x"),
        (family, v2_light_dcn(family), "solov2_light_512_dcn_R_50_FPN_3x"),
    ]


FLAVOURS = [
    *flavours(AUTHORS),
    *flavours(MMDET),
    ("adelaidet", files.adelaidet(50), "solov2_adelaidet_R_50_FPN_3x"),
    ("adelaidet", files.adelaidet(101), "solov2_adelaidet_R_101_FPN_3x"),
]
IDS = [f"{family}-{config}" for family, _, config in FLAVOURS]


@functools.cache
def shapes_of_config(name):
    return model_shapes(instseg_ext.get_config(name))


@pytest.mark.parametrize(("family", "shapes", "config"), FLAVOURS, ids=IDS)
def test_every_flavour_is_recognised_and_maps_onto_its_model(family, shapes, config):
    weights, report, variant = convert_with_variant(tensors(shapes))
    assert report.family == family
    assert report.config == f"SOLO/{config}"
    assert variant.num_classes == 80
    assert not variant.backbone_only
    assert {k: tuple(v.shape) for k, v in weights.items()} == shapes_of_config(f"SOLO/{config}")
    counters = {name for name in shapes if name.endswith("num_batches_tracked")}
    assert set(report.dropped) == counters
    assert set(report.mapped) == set(shapes) - counters
    assert sorted(report.mapped.values()) == sorted(weights)
    assert report.leftovers == report.missing == []
    assert report.mismatched == {}


@pytest.mark.parametrize("family", [AUTHORS, MMDET])
def test_heads_have_as_many_names_as_the_reference_has(family):
    """The counts were read from the authors' modules: they keep this file's names honest."""
    assert len(files.vanilla_head(family)) == 54
    assert len(files.decoupled_head(family)) == 85
    assert len(files.decoupled_head(family, light=True, convs=4)) == 46
    assert len(files.solov2_head(family)) == 28
    assert len(files.solov2_head(family, convs=2)) == 16
    assert len(files.mask_features(family)) == 24


@pytest.mark.parametrize(
    ("head", "parameters"),
    [
        (files.vanilla_head(AUTHORS), 9_448_816),
        (files.decoupled_head(AUTHORS), 13_176_144),
        (files.decoupled_head(AUTHORS, light=True, convs=4), 5_501_776),
        (files.solov2_head(AUTHORS), 18_081_104),
        (files.solov2_head(AUTHORS, convs=2, width=256, kernels=128), 2_845_392),
        (files.mask_features(AUTHORS), 1_659_392),
        (files.mask_features(AUTHORS, kernels=128), 1_642_752),
    ],
)
def test_heads_have_as_many_parameters_as_the_reference_has(head, parameters):
    assert sum(tensor.numel() for tensor in tensors(head).values()) == parameters


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("backbone.conv1.weight", "backbone.bottom_up.stem.conv1.weight"),
        ("backbone.bn1.running_var", "backbone.bottom_up.stem.conv1.norm.running_var"),
        ("backbone.layer3.5.bn2.bias", "backbone.bottom_up.res4.5.conv2.norm.bias"),
        ("backbone.layer2.0.downsample.0.weight", "backbone.bottom_up.res3.0.shortcut.weight"),
        ("backbone.layer4.2.conv2.conv_offset.bias", "backbone.bottom_up.res5.2.conv2_offset.bias"),
        ("neck.lateral_convs.0.conv.bias", "backbone.fpn_lateral2.bias"),
        ("neck.fpn_convs.3.conv.weight", "backbone.fpn_output5.weight"),
        ("bbox_head.cate_convs.3.conv.weight", "head.category_tower.3.weight"),
        ("bbox_head.kernel_convs.0.gn.bias", "head.kernel_tower.0.norm.bias"),
        ("bbox_head.kernel_convs.2.conv.conv_offset.bias", "head.kernel_tower.2.offset.bias"),
        ("bbox_head.solo_cate.weight", "head.category_pred.weight"),
        ("bbox_head.solo_kernel.bias", "head.kernel_pred.bias"),
        (
            "mask_feat_head.convs_all_levels.3.conv2.gn.weight",
            "head.mask_features.levels.3.2.norm.weight",
        ),
        (
            "mask_feat_head.convs_all_levels.0.conv0.conv.conv_offset.weight",
            "head.mask_features.levels.0.0.offset.weight",
        ),
        ("mask_feat_head.conv_pred.0.conv.weight", "head.mask_features.pred.weight"),
    ],
)
def test_names_of_the_authors(old, new):
    assert convert(tensors(v2_dcn(AUTHORS)))[1].mapped[old] == new


def test_offsets_beside_their_convolution_are_those_of_early_releases():
    shapes = files.resnet(50, offsets=V1, early_names=True)
    shapes |= files.decoupled_head(AUTHORS, light=True, convs=4)
    for tower in ("cate_convs", "ins_convs"):
        shapes |= block(f"bbox_head.{tower}.3", 256, 256, offsets=V1, early_names=True)
    weights, report = convert(tensors(shapes), AUTHORS)
    check_fit(weights, shapes_of_config(report.config), report)
    assert report.config == "SOLO/decoupled_solo_light_dcn_R_50_FPN_3x"


def test_tensors_are_handed_on_unchanged():
    state = tensors(files.small_solov2(), device="cpu")
    weights, report = convert(state, AUTHORS)
    assert all(torch.equal(weights[new], state[old]) for old, new in report.mapped.items())


@pytest.mark.parametrize(
    ("shapes", "told"),
    [(v2(AUTHORS), "SOLO/solov2_R_50_FPN_1x"), (solo(MMDET), "SOLO/solo_R_50_FPN_1x")],
)
def test_the_schedule_that_weights_do_not_tell_is_said(shapes, told):
    report = convert(tensors(shapes))[1]
    assert told in report.notes[0]
    assert told in report.summary()


def test_models_of_one_schedule_have_no_note():
    assert convert(tensors(v2(AUTHORS, 101)))[1].notes == ()


def test_the_light_deformable_model_of_mmdetection_is_another_than_the_authors():
    shapes = v2_light_dcn(MMDET, offsets=V2)
    weights, report, variant = convert_with_variant(tensors(shapes))
    assert (report.config, report.opts) == (variant.config, variant.opts)
    cfg = instseg_ext.get_config(variant.config, variant.opts)
    check_fit(weights, model_shapes(cfg), report)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (448, 768)
    assert cfg.MODEL.RESNETS.DEFORM_MODULATED
    assert cfg.MODEL.SOLO.DEFORM.MODULATED


def test_the_classifier_tells_the_number_of_classes():
    for shapes in (
        files.resnet(18) | files.vanilla_head(AUTHORS, classes=3),
        files.resnet(18) | files.decoupled_head(MMDET, classes=3),
        files.adelaidet(50, classes=3),
    ):
        assert convert_with_variant(tensors(shapes))[2].num_classes == 3


def test_a_model_nobody_published_has_no_config():
    report = convert(tensors(files.small_solov2()))[1]
    assert report.config == ""
    assert report.variant == "SOLOv2, 1 x 32 per tower, 32 kernel channels, ResNet-50"


# --- what is wrong is named ----------------------------------------------------------------------


def test_a_name_too_many_is_named():
    state = tensors(solo(AUTHORS))
    state |= {f"bbox_head.extra.{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ConversionError, match=r"^12 names .*extra\.0, .*extra\.9 and 2 more") as e:
        convert(state)
    assert len(e.value.report.leftovers) == 12


def test_missing_names_and_other_shapes_are_named():
    shapes = solo(AUTHORS)
    del shapes["neck.fpn_convs.2.conv.bias"]
    shapes["bbox_head.solo_ins_list.1.weight"] = (1225, 256, 1, 1)
    weights, report = convert(tensors(shapes))
    with pytest.raises(ConversionError) as error:
        check_fit(weights, shapes_of_config(report.config), report)
    message = str(error.value)
    assert "1 names of the model are missing: backbone.fpn_output4.bias" in message
    assert "head.mask_pred.1.weight [1225, 256, 1, 1] instead of [1296, 256, 1, 1]" in message
    assert "SOLO/solo_R_50_FPN_3x" in message


def test_the_model_of_another_variant_does_not_fit():
    weights, _ = convert(tensors(solo(AUTHORS)))
    with pytest.raises(ConversionError, match=r"head\.mask_tower_x\.0\.weight"):
        check_fit(weights, shapes_of_config("SOLO/decoupled_solo_R_50_FPN_3x"), Report(AUTHORS))


@pytest.mark.parametrize(
    ("shapes", "typed", "owner"),
    [
        (v2(MMDET), AUTHORS, MMDET),
        (solo(AUTHORS), MMDET, AUTHORS),
        (files.adelaidet(50), AUTHORS, "adelaidet"),
        (v2(AUTHORS), "torchvision", AUTHORS),
        (v2(AUTHORS), "detectron2", AUTHORS),
    ],
)
def test_another_family_than_typed_is_named(shapes, typed, owner):
    with pytest.raises(ConversionError, match=f"not those of {typed} .* looks like {owner}"):
        convert(tensors(shapes), typed)


# --- the page ------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"


def test_the_page_lists_what_is_recognised():
    """Configs by family; the schedules that share weights stand in one row."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    listed = {
        (row[0].strip("`"), config)
        for row in rows
        if len(row) == 3
        for config in re.findall(r"`SOLO/(\w+)`", row[2])
    }
    ours = {(family, name) for family, _, name in FLAVOURS}
    assert {f for f in listed if f not in ours} == {
        (family, f"{model}_R_50_FPN_1x")
        for family in (AUTHORS, MMDET)
        for model in ("solo", "decoupled_solo", "solov2")
    }
    # MMDetection publishes fewer models, and nobody SOLOv2's standard head on the smaller ResNets.
    published = {f for f in ours if f[0] != MMDET and "solov2_R_34" not in f[1]}
    assert published <= listed
    for row in rows:
        if len(row) == 3 and row[2].startswith("`SOLO/"):
            assert all(find_config(name) for name in re.findall(r"`(SOLO/\w+)`", row[2]))


# --- the door ------------------------------------------------------------------------------------


def test_the_method_brings_its_families():
    assert zoo.METHODS[0].add_config is add_solo_config
    assert zoo.METHODS[0].converters is FAMILIES


@pytest.mark.slow
def test_families_are_known_after_importing_the_checkpoint_package_alone():
    script = (
        "import torch, instseg_ext, instseg_ext.checkpoint\n"
        "try: instseg_ext.checkpoint.convert({'bbox_head.solo_cate.x': torch.ones(1)}, "
        "'solo-authors')\n"
        "except ValueError as error: raise SystemExit(f'{error}')\n"
        "names = instseg_ext.checkpoint.families()\n"
        "raise SystemExit(0 if 'adelaidet' in names else 1)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
