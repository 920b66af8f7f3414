"""Recognising families, comparing with a model, the report, and detectron2's own files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import instseg_ext
from instseg_ext.checkpoint import (
    ConversionError,
    Family,
    KeyMap,
    Rename,
    Report,
    Variant,
    check_destination,
    check_fit,
    convert,
    convert_with_variant,
    families,
    find_family,
    model_shapes,
    read_metadata,
    read_weights,
    register_family,
    sha256_of,
    shapes_of,
    write_converted,
)
from instseg_ext.checkpoint import family as registry

ONE = torch.ones(1)


def toy_family(name="toy", prefix="toy.", **variant):
    return Family(
        name=name,
        summary="files of a toy",
        key_map=KeyMap([Rename(f"{prefix}{{p*}}", "{p}")]),
        claims=lambda names: any(key.startswith(prefix) for key in names),
        describe=lambda shapes: Variant("a toy", **variant),
    )


@pytest.fixture
def toy(monkeypatch):
    known = families()
    monkeypatch.setattr(registry, "_REGISTRY", known)
    return register_family(toy_family())


# --- families ------------------------------------------------------------------------------------


def test_families_are_listed_in_order(toy):
    assert list(families()) == sorted(families())
    assert find_family("toy") is toy


def test_an_unknown_family_is_refused_with_those_known(toy):
    with pytest.raises(ValueError, match=r"no checkpoint family 'tyo'; known: adelaidet.*, toy"):
        find_family("tyo")


def test_a_name_belongs_to_one_family(toy):
    assert register_family(toy) is toy
    with pytest.raises(ValueError, match="two checkpoint families named 'toy'"):
        register_family(toy_family())


def test_auto_finds_the_one_that_claims_the_file(toy):
    weights, report = convert({"toy.a": ONE})
    assert list(weights) == ["a"]
    assert (report.family, report.variant) == ("toy", "a toy")


def test_a_file_that_two_claim_needs_a_word(toy):
    register_family(toy_family("twin"))
    with pytest.raises(ConversionError, match="toy or twin: say which with --from"):
        convert({"toy.a": ONE})
    assert convert({"toy.a": ONE}, "twin")[1].family == "twin"


def test_an_unknown_file_is_described():
    state = {f"encoder.{i}.weight": ONE for i in range(20)}
    with pytest.raises(ConversionError, match="no known family") as error:
        convert(state)
    message = str(error.value)
    assert "20 names" in message
    assert "encoder.4.weight and 15 more" in message
    assert "solo-authors" in message
    assert len(message) < 500


def test_names_like_ours_are_recognised():
    with pytest.raises(ConversionError, match="this package's own"):
        convert({"backbone.bottom_up.x": ONE, "head.category_tower.0.weight": ONE})


@pytest.mark.parametrize("state", [{}, {"": ONE}])
def test_nothing_to_recognise(state):
    with pytest.raises(ConversionError, match="no known family"):
        convert(state)


@pytest.mark.parametrize("state", [{1: ONE}, [ONE], None])
def test_what_holds_no_names_is_refused(state):
    with pytest.raises(ConversionError, match="no tensors by name"):
        convert(state)


def test_the_prefix_of_parallel_wrappers_is_taken_off(toy):
    assert list(convert({"module.toy.a": ONE, "module.toy.b": ONE})[0]) == ["a", "b"]


def test_endless_names_of_strangers_do_not_fill_the_screen():
    with pytest.raises(ConversionError) as error:
        convert({"x" * 10_000: ONE, "line\nbreak": ONE})
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


# --- fit -----------------------------------------------------------------------------------------


def test_counters_of_a_model_need_not_be_in_the_file():
    report = Report("toy")
    check_fit({"a": ONE}, {"a": (1,), "norm.num_batches_tracked": ()}, report)
    assert report.missing == []


MODEL = {
    "backbone.bottom_up.stem.conv1.weight": (8, 3, 7, 7),
    "backbone.bottom_up.stem.conv1.norm.running_mean": (8,),
    "backbone.bottom_up.res2.0.conv1.weight": (4, 8, 1, 1),
    "head.category_pred.weight": (3, 8, 3, 3),
}
BACKBONE = {
    "stem.conv1.weight": torch.empty(8, 3, 7, 7),
    "stem.conv1.norm.running_mean": torch.empty(8),
    "res2.0.conv1.weight": torch.empty(4, 8, 1, 1),
}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (BACKBONE, None),
        # Parts that the model does not build, or has elsewhere.
        (BACKBONE | {"res5.0.conv1.weight": ONE, "fc6.weight": ONE}, None),
        (BACKBONE | {"res2.1.conv1.weight": ONE}, r"not the model's: res2\.1"),
        ({k: v for k, v in BACKBONE.items() if "res2" not in k}, r"missing: res2\.0\.conv1"),
        # No statistics at all: affine layers. Some: a damaged file.
        ({k: v for k, v in BACKBONE.items() if "running" not in k}, None),
        (BACKBONE | {"stem.conv1.weight": torch.empty(8, 1, 7, 7)}, "shapes differ"),
        ({"unrelated.weight": ONE}, r"not the model's: unrelated\.weight"),
    ],
)
def test_a_backbone_fits_by_the_ends_of_its_names(weights, message):
    if message is None:
        check_fit(weights, MODEL, Report("toy"), backbone_only=True)
        return
    with pytest.raises(ConversionError, match=message):
        check_fit(weights, MODEL, Report("toy"), backbone_only=True)


def test_shapes_of_a_model_cost_no_memory():
    cfg = instseg_ext.get_config("SOLO/solov2_R_50_FPN_1x", ["MODEL.DEVICE", "cpu"])
    assert model_shapes(cfg)["head.category_pred.weight"] == (80, 512, 3, 3)
    assert cfg.MODEL.DEVICE == "cpu"


# --- report --------------------------------------------------------------------------------------


def test_the_report_counts_and_lists():
    report = Report(
        "toy",
        "a toy",
        "Toys/one",
        ("MODEL.TOY", True),
        ("mind the gap.",),
        mapped={"toy.a": "a"},
        dropped={"optimizer": "beside the weights", "x": "odd", "y": "odd", "z": "odd"},
        missing=["m"],
        leftovers=["l"],
        mismatched={"s": ((1,), (2,))},
    )
    summary = report.summary()
    for line in (
        "family      toy",
        "config      Toys/one MODEL.TOY True",
        "note        mind the gap.",
    ):
        assert line in summary
    assert "1 beside the weights: optimizer" in summary
    assert "3 odd: x, y and 1 more" in summary
    full = report.full()
    for line in (
        "mapped      toy.a  ->  a",
        "dropped     z  (odd)",
        "missing     m",
        "left over   l",
        "mismatched  s  [1] in the file, [2] in the model",
    ):
        assert line in full.splitlines()


# --- writing -------------------------------------------------------------------------------------


def test_the_written_file_is_plain_and_says_where_it_comes_from(tmp_path):
    path = tmp_path / "new" / "x.pth"
    big = torch.arange(10_000.0)
    write_converted(str(path), {"a": big[:2]}, {"family": "toy", "sha256": "0", "config": "A: 1"})
    content = read_weights(str(path))
    assert content["model"]["a"].tolist() == [0, 1]
    assert "toy" in content["__author__"]
    assert "matching_heuristics" not in content
    assert read_metadata(str(path)) == {
        "version": instseg_ext.__version__,
        "family": "toy",
        "sha256": "0",
        "config": "A: 1",
    }
    assert path.stat().st_size < 5000, "a view dragged its storage along"


def test_a_backbone_is_marked_for_matching_by_names(tmp_path):
    path = str(tmp_path / "x.pth")
    write_converted(path, {"stem.a": ONE}, {"family": "toy", "sha256": "0"}, backbone_only=True)
    assert read_weights(path)["matching_heuristics"] is True


def test_an_existing_file_is_replaced_only_when_told(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"precious")
    metadata = {"family": "toy", "sha256": "0"}
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_converted(str(path), {"a": ONE}, metadata)
    assert path.read_bytes() == b"precious"
    write_converted(str(path), {"a": ONE}, metadata, overwrite=True)
    assert read_weights(str(path))["model"]["a"].tolist() == [1]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    path.write_bytes(b"precious")

    def fail(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_converted(str(path), {"a": ONE}, {"family": "toy"}, overwrite=True)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_destination(tmp_path):
    (tmp_path / "x.pth").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_destination(str(tmp_path / "x.pth"), overwrite=True)


@pytest.mark.parametrize("name", ["x.pkl", "x", "x.safetensors"])
def test_another_suffix_is_refused(name):
    with pytest.raises(ValueError, match=r"written as \.pth"):
        check_destination(name)


def test_sha256(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert sha256_of(str(file)).startswith("ba7816bf8f01cfea")


# --- detectron2 ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mask_rcnn_shapes():
    return model_shapes(instseg_ext.get_config("MaskRCNN/mask_rcnn_R_50_FPN_1x"))


def zero_array(shape):
    """Return an array that costs no memory, whatever its shape."""
    return np.broadcast_to(np.float32(0), shape)


def test_a_mask_rcnn_of_the_model_zoo_keeps_its_names(mask_rcnn_shapes):
    state = {name: zero_array(shape) for name, shape in mask_rcnn_shapes.items()}
    extra = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.cell_anchors.0")
    state |= {name: zero_array((3,)) for name in extra}
    weights, report, variant = convert_with_variant(state)
    assert report.family == "detectron2"
    assert report.config == "MaskRCNN/mask_rcnn_R_50_FPN_1x"
    assert variant.num_classes == 80
    assert shapes_of(weights) == mask_rcnn_shapes
    assert all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    assert set(report.dropped) == set(extra)
    check_fit(weights, mask_rcnn_shapes, report)


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.RESNETS.DEPTH", 101],
        [
            *("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NUM_GROUPS", 32),
            *("MODEL.RESNETS.WIDTH_PER_GROUP", 8),
        ],
    ],
    ids=["R-101", "X-101"],
)
def test_deeper_models_of_the_zoo_get_the_keys_that_differ(opts):
    shapes = model_shapes(instseg_ext.get_config("MaskRCNN/mask_rcnn_R_50_FPN_1x", opts))
    variant = find_family("detectron2").describe(shapes)
    assert model_shapes(instseg_ext.get_config(variant.config, variant.opts)) == shapes


@pytest.fixture(scope="module")
def resnet_names(mask_rcnn_shapes):
    prefix = "backbone.bottom_up."
    return {k.removeprefix(prefix): v for k, v in mask_rcnn_shapes.items() if k.startswith(prefix)}


def test_imagenet_weights_of_torchvision_pass(resnet_names, mask_rcnn_shapes):
    state = {name: zero_array(shape) for name, shape in resnet_names.items()}
    state |= {"stem.fc.weight": zero_array((1000, 2048)), "stem.fc.bias": zero_array((1000,))}
    weights, report, variant = convert_with_variant(state)
    assert variant.backbone_only
    assert shapes_of(weights) == resnet_names
    assert set(report.dropped) == {"stem.fc.weight", "stem.fc.bias"}
    check_fit(weights, mask_rcnn_shapes, report, backbone_only=True)


def test_imagenet_weights_of_caffe2_get_our_names(resnet_names, mask_rcnn_shapes):
    state = {"conv1_b": zero_array((64,)), "fc1000_w": zero_array((1000, 2048))}
    branches = {
        "shortcut": "branch1",
        "conv1": "branch2a",
        "conv2": "branch2b",
        "conv3": "branch2c",
    }
    for name, shape in resnet_names.items():
        if "running" in name:
            continue  # they are folded into the affine layers
        stage, *rest, parameter = name.split(".")
        norm = "norm" in rest
        ending = {"weight": "s" if norm else "w", "bias": "b"}[parameter]
        if stage == "stem":
            old = f"res_conv1_bn_{ending}" if norm else "conv1_w"
        else:
            old = f"{stage}_{rest[0]}_{branches[rest[1]]}{'_bn' if norm else ''}_{ending}"
        state[old] = zero_array(shape)
    weights, report, variant = convert_with_variant(state)
    assert variant.backbone_only
    assert set(report.dropped) == {"conv1_b", "fc1000_w"}
    assert set(weights) == {name for name in resnet_names if "running" not in name}
    check_fit(weights, mask_rcnn_shapes, report, backbone_only=True)


def test_a_pickle_of_arrays_is_read_and_converted(tmp_path, resnet_names):
    file = tmp_path / "R-50.pkl"
    name = "stem.conv1.weight"
    content = {"model": {name: np.ones((2, 2), np.float32)}, "__author__": "somebody"}
    file.write_bytes(pickle.dumps(content))
    weights, report = convert(read_weights(str(file))["model"])
    assert report.family == "detectron2"
    assert weights[name].tolist() == [[1, 1], [1, 1]]
