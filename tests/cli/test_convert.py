"""``instseg convert``: from a file of others to a prediction, and every way to be refused."""

from __future__ import annotations

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from methods import foreign
from methods.solo import foreign_files as files

import instseg_ext
from instseg_ext import zoo
from instseg_ext.checkpoint import (
    InstSegCheckpointer,
    families,
    read_metadata,
    read_weights,
    sha256_of,
)
from instseg_ext.cli import common, convert
from instseg_ext.cli import main as cli
from instseg_ext.engine.predictor import Predictor, class_names

OPTS = [str(word) for word in files.SMALL_OPTS]
SMALL = ["--config", files.SMALL_CONFIG]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small training checkpoint of the authors' code, with 80 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = foreign.tensors(files.small_solov2(), device="cpu")
    path = tmp_path_factory.mktemp("foreign") / "epoch_36.pth"
    meta = {"mmdet_version": "1.0", "config": "model = dict()", "epoch": 36}
    content = {"meta": meta, "state_dict": state, "optimizer": {"state": {}}}
    # The format of the years in which the published files were written.
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def save(tmp_path):
    def write(shapes, meta=None, name="in.pth"):
        path = tmp_path / name
        torch.save({"state_dict": foreign.tensors(shapes, "cpu"), "meta": meta or {}}, path)
        return path

    return write


def instseg(*words):
    return cli.main(["convert", *map(str, words)])


def error_of(capsys, *words):
    assert instseg(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("instseg: error: ")
    assert err.count("\n") == 1
    return err


def model_of(path):
    """Build the model that a converted file describes and load the file into it."""
    args = argparse.Namespace(config_file="", weights=str(path), register=[], opts=[])
    cfg, method = common.config_from_args(args)
    cfg.MODEL.DEVICE = "cpu"
    return cfg, method


def assert_loaded(model, weights):
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(state[name], tensor), name


# --- conversion ----------------------------------------------------------------------------------


def test_a_converted_file_predicts_without_anything_else(source, tmp_path, capsys):
    out = tmp_path / "made" / "solov2.pth"
    assert instseg("--from", "auto", source, out, *SMALL, *OPTS) == 0
    told = capsys.readouterr().out
    assert "family      solo-authors" in told
    assert "recognised  SOLOv2, 1 x 32 per tower" in told
    assert f"config      {files.SMALL_CONFIG}" in told
    assert "missing     0" in told
    assert "2 beside the weights: meta, optimizer" in told
    assert "counters of batch normalisation" in told

    weights = read_weights(str(out))["model"]
    cfg, method = model_of(out)
    assert method is zoo.METHODS[0]
    assert cfg.MODEL.SOLO.CONV_DIM == 32
    predictor = Predictor(cfg, method, mask_output="bool")
    assert_loaded(predictor.model, weights)
    instances = predictor(np.zeros((64, 64, 3), np.uint8))
    assert instances.pred_masks.shape[1:] == (64, 64)
    assert len(class_names(cfg)) == 80
    assert class_names(cfg)[0] == "person"


def test_detectron2_loads_it_too(source, tmp_path):
    out = tmp_path / "solov2.pth"
    instseg("--from", "solo-authors", source, out, *SMALL, *OPTS)
    cfg, _ = model_of(out)
    weights = read_weights(str(out))["model"]
    assert_loaded(DefaultPredictor(cfg).model, weights)
    for checkpointer in (DetectionCheckpointer, InstSegCheckpointer):
        model = build_model(cfg)
        checkpointer(model).load(str(out))
        assert_loaded(model, weights)


def test_the_file_says_what_it_is(source, tmp_path):
    out = tmp_path / "solov2.pth"
    instseg("--from", "auto", source, out, *SMALL, *OPTS, "MODEL.DEVICE", "cpu")
    metadata = read_metadata(str(out))
    assert metadata["family"] == "solo-authors"
    assert metadata["sha256"] == sha256_of(str(source))
    assert metadata["version"] == instseg_ext.__version__
    assert f"CONFIG: {files.SMALL_CONFIG}" in metadata["config"]
    # The device is that of whoever loads it, not of this machine.
    assert "DEVICE: cuda" in metadata["config"]


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("cell", "nucleus", "debris")},
        {"dataset_meta": {"CLASSES": ["cell", "nucleus", "debris"]}},
        {"dataset_meta": {"classes": ["cell", "nucleus", "debris"]}},
    ],
)
def test_a_fine_tuned_file_brings_its_classes(save, tmp_path, capsys, meta):
    source = save(files.small_solov2("solo-mmdet", classes=3), meta)
    out = tmp_path / "out.pth"
    assert instseg("--from", "auto", source, out, *SMALL, *OPTS) == 0
    cfg, method = model_of(out)
    assert "note        3 classes instead of the config's 80." in capsys.readouterr().out
    assert zoo.class_count(cfg) == 3
    assert class_names(cfg) == ["cell", "nucleus", "debris"]
    Predictor(cfg, method)


def test_names_of_another_number_of_classes_are_not_believed(save, tmp_path):
    source = save(files.small_solov2(classes=2), {"CLASSES": ("cell",), "dataset_meta": "odd"})
    out = tmp_path / "out.pth"
    assert instseg("--from", "auto", source, out, *SMALL, *OPTS) == 0
    assert read_metadata(str(out))["class_names"] == []


def test_a_published_model_needs_no_config(save, tmp_path, capsys):
    shapes = files.resnet(18) | files.solov2_head("solo-authors", convs=2, width=256, kernels=128)
    shapes |= files.mask_features("solo-authors", kernels=128)
    # One number per tensor: the content is not what this is about.
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save(state, source)
    assert instseg("--from", "auto", source, out) == 0
    assert "config      SOLO/solov2_light_448_R_18_FPN_3x" in capsys.readouterr().out
    assert model_of(out)[0].INPUT.MIN_SIZE_TEST == 448


def test_every_name_is_written_when_asked_for(source, tmp_path, capsys):
    report = tmp_path / "new" / "report.txt"
    out = tmp_path / "out.pth"
    words = ("--from", "auto", "--verbose", "--report", report, source, out, *SMALL, *OPTS)
    assert instseg(*words) == 0
    for text in (report.read_text(), capsys.readouterr().out):
        assert "bbox_head.solo_cate.weight" in text
        assert "->  head.category_pred.weight" in text
        assert "dropped     backbone.bn1.num_batches_tracked" in text


def test_a_backbone_needs_no_config_and_carries_none(tmp_path, capsys):
    prefix = "backbone."
    shapes = files.resnet(50, sizes=foreign.SMALL, fpn=32)
    names = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}
    source = tmp_path / "R-50.pkl"
    converted = {
        "stem.conv1.weight": names["conv1.weight"],
        "stem.conv1.norm.weight": names["bn1.weight"],
        "res2.0.conv1.weight": names["layer1.0.conv1.weight"],
    }
    arrays = {name: np.ones(shape, np.float32) for name, shape in converted.items()}
    source.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    out = tmp_path / "backbone.pth"
    assert instseg("--from", "detectron2", source, out) == 0
    assert "MODEL.WEIGHTS" in capsys.readouterr().out
    assert set(read_metadata(str(out))) == {"version", "family", "sha256"}
    cfg = instseg_ext.get_config(files.SMALL_CONFIG, [*OPTS, "MODEL.DEVICE", "cpu"])
    for checkpointer in (DetectionCheckpointer, InstSegCheckpointer):
        model = build_model(cfg)
        checkpointer(model).load(str(out))
        state = model.state_dict()
        for name in converted:
            assert (state[f"backbone.bottom_up.{name}"] == 1).all()

    # With a config it is compared: this one is not whole.
    err = error_of(capsys, "--from", "detectron2", source, tmp_path / "b.pth", *SMALL, *OPTS)
    assert "names of the model are missing: stem.conv1.norm.bias" in err


def test_the_config_that_would_fit_is_named(tmp_path, capsys):
    shapes = files.resnet(18) | files.solov2_head("solo-authors", convs=2, width=256, kernels=128)
    shapes |= files.mask_features("solo-authors", kernels=128)
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "in.pth")
    err = error_of(
        capsys,
        *("--from", "auto", tmp_path / "in.pth", tmp_path / "out.pth"),
        *("--config", "SOLO/solov2_R_18_FPN_1x"),
    )
    assert err.endswith("By its shapes the file is for SOLO/solov2_light_448_R_18_FPN_3x.\n")


# --- refusals ------------------------------------------------------------------------------------


def test_help_lists_every_family():
    assert set(families()) == set(convert.FAMILIES) - {"auto"}


def test_an_existing_file_is_kept_unless_told(source, tmp_path, capsys):
    out = tmp_path / "out.pth"
    out.write_bytes(b"precious")
    assert "--overwrite" in error_of(capsys, "--from", "auto", source, out, *SMALL, *OPTS)
    assert out.read_bytes() == b"precious"
    assert instseg("--from", "auto", source, out, "--overwrite", *SMALL, *OPTS) == 0
    assert read_metadata(str(out))["family"] == "solo-authors"


def test_a_failure_while_writing_leaves_the_old_file(source, tmp_path, monkeypatch):
    out = tmp_path / "out.pth"
    out.write_bytes(b"precious")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        instseg("--from", "auto", source, out, "--overwrite", *SMALL, *OPTS)
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"precious"


def test_nothing_is_written_when_the_model_does_not_fit(source, tmp_path, capsys):
    out, report = tmp_path / "out.pth", tmp_path / "report.txt"
    opts = [*OPTS, "MODEL.SOLO.NUM_CONVS", "2", "MODEL.SOLO.KERNEL_DIM", "64"]
    err = error_of(capsys, "--from", "auto", source, out, *SMALL, "--report", report, *opts)
    assert "6 names of the model are missing: head.category_tower.1.weight" in err
    assert "head.kernel_pred.bias [32] instead of [64]" in err
    assert "missing     head.kernel_tower.1.norm.bias" in report.read_text()
    assert not out.exists()


def test_leftovers_are_named_before_anything_is_written(save, tmp_path, capsys):
    source = save(files.small_solov2() | {"bbox_head.mystery.weight": (3,)})
    out = tmp_path / "out.pth"
    err = error_of(capsys, "--from", "auto", source, out, *SMALL, *OPTS)
    assert "bbox_head.mystery.weight" in err
    assert not out.exists()


class Malicious:
    """Pickles to a call that creates a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_code_in_a_file_runs_only_when_unsafe_is_typed(tmp_path, capsys, suffix):
    target, source, out = tmp_path / "created", tmp_path / f"in{suffix}", tmp_path / "out.pth"
    state = foreign.tensors(files.small_solov2(), "cpu")
    content = {"state_dict": state, "hook": Malicious(target)}
    if suffix == ".pth":
        torch.save(content, source)
    else:
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        source.write_bytes(
            pickle.dumps({"model": arrays, "__author__": "x", "hook": Malicious(target)})
        )
    err = error_of(capsys, "--from", "auto", source, out, *SMALL, *OPTS)
    assert "--unsafe" in err
    assert not target.exists()
    assert not out.exists()
    assert instseg("--from", "auto", "--unsafe", source, out, *SMALL, *OPTS) == 0
    assert target.exists()
    read_weights(str(out))  # what was written holds no code


def test_our_own_files_are_recognised(source, tmp_path, capsys):
    ours = tmp_path / "ours.pth"
    instseg("--from", "auto", source, ours, *SMALL, *OPTS)
    capsys.readouterr()
    assert "needs no conversion" in error_of(capsys, "--from", "auto", ours, tmp_path / "o.pth")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--from solo-autors IN OUT", "no checkpoint family 'solo-autors'; known: adelaidet"),
        ("--from solo-mmdet IN OUT", "it looks like solo-authors"),
        ("--from auto absent.pth OUT", "absent.pth does not exist"),
        ("--from auto IN out.txt", "written as .pth"),
        ("--from auto IN OUT", "no config here describes this model (SOLOv2, 1 x 32"),
        ("--from auto IN OUT --config SOLO/absent", "neither a file nor a known name"),
        (
            "--from auto IN OUT --config MaskRCNN/mask_rcnn_R_50_FPN_1x",
            "is a config of MaskRCNN, but solo-authors files hold SOLO",
        ),
        (
            "--from auto IN OUT --config SOLO/solov2_R_50_FPN_1x MODEL.SOLO.NUM_CLASSES 7",
            "MODEL.SOLO.NUM_CLASSES 7 was typed, but the file has 80 classes",
        ),
        ("--from auto IN OUT --config SOLO/solo_R_50_FPN_1x", "names of the model are missing"),
        ("--from auto file:///absent.pth OUT", "file:///absent.pth cannot be fetched"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(source, tmp_path, capsys, typed, message):
    names = {"IN": str(source), "OUT": str(tmp_path / "out.pth")}
    err = error_of(capsys, *(names.get(word, word) for word in typed.split()))
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npz", b"", "unknown suffix"),
        ("x.pth", b"no zip file", "damaged"),
        ("x.pkl", b"\x80\x04", "damaged"),
    ],
)
def test_unreadable_files(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in error_of(capsys, "--from", "auto", tmp_path / name, tmp_path / "out.pth")


def test_overrides_of_a_backbone_need_a_config(tmp_path, capsys):
    source = tmp_path / "x.pkl"
    weights = {"stem.conv1.weight": np.ones((2, 3, 7, 7), np.float32)}
    source.write_bytes(pickle.dumps({"model": weights, "__author__": "x"}))
    err = error_of(capsys, "--from", "auto", source, tmp_path / "o.pth", "MODEL.RPN.X", "1")
    assert "--config" in err
