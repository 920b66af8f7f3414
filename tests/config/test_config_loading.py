"""Config files are found by name, loaded without running code, and overridden by type."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode, get_cfg

import instseg_ext
from instseg_ext import config, zoo


@pytest.fixture
def cfg():
    cfg = get_cfg()
    config.add_shared_config(cfg)
    return cfg


def test_names_cover_every_project_config():
    names = config.config_names()
    assert "MaskRCNN/mask_rcnn_R_50_FPN_1x" in names
    assert not any("Base" in name for name in names)
    assert all(config.find_config(name).is_file() for name in names)


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_find_by_name(suffix):
    found = config.find_config("MaskRCNN/mask_rcnn_R_50_FPN_1x" + suffix)
    assert found.name == "mask_rcnn_R_50_FPN_1x.yaml"


def test_find_by_checkout_path_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find_config("projects/MaskRCNN/configs/mask_rcnn_R_50_FPN_1x.yaml").is_file()


def test_unknown_name_lists_the_nearest():
    with pytest.raises(FileNotFoundError, match="MaskRCNN/mask_rcnn_R_50_FPN_1x"):
        config.find_config("MaskRCNN/mask_rcnn_R50_FPN_1x")


def test_yaml_that_runs_code_is_refused(cfg, tmp_path):
    marker = tmp_path / "executed"
    file = tmp_path / "evil.yaml"
    file.write_text(f'OUTPUT_DIR: !!python/object/apply:os.system ["touch {marker}"]\n')
    with pytest.raises(ValueError, match=r"evil\.yaml cannot be read as plain YAML"):
        config.merge_file(cfg, file)
    assert not marker.exists()


def test_unknown_key_in_a_file_names_file_and_neighbours(cfg, tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text("SOLVER:\n  BASE_LRR: 0.1\n")
    with pytest.raises(
        KeyError,
        match=r"typo\.yaml: there is no config key SOLVER.BASE_LRR; nearest: .*SOLVER.BASE_LR",
    ):
        config.merge_file(cfg, file)


def test_wrong_type_in_a_file_names_the_file(cfg, tmp_path):
    file = tmp_path / "types.yaml"
    file.write_text("SOLVER:\n  MAX_ITER: [1]\n")
    with pytest.raises(ValueError, match=r"types\.yaml.*MAX_ITER"):
        config.merge_file(cfg, file)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", 0.5, 0.5),
        ("SOLVER.STEPS", "(60, 80)", (60, 80)),
        ("SOLVER.STEPS", "[60, 80]", (60, 80)),
        ("MODEL.PIXEL_MEAN", "(1.0, 2.0, 3.0)", [1.0, 2.0, 3.0]),
        ("OUTPUT_DIR", "2024", "2024"),
        ("MODEL.MASK_ON", "True", True),
    ],
)
def test_override_values(cfg, key, text, value):
    assert config.merge_overrides(cfg, [key, text]) == {key}
    *parents, leaf = key.split(".")
    node = cfg
    for name in parents:
        node = node[name]
    assert node[leaf] == value
    assert type(node[leaf]) is type(value)


@pytest.mark.parametrize(
    ("opts", "error", "message"),
    [
        (["SOLVER.BASE_LR"], ValueError, "'SOLVER.BASE_LR' has no partner"),
        (["SOLVER.BASE_LRR", "1"], KeyError, r"SOLVER\.BASE_LR\b"),
        (["SOLVER.BASE_LR", "fast"], ValueError, "SOLVER.BASE_LR wants a float"),
        (["SOLVER.MAX_ITER", "True"], ValueError, "SOLVER.MAX_ITER wants a int"),
        (["MODEL.MASK_ON", "1"], ValueError, "MODEL.MASK_ON wants a bool"),
        (["MODEL.FPN", "1"], ValueError, "MODEL.FPN is a group of keys"),
        (["NOPE.NOPE", "1"], KeyError, "there is no config key NOPE.NOPE"),
    ],
)
def test_override_errors(cfg, opts, error, message):
    with pytest.raises(error, match=message):
        config.merge_overrides(cfg, opts)


def test_adding_twice_keeps_user_values():
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    cfg.INSTSEG.CLIP_GRAD_NORM = 3.0
    cfg.INSTSEG.EMA.DECAY = 0.5
    instseg_ext.add_instseg_config(cfg)
    assert cfg.INSTSEG.CLIP_GRAD_NORM == 3.0
    assert cfg.INSTSEG.EMA.DECAY == 0.5


def test_frozen_config_is_refused():
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(ValueError, match="frozen"):
        instseg_ext.add_instseg_config(cfg)


def test_detectron2_defaults_are_untouched():
    plain, extended = get_cfg(), get_cfg()
    instseg_ext.add_instseg_config(extended)

    def assert_contains(inner: CfgNode, outer: CfgNode, path: str):
        for key, value in inner.items():
            if isinstance(value, CfgNode):
                assert_contains(value, outer[key], f"{path}{key}.")
            else:
                assert outer[key] == value, f"{path}{key}"

    assert_contains(plain, extended, "")
    assert get_cfg() == plain


@pytest.mark.parametrize(
    ("typed", "has_cuda", "result"),
    [("auto", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu")],
)
def test_device_auto(cfg, monkeypatch, typed, has_cuda, result):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    cfg.MODEL.DEVICE = typed
    config.resolve_device(cfg, {"MODEL.DEVICE"})
    assert result == cfg.MODEL.DEVICE


def test_cuda_by_default_falls_back_but_a_typed_one_is_an_error(cfg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        config.resolve_device(cfg, {"MODEL.DEVICE"})
    config.resolve_device(cfg)
    assert cfg.MODEL.DEVICE == "cpu"


@pytest.mark.parametrize(
    ("precision", "amp", "device", "result"),
    [
        ("fp32", False, "cpu", "fp32"),
        ("bf16", False, "cpu", "bf16"),
        ("fp32", True, "cpu", "bf16"),
        ("fp32", True, "cuda", "fp16"),
        ("fp16", False, "cuda", "fp16"),
    ],
)
def test_precision(cfg, precision, amp, device, result):
    cfg.INSTSEG.PRECISION, cfg.SOLVER.AMP.ENABLED, cfg.MODEL.DEVICE = precision, amp, device
    assert config.resolve_precision(cfg) == result


@pytest.mark.parametrize(
    ("precision", "message"), [("fp16", "use bf16"), ("half", "must be one of fp32, fp16, bf16")]
)
def test_precision_errors(cfg, precision, message):
    cfg.INSTSEG.PRECISION, cfg.MODEL.DEVICE = precision, "cpu"
    with pytest.raises(ValueError, match=message):
        config.resolve_precision(cfg)


def test_class_count_follows_the_data_but_not_a_typed_value():
    cfg = instseg_ext.get_config("MaskRCNN/mask_rcnn_R_50_FPN_1x")
    assert zoo.set_class_count(cfg, 7) == ["MODEL.ROI_HEADS.NUM_CLASSES"]
    assert zoo.class_count(cfg) == 7
    assert zoo.set_class_count(cfg, 7, {"MODEL.ROI_HEADS.NUM_CLASSES"}) == []
    with pytest.raises(ValueError, match="7 was typed, but the training set has 3 classes"):
        zoo.set_class_count(cfg, 3, {"MODEL.ROI_HEADS.NUM_CLASSES"})


def test_unknown_architecture_lists_the_known():
    cfg = instseg_ext.get_config("MaskRCNN/mask_rcnn_R_50_FPN_1x")
    cfg.MODEL.META_ARCHITECTURE = "YOLOv3"
    with pytest.raises(
        ValueError, match=r"'YOLOv3' belongs to no method here; known: .*InstSegRCNN"
    ):
        zoo.method_of(cfg)


@pytest.mark.parametrize("name", config.config_names())
def test_every_published_config_builds(name):
    """On the meta device: shapes only, no memory."""
    from detectron2.modeling import META_ARCH_REGISTRY

    cfg = instseg_ext.get_config(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    assert sum(p.numel() for p in model.parameters()) > 1e6
    assert len(cfg.dump()) > 1000
