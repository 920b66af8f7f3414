"""What every method promises, whatever it does inside. See ``cases.py`` for the models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import yaml
from contract.cases import CASES, blobs
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

import instseg_ext
from instseg_ext import zoo
from instseg_ext.checkpoint import model_shapes

SCENES = {
    "objects": [
        blobs(64, 96, [(4, 4, 30, 30), (40, 20, 80, 60)]),
        blobs(96, 64, [(10, 10, 50, 70)]),
    ],
    "none": [blobs(64, 64, []), blobs(64, 64, [])],
    "half": [blobs(64, 64, []), blobs(64, 64, [(8, 8, 40, 40)])],
    "one pixel": [blobs(64, 64, [(20, 20, 21, 21)]), blobs(64, 64, [(63, 63, 64, 64)])],
    "all borders": [
        blobs(64, 64, [(0, 0, 64, 64)]),
        blobs(64, 64, [(0, 0, 64, 8), (0, 56, 64, 64)]),
    ],
    "tiny images": [blobs(20, 24, [(2, 2, 18, 18)]), blobs(40, 24, [(2, 2, 18, 18)])],
}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


def low_thresholds(cfg):
    for key in zoo.method_of(cfg).score_threshold_keys:
        *parents, leaf = key.split(".")
        node = cfg
        for name in parents:
            node = node[name]
        node[leaf] = 0.0
    return cfg


def built(cfg):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(cfg)


# Drawing the weights takes longer than most tests: it is done once, and every test gets a copy.
@pytest.fixture(scope="module")
def first_model(case):
    return built(case.cfg())


@pytest.fixture(scope="module")
def first_eager_model(case):
    return built(low_thresholds(case.cfg()))


@pytest.fixture
def model(first_model):
    return copy.deepcopy(first_model)


@pytest.fixture
def eager_model(first_eager_model):
    """A model whose thresholds let the untrained scores through."""
    return copy.deepcopy(first_eager_model).eval()


@pytest.mark.parametrize("scene", SCENES)
def test_losses_are_finite_and_reach_every_parameter(case, model, scene):
    losses = model.train()(case.samples(SCENES[scene]))
    assert losses
    for name, value in losses.items():
        assert name.startswith("loss_"), name
        assert value.ndim == 0, name
        assert value.dtype is torch.float32, name
        assert torch.isfinite(value), name
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    infinite = [
        n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    assert infinite == []


@pytest.mark.parametrize("output", ["bool", "rle"])
def test_outputs(eager_model, output):
    eager_model.mask_output = output
    sample = dict(blobs(64, 96, [(4, 4, 30, 30)]), height=81, width=123)
    instances = eager_model([sample])[0]["instances"]
    count = len(instances)
    assert 0 < count <= 100
    assert instances.image_size == (81, 123)
    assert instances.scores.shape == (count,)
    assert instances.scores.dtype is torch.float32
    assert (instances.scores[:-1] >= instances.scores[1:]).all()
    assert instances.pred_classes.dtype is torch.int64
    assert instances.pred_boxes.tensor.shape == (count, 4)
    if output == "bool":
        assert instances.pred_masks.shape == (count, 81, 123)
        assert instances.pred_masks.dtype is torch.bool
    else:
        assert len(instances.pred_masks_rle) == count
        assert all(rle["size"] == [81, 123] for rle in instances.pred_masks_rle)


@pytest.mark.parametrize("output", ["bool", "rle"])
def test_no_detection_keeps_the_fields(model, output):
    model.eval().mask_output = output
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = model([dict(blobs(64, 64, []), height=33, width=44)])[0]["instances"]
    instances = found[found.scores > 2]
    assert len(instances) == 0
    assert instances.pred_boxes.tensor.shape == (0, 4)
    assert instances.pred_classes.dtype is torch.int64
    if output == "bool":
        assert instances.pred_masks.shape == (0, 33, 44)
        assert instances.pred_masks.dtype is torch.bool
    else:
        assert list(instances.pred_masks_rle) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_features_give_no_detections(model, value):
    model.eval()
    with torch.no_grad():
        next(p for p in model.backbone.parameters()).fill_(value)
        instances = model([blobs(64, 64, [(4, 4, 30, 30)])])[0]["instances"]
    assert len(instances) == 0


def test_batch_of_equal_sizes_equals_single_runs(eager_model):
    samples = [blobs(64, 64, [(4, 4, 30, 30)]), blobs(64, 64, [(20, 10, 60, 50)])]
    with torch.no_grad():
        together = [out["instances"] for out in eager_model(samples)]
        alone = [eager_model([sample])[0]["instances"] for sample in samples]
    for a, b in zip(together, alone, strict=True):
        assert len(a) == len(b)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert (a.pred_masks != b.pred_masks).float().mean() < 1e-4


def test_padding(case, eager_model):
    """Padding changes the result exactly where the method's page says so."""
    small, big = blobs(64, 64, [(4, 4, 30, 30)]), blobs(128, 128, [(20, 10, 60, 50)])
    with torch.no_grad():
        padded = eager_model([small, big])[0]["instances"].scores
        alone = eager_model([small])[0]["instances"].scores
    same = len(padded) == len(alone) and torch.allclose(padded, alone, atol=1e-5)
    assert same != case.sees_padding


def test_bf16_on_cpu(case):
    model = build_model(low_thresholds(case.cfg("INSTSEG.PRECISION", "bf16")))
    losses = model.train()(case.samples(SCENES["objects"]))
    assert all(value.dtype is torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        instances = model.eval()([blobs(64, 64, [(4, 4, 30, 30)])])[0]["instances"]
    assert instances.scores.dtype is torch.float32
    assert instances.pred_boxes.tensor.dtype is torch.float32


def test_memory_formats_agree(case, eager_model):
    first = build_model(low_thresholds(case.cfg("INSTSEG.MEMORY_FORMAT", "contiguous"))).eval()
    first.load_state_dict(eager_model.state_dict())
    sample = blobs(64, 64, [(4, 4, 30, 30)])
    with torch.no_grad():
        a, b = eager_model([sample])[0]["instances"], first([sample])[0]["instances"]
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
    weights = [p for p in eager_model.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(eager_model, clone):
    sample = blobs(64, 64, [(4, 4, 30, 30)])
    with torch.no_grad():
        expected = eager_model([sample])[0]["instances"].scores
        assert torch.equal(clone(eager_model)([sample])[0]["instances"].scores, expected)


def test_dumped_config_builds_the_same_model(case, tmp_path):
    cfg = case.cfg()
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    again = instseg_ext.get_config(str(file))
    # As plain data: a file cannot tell tuples from lists.
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    assert model_shapes(again) == model_shapes(cfg)


def test_training_step_is_deterministic(case):
    def step():
        torch.manual_seed(7)
        model = build_model(case.cfg()).train()
        torch.manual_seed(8)
        losses = model(case.samples(SCENES["objects"]))
        sum(losses.values()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    first, second = step(), step()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_default_predictor_in_a_plain_script(case, eager_model, tmp_path):
    """``get_cfg``, one call, detectron2's own predictor: the same detections as the model's."""
    source = tmp_path / "config.yaml"
    source.write_text(low_thresholds(case.cfg()).dump())
    cfg = get_cfg()
    instseg_ext.add_instseg_config(cfg)
    cfg.merge_from_file(str(source))
    weights = tmp_path / "model.pth"
    torch.save({"model": eager_model.state_dict()}, weights)
    cfg.MODEL.WEIGHTS = str(weights)
    predictor = DefaultPredictor(cfg)
    image = blobs(64, 64, [(4, 4, 30, 30)])["image"]
    instances = predictor(image.permute(1, 2, 0).numpy())["instances"]
    ordered = image.flip(0) if cfg.INPUT.FORMAT == "RGB" else image
    sample = {"image": ordered.float(), "height": 64, "width": 64}
    with torch.no_grad():
        expected = eager_model([sample])[0]["instances"]
    assert torch.equal(instances.scores, expected.scores)
    assert torch.equal(instances.pred_masks, expected.pred_masks)


def test_detections_per_image_is_a_limit(case):
    model = build_model(low_thresholds(case.cfg("TEST.DETECTIONS_PER_IMAGE", 3))).eval()
    with torch.no_grad():
        assert len(model([blobs(64, 96, [(4, 4, 30, 30)])])[0]["instances"]) <= 3
