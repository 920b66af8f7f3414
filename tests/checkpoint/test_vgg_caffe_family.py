"""Caffe's VGG-16 for ImageNet: names, notes, what is refused, and the command."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from checkpoint.caffe_writer import CONVOLUTION, INNER_PRODUCT, write_caffemodel
from methods.foreign import tensors

from instseg_ext.checkpoint import (
    ConversionError,
    InstSegCheckpointer,
    convert,
    convert_with_variant,
    read_weights,
    vgg_caffe_family,
)
from instseg_ext.cli.main import main
from instseg_ext.modeling.vgg import VGG

CHANNELS = (64, 128, 256, 512, 512)
CONVS = (2, 2, 3, 3, 3)
FC6, FC7, FC8 = (4096, 25088), (4096, 4096), (1000, 4096)


def trunk(widths=CHANNELS):
    """Shapes of the convolutions by Caffe's names."""
    shapes, channels = {}, 3
    for stage, (out, convs) in enumerate(zip(widths, CONVS, strict=True), start=1):
        for i in range(1, convs + 1):
            shapes |= {
                f"conv{stage}_{i}/0": (out, channels, 3, 3),
                f"conv{stage}_{i}/1": (out,),
            }
            channels = out
    return shapes


def layer(name, shape):
    return {f"{name}/0": shape, f"{name}/1": shape[:1]}


HEADS = layer("fc6", FC6) | layer("fc7", FC7)
COPIES = layer("fc6_mask", FC6) | layer("fc7_mask", FC7)
FULL = trunk() | HEADS | layer("fc8", FC8)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({}, "VGG-16 without fc6 and fc7"),
        (HEADS | layer("fc8", FC8), "VGG-16 with fc6, fc7"),
        (HEADS | COPIES, "VGG-16 with fc6, fc7, fc6_mask, fc7_mask"),
    ],
)
def test_every_layer_has_its_place(extra, text):
    weights, report, variant = convert_with_variant(tensors(trunk() | extra))
    assert report.family == "vgg-caffe"
    assert report.variant == text
    assert variant.backbone_only
    assert not report.config
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in VGG().state_dict().items()}
    heads = {n: s for n, s in extra.items() if not n.startswith("fc8")}
    for name, shape in heads.items():
        module, number = name.split("/")
        expected[f"{module}.{('weight', 'bias')[int(number)]}"] = shape
    assert {name: tuple(value.shape) for name, value in weights.items()} == expected
    dropped = {"ImageNet classifier"} if len(extra) > len(heads) else set()
    assert set(report.dropped.values()) == dropped
    assert any("INPUT.FORMAT BGR" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"conv3_3/1": None}, r"no whole VGG-16 of Caffe: conv3_3\.bias is missing"),
        (layer("conv5_4", (512, 512, 3, 3)), r"conv5_4\.weight is unknown"),  # VGG-19
        (layer("fc6", (1024, 512, 3, 3)), r"fc6\.weight is \[1024, 512, 3, 3\] instead of"),
        ({"fc7/1": None}, r"fc7\.bias is missing"),
        (layer("score_fr", (21, 4096, 1, 1)), "no place in the key map of vgg-caffe: score_fr/0"),
        (layer("cls_score", (21, 4096)), "of no known family"),
    ],
)
def test_other_nets_are_refused(change, told):
    shapes = {name: shape for name, shape in (FULL | change).items() if shape is not None}
    with pytest.raises(ConversionError, match=told):
        convert(tensors(shapes))


@pytest.fixture
def small(monkeypatch):
    """The same net with a sixteenth of the channels."""
    monkeypatch.setattr(vgg_caffe_family, "VGG", functools.partial(VGG, width=4))
    monkeypatch.setattr(vgg_caffe_family, "_HEAD_LAYERS", {"fc6": (6, 32 * 49), "fc7": (6, 6)})
    shapes = trunk([n // 16 for n in CHANNELS]) | layer("fc6", (6, 32 * 49)) | layer("fc7", (6, 6))
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def test_the_published_form_of_the_file_starts_a_model(small, tmp_path, capsys):
    """Layers of the previous form, as VGG_ILSVRC_16_layers.caffemodel has them."""
    source, out = tmp_path / "VGG_ILSVRC_16_layers.caffemodel", tmp_path / "vgg16_caffe.pth"
    layers = {}
    for name, array in small.items():
        kind = CONVOLUTION if name.startswith("conv") else INNER_PRODUCT
        layers.setdefault(name.partition("/")[0], (kind, []))[1].append(array)
    write_caffemodel(source, layers, old=True)
    assert main(["convert", "--from", "auto", str(source), str(out)]) == 0
    assert "family      vgg-caffe\n" in capsys.readouterr().out

    assert read_weights(str(out))["matching_heuristics"] is True
    model = torch.nn.ModuleDict({"backbone": VGG(width=4), "box_head": torch.nn.ModuleDict()})
    model["box_head"]["fc6"] = torch.nn.Linear(32 * 49, 6)
    InstSegCheckpointer(model).load(str(out))
    for name, value in model.state_dict().items():
        module, kind = name.split(".")[-2:]
        wanted = small[f"{module}/{('weight', 'bias').index(kind)}"]
        np.testing.assert_array_equal(value, wanted, err_msg=name)
