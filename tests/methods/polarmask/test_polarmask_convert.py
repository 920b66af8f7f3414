"""Files of the PolarMask authors become our models: names, the order of rays, and nothing else."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from methods.foreign import COUNTER, tensors
from methods.polarmask import foreign_files as files
from methods.polarmask.foreign_files import NEW, OLD
from methods.solo import foreign_files as solo_files

import instseg_ext
from instseg_ext import zoo
from instseg_ext.checkpoint import (
    ConversionError,
    Report,
    check_fit,
    convert,
    convert_with_variant,
    model_shapes,
    read_metadata,
    read_weights,
)
from instseg_ext.cli import main as cli
from instseg_ext.config import find_config
from instseg_ext.methods.polarmask.convert import FAMILIES

UP = "backbone.bottom_up."
SMALL_CONFIG = {False: "PolarMask/polarmask_R_50_768_1x", True: "PolarMask/polarmask_R_50_DCN_2x"}

FLAVOURS = [
    (files.polarmask(), "polarmask_R_50_768_1x"),
    (files.polarmask(101), "polarmask_R_101_768_1x"),
    (files.polarmask(101, groups=64), "polarmask_X_101_768_1x"),
    (files.polarmask_dcn(), "polarmask_R_50_DCN_768_1x"),
    (files.polarmask_dcn(101), "polarmask_R_101_DCN_768_1x"),
    (files.polarmask_dcn(101, groups=64), "polarmask_X_101_DCN_768_1x"),
    (files.polarmask_dcn(101, offsets=files.V2), "polarmask_R_101_DCN_6x"),
    (files.fcos(), "fcos_R_50_FPN_1x"),
]
# Published for larger images, too, which weights do not tell.
LARGER = {config.replace("768_1x", "2x") for _, config in FLAVOURS if "768_1x" in config}


@functools.cache
def shapes_of_config(config, opts=()):
    return model_shapes(instseg_ext.get_config(config, opts))


def shapes_of(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize(("shapes", "config"), FLAVOURS, ids=[config for _, config in FLAVOURS])
def test_every_flavour_is_recognised_and_maps_onto_its_model(shapes, config):
    weights, report, variant = convert_with_variant(tensors(shapes))
    assert report.family == "polarmask"
    assert report.config == f"PolarMask/{config}"
    assert variant.num_classes == 80
    assert not variant.backbone_only
    assert shapes_of(weights) == shapes_of_config(report.config)
    counters = {name for name in shapes if name.endswith(COUNTER)}
    assert set(report.dropped) == counters
    assert set(report.mapped) == set(shapes) - counters
    assert sorted(report.mapped.values()) == sorted(weights)
    assert report.leftovers == report.missing == []
    assert report.mismatched == {}


@pytest.mark.parametrize(("shapes", "config"), FLAVOURS[:4:3])
def test_files_of_both_generations_of_names_are_the_same_model(shapes, config):
    old = {name.replace(".polar_", ".fcos_"): shape for name, shape in shapes.items()}
    weights, report = convert(tensors(old))
    assert report.config == f"PolarMask/{config}"
    assert shapes_of(weights) == shapes_of_config(report.config)


@pytest.mark.parametrize(
    ("shapes", "opts"),
    [(files.fcos(101), {"DEPTH": 101}), (files.fcos(101, groups=64), {"NUM_GROUPS": 64})],
)
def test_larger_fcos_models_are_the_small_one_with_other_keys(shapes, opts):
    weights, report = convert(tensors(shapes))
    assert report.config == "PolarMask/fcos_R_50_FPN_1x"
    cfg = instseg_ext.get_config(report.config, report.opts)
    assert {key: cfg.MODEL.RESNETS[key] for key in opts} == opts
    assert (cfg.INPUT.FORMAT == "RGB") == ("NUM_GROUPS" in opts)
    check_fit(weights, model_shapes(cfg), report)


def test_heads_have_the_names_and_parameters_of_the_authors():
    """The counts were read from the authors' modules: they keep the synthetic files honest."""
    assert len(files.head()) == 54
    assert len(files.head(deform=True)) == 90
    assert sum(tensor.numel() for tensor in tensors(files.head()).values()) == 7_362_947


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("backbone.conv1.weight", f"{UP}stem.conv1.weight"),
        ("backbone.layer3.5.bn2.running_var", f"{UP}res4.5.conv2.norm.running_var"),
        ("backbone.layer2.0.downsample.1.bias", f"{UP}res3.0.shortcut.norm.bias"),
        ("backbone.layer4.2.conv2_offset.bias", f"{UP}res5.2.conv2_offset.bias"),
        ("neck.lateral_convs.0.conv.bias", "backbone.fpn_lateral3.bias"),
        ("neck.fpn_convs.2.conv.weight", "backbone.fpn_output5.weight"),
        ("neck.fpn_convs.3.conv.weight", "backbone.top_block.p6.weight"),
        ("neck.fpn_convs.4.conv.bias", "backbone.top_block.p7.bias"),
        ("bbox_head.cls_convs.0.weight", "head.cls_tower.0.weight"),
        ("bbox_head.reg_convs.9.bias", "head.box_tower.3.bias"),
        ("bbox_head.mask_convs.3.conv_offset_mask.weight", "head.mask_tower.1.offset.weight"),
        ("bbox_head.mask_convs.10.weight", "head.mask_tower.3.norm.weight"),
        ("bbox_head.polar_cls.bias", "head.cls_logits.bias"),
        ("bbox_head.polar_reg.weight", "head.box_pred.weight"),
        ("bbox_head.polar_mask.weight", "head.ray_pred.weight"),
        ("bbox_head.polar_centerness.weight", "head.ctrness.weight"),
        ("bbox_head.scales_bbox.4.scale", "head.scales_box.4.scale"),
        ("bbox_head.scales_mask.0.scale", "head.scales_ray.0.scale"),
    ],
)
def test_names(old, new):
    assert convert(tensors(files.polarmask_dcn()))[1].mapped[old] == new


def test_names_of_plain_towers_and_of_fcos():
    mapped = convert(tensors(files.fcos()))[1].mapped
    assert mapped["bbox_head.reg_convs.2.conv.weight"] == "head.box_tower.2.weight"
    assert mapped["bbox_head.cls_convs.3.gn.bias"] == "head.cls_tower.3.norm.bias"
    assert mapped["bbox_head.fcos_reg.bias"] == "head.box_pred.bias"
    assert mapped["bbox_head.scales.1.scale"] == "head.scales_box.1.scale"


# --- the order of rays ---------------------------------------------------------------------------

RAYS = "head.ray_pred."


@pytest.mark.parametrize("names", [NEW, OLD])
def test_nothing_changes_but_the_order_of_old_rays(names):
    state = tensors(files.small(names, deform=True), device="cpu")
    weights, report = convert(state)
    for old, new in report.mapped.items():
        want = state[old]
        if names == OLD and new.startswith(RAYS):
            want = torch.cat([want[9:], want[:9]])
        assert torch.equal(weights[new], want), old


@pytest.mark.parametrize("rays", [4, 24, 36, 72])
def test_old_rays_are_turned_by_a_quarter(rays):
    state = tensors(files.head(OLD, rays=rays, width=32), device="cpu")
    state["bbox_head.fcos_mask.bias"] = torch.arange(float(rays))
    before = {name: tensor.clone() for name, tensor in state.items()}
    weights, report = convert(state)
    # Old ray R / 4 points down, as new ray 0 does; old ray 0 points left, as new ray 3 R / 4 does.
    assert weights[f"{RAYS}bias"][0] == rays // 4
    assert weights[f"{RAYS}bias"][3 * rays // 4] == 0
    assert torch.equal(weights[f"{RAYS}weight"][0], before["bbox_head.fcos_mask.weight"][rays // 4])
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert "2019-11-12" in report.notes[0]
    assert "were turned by a quarter" in report.summary()


def test_new_rays_stay_and_have_no_note():
    assert not any("turned" in note for note in convert(tensors(files.polarmask()))[1].notes)
    assert convert(tensors(files.fcos()))[1].notes == ()


@pytest.mark.parametrize("rays", [18, 6])
def test_old_rays_that_have_no_quarter_are_refused(rays):
    with pytest.raises(ConversionError, match=rf"fcos_mask is \[{rays}, .* divisible by 4"):
        convert(tensors(files.head(OLD, rays=rays)))
    assert convert(tensors(files.head(NEW, rays=rays)))[1].variant.startswith(
        f"PolarMask, {rays} rays"
    )


# --- what weights do not tell --------------------------------------------------------------------


def test_the_size_of_images_that_weights_do_not_tell_is_said():
    weights, report = convert(tensors(files.polarmask()))
    larger = "PolarMask/polarmask_R_50_2x"
    assert report.notes[0].endswith(f"--config {larger}.")
    assert report.notes[0] in report.summary()
    check_fit(weights, shapes_of_config(larger), Report("polarmask"))


@pytest.mark.parametrize("classes", [1, 3])
def test_the_classifier_tells_the_number_of_classes(classes):
    shapes = files.polarmask() | files.head(classes=classes)
    assert convert_with_variant(tensors(shapes))[2].num_classes == classes


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (files.polarmask(18), "PolarMask, 36 rays, 4 x 256 per tower, ResNet-18"),
        (
            files.polarmask() | files.head(rays=72),
            "PolarMask, 72 rays, 4 x 256 per tower, ResNet-50",
        ),
        (
            files.backbone() | files.head(deform=True),
            "PolarMask, 36 rays, 4 x 256 per tower, all deformable, ResNet-50",
        ),
        (files.fcos(34), "FCOS, 4 x 256 per tower, ResNet-34"),
    ],
)
def test_a_model_nobody_published_has_no_config(shapes, text):
    report = convert(tensors(shapes))[1]
    assert (report.config, report.variant) == ("", text)


# --- what is wrong is named ----------------------------------------------------------------------


def test_a_name_too_many_is_named():
    state = tensors(files.polarmask()) | {f"bbox_head.extra.{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ConversionError, match=r"^12 names .*extra\.0, .*extra\.9 and 2 more") as e:
        convert(state)
    assert len(e.value.report.leftovers) == 12


def test_missing_names_and_other_shapes_are_named():
    shapes = files.polarmask()
    del shapes["bbox_head.scales_mask.3.scale"], shapes["neck.fpn_convs.4.conv.weight"]
    shapes["bbox_head.polar_reg.bias"] = (8,)
    weights, report = convert(tensors(shapes))
    with pytest.raises(ConversionError) as error:
        check_fit(weights, shapes_of_config(report.config), report)
    message = str(error.value)
    assert "2 names of the model are missing: " in message
    assert "head.scales_ray.3.scale" in message
    assert "backbone.top_block.p7.weight" in message
    assert "head.box_pred.bias [8] instead of [4]" in message
    assert "PolarMask/polarmask_R_50_768_1x" in message


def test_the_model_of_another_variant_does_not_fit():
    weights, _ = convert(tensors(files.polarmask()))
    expected = shapes_of_config("PolarMask/polarmask_R_50_DCN_768_1x")
    with pytest.raises(ConversionError, match=r"head\.cls_tower\.0\.offset|conv2_offset"):
        check_fit(weights, expected, Report("polarmask"))


@pytest.mark.parametrize(
    ("shapes", "typed", "owner"),
    [
        (files.polarmask(), "solo-authors", "polarmask"),
        (files.polarmask(names=OLD), "solo-mmdet", "polarmask"),
        (files.fcos(), "torchvision", "polarmask"),
        (files.backbone() | solo_files.vanilla_head("solo-authors"), "polarmask", "solo-authors"),
        (files.backbone() | solo_files.vanilla_head("solo-mmdet"), "polarmask", "solo-mmdet"),
    ],
)
def test_another_family_than_typed_is_named(shapes, typed, owner):
    with pytest.raises(ConversionError, match=f"not those of {typed} .* looks like {owner}"):
        convert(tensors(shapes), typed)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deform", [False, True])
def test_the_command_writes_a_file_that_loads_whole(tmp_path, capsys, deform):
    """The file is as MMDetection 1 saves it: weights beside the state of the training."""
    state = tensors(files.small(OLD, deform=deform), device="cpu")
    source, out = tmp_path / "latest.pth", tmp_path / "out.pth"
    content = {"meta": {"epoch": 12, "CLASSES": ("a", "b", "c")}, "state_dict": state}
    torch.save(content | {"optimizer": {"state": {}}}, source)
    opts = [str(word) for word in files.SMALL_OPTS]
    words = ["--from", "auto", str(source), str(out), "--config", SMALL_CONFIG[deform], *opts]
    assert cli.main(["convert", *words]) == 0
    told = capsys.readouterr().out
    assert "family      polarmask\n" in told
    assert "were turned by a quarter" in told
    assert "3 classes instead of the config's 80." in told
    assert told.endswith(f"\nCheck it: instseg check-model --weights {out} --input PICTURES\n")
    metadata = read_metadata(str(out))
    assert metadata["class_names"] == ["a", "b", "c"]
    cfg = instseg_ext.get_config(
        SMALL_CONFIG[deform], [*files.SMALL_OPTS, "MODEL.POLARMASK.NUM_CLASSES", 3]
    )
    model = build_model(cfg)
    model.load_state_dict(read_weights(str(out))["model"])
    assert torch.equal(model.head.ray_pred.bias[0], state["bbox_head.fcos_mask.bias"][9])


# --- the page and the door -----------------------------------------------------------------------

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"


def test_the_page_lists_what_is_recognised():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines()]
    listed = {
        config
        for row in rows
        if len(row) == 3 and row[0] == "`polarmask`"
        for config in re.findall(r"`PolarMask/(\w+)`", row[2])
    }
    # The authors' config of six times the schedule is not known to have a file.
    assert listed == {config for _, config in FLAVOURS if "6x" not in config} | LARGER
    assert all(find_config(f"PolarMask/{config}") for config in listed)


def test_the_method_brings_its_families():
    method = next(method for method in zoo.METHODS if method.name == "PolarMask")
    assert method.converters is FAMILIES
