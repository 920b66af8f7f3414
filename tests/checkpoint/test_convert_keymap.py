"""Key maps: the little language of names, and what a pass over a file finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instseg_ext.checkpoint import (
    COUNTERS,
    ConversionError,
    Drop,
    KeyMap,
    Rename,
    block_rules,
    fpn_rules,
    resnet_facts,
    resnet_rules,
)

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("source", "target", "name", "want"),
    [
        ("a.weight", "b.weight", "a.weight", "b.weight"),
        ("a.weight", "b", "aXweight", None),
        ("a", "b", "ab", None),
        ("layer{a}.{b}", "res{a+1}.{b}", "layer4.10", "res5.10"),
        ("layer{a}.{b}", "res{a+1}.{b}", "layer.10", None),
        ("x.{n+2}", "y.{n}", "x.5", "y.3"),
        ("x.{n+2}", "y.{n}", "x.1", None),
        ("t.{3*q}", "u.{q}", "t.9", "u.3"),
        ("t.{3*q}", "u.{q}", "t.10", None),
        ("t.{3*q+1}", "u.{q}", "t.10", "u.3"),
        ("t.{q}", "u.{2*q-1}", "t.3", "u.5"),
        ("c_{axis:x|y}.{p*}", "d.{p}.{axis}{axis}", "c_x.norm.weight", "d.norm.weight.xx"),
        ("c_{axis:x|y}.{p*}", "d", "c_z.weight", None),
        ("c.{p*}", "d.{p}", "c.", None),
    ],
)
def test_renaming(source, target, name, want):
    assert Rename(source, target).apply(name) == want


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("a.{q}", "b.{p}"),
        ("a.{q}", "b.{q*}"),
        ("a.{}", "b"),
        ("a.{Q!}", "b"),
        ("a.{q}.{q}", "b.{q}"),
        ("a.{1:x|y}", "b"),
    ],
)
def test_rules_that_cannot_work_are_refused_when_they_are_made(source, target):
    with pytest.raises(ValueError, match=r"hole|lacks"):
        Rename(source, target)


def test_one_pass_keeps_the_order_and_sorts_out_every_name():
    rules = [COUNTERS, Drop("fc.{p*}", "a classifier"), Rename("{p*}.w", "{p}.weight")]
    state = {"b.w": ONE, "a.w": ONE, "a.num_batches_tracked": ONE, "fc.w": ONE, "odd": ONE}
    mapped = KeyMap(rules).apply(state)
    assert list(mapped.weights) == ["b.weight", "a.weight"]
    assert mapped.renamed == {"b.w": "b.weight", "a.w": "a.weight"}
    assert mapped.dropped == {
        "a.num_batches_tracked": "counters of batch normalisation",
        "fc.w": "a classifier",
    }
    assert mapped.leftovers == ["odd"]
    assert list(state) == ["b.w", "a.w", "a.num_batches_tracked", "fc.w", "odd"]


def test_the_first_rule_that_concerns_a_name_decides():
    rules = [Rename("a.x", "special"), Rename("a.{p*}", "b.{p}"), Drop("a.{p*}", "never")]
    assert list(KeyMap(rules).apply({"a.x": ONE, "a.y": ONE}).weights) == ["special", "b.y"]


def test_two_names_that_become_one_are_an_error():
    rules = [Rename("a.{q}", "x"), Rename("b", "y")]
    with pytest.raises(ConversionError, match=r"both a\.1 and a\.2 become x"):
        KeyMap(rules).apply({"a.1": ONE, "b": ONE, "a.2": ONE})


def test_a_transform_changes_the_tensor_it_belongs_to():
    rules = [Rename("a", "b", lambda t: t.roll(-1, 0)), Rename("c", "d")]
    numbers = torch.arange(3)
    weights = KeyMap(rules).apply({"a": numbers, "c": numbers}).weights
    assert weights["b"].tolist() == [1, 2, 0]
    assert weights["d"].tolist() == numbers.tolist() == [0, 1, 2]


def test_a_note_is_made_once_by_a_rule_that_was_applied():
    rules = [Rename("a.{q}", "b.{q}", note="turned."), Rename("c", "d", note="never.")]
    assert KeyMap(rules).apply({"a.0": ONE, "a.1": ONE}).notes == ["turned."]


def test_arrays_and_numbers_become_tensors_without_gradient():
    rules = [Rename("{p*}", "x.{p}")]
    state = {
        "array": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.float32(2.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    weights = KeyMap(rules).apply(state).weights
    assert weights["x.array"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert weights["x.scalar"].shape == ()
    assert weights["x.scalar"].item() == 2.5
    assert not weights["x.parameter"].requires_grad


def test_what_is_no_tensor_is_named():
    with pytest.raises(ConversionError, match="meta is a dict, not a tensor"):
        KeyMap([Rename("{p*}", "{p}")]).apply({"meta": {}})


# --- shared rules --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "name", "want"),
    [
        (resnet_rules(), "layer1.0.downsample.1.running_mean", "res2.0.shortcut.norm.running_mean"),
        (resnet_rules("b.", "c."), "b.bn1.bias", "c.stem.conv1.norm.bias"),
        (resnet_rules("b.", "c."), "conv1.weight", None),
        (fpn_rules(first_level=3), "neck.fpn_convs.0.conv.bias", "backbone.fpn_output3.bias"),
        (fpn_rules("n.", "m."), "n.lateral_convs.1.conv.weight", "m.fpn_lateral3.weight"),
        (block_rules("h.{q}", "t.{q}"), "h.0.bn.running_var", "t.0.norm.running_var"),
        (block_rules("h.{q}", "t.{q}"), "h.0.conv.bias", "t.0.bias"),
        (block_rules("h.{q}", "t.{q}"), "h.0.conv.conv_offset.bias", "t.0.offset.bias"),
    ],
)
def test_shared_rules(rules, name, want):
    assert KeyMap(rules).apply({name: ONE}).renamed.get(name) == want


def shapes_with_blocks(*blocks, conv3=True, conv2=(64, 64, 3, 3), offsets=None):
    shapes = {}
    for stage, count in enumerate(blocks, start=2):
        for b in range(count):
            shapes[f"res{stage}.{b}.conv1.weight"] = (64, 64, 1, 1)
            shapes[f"res{stage}.{b}.conv2.weight"] = conv2
            if conv3:
                shapes[f"res{stage}.{b}.conv3.weight"] = (256, 64, 1, 1)
            if stage in (offsets or {}):
                shapes[f"res{stage}.{b}.conv2_offset.weight"] = (offsets[stage], 64, 3, 3)
    return shapes


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (shapes_with_blocks(2, 2, 2, 2, conv3=False), "ResNet-18"),
        (shapes_with_blocks(3, 4, 6, 3, conv3=False), "ResNet-34"),
        (shapes_with_blocks(3, 4, 6, 3), "ResNet-50"),
        (shapes_with_blocks(3, 8, 36, 3), "ResNet-152"),
        (shapes_with_blocks(3, 4, 23, 3, conv2=(256, 8, 3, 3)), "ResNeXt-101 32x8d"),
        (
            shapes_with_blocks(3, 4, 6, 3, offsets={3: 18, 4: 18, 5: 18}),
            "ResNet-50 with deformable convolution v1",
        ),
        (
            shapes_with_blocks(3, 4, 6, 3, offsets={4: 27, 5: 27}),
            "ResNet-50 with deformable convolution ?",
        ),
        (shapes_with_blocks(1, 1, 1, 1), "an unknown ResNet"),
        ({}, "an unknown ResNet"),
    ],
)
def test_facts_of_a_resnet(shapes, text):
    assert resnet_facts(shapes, "").text == text
