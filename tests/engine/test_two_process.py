"""Two gloo processes against one, detectron2's launcher against torchrun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine import toy_train
from engine.processes import TOY_TRAIN, finish
from engine.toy_engine import METHOD, ToyTrainer, toy_config, write_dataset

from instseg_ext.engine import launch

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TOY_TRAIN)
VARIANTS = {
    "global": ["INSTSEG.LOSS_NORMALIZER", "global"],
    "global_accumulated": ["INSTSEG.LOSS_NORMALIZER", "global", "INSTSEG.ACCUMULATE", 2],
    "local": ["INSTSEG.LOSS_NORMALIZER", "local"],
    # Broadcast buffers, whole-model clipping and no_sync together must not hang.
    "batch_norm": ["MODEL.TOY.NORM", "BN", "INSTSEG.CLIP_GRAD_NORM", 0.1, "INSTSEG.ACCUMULATE", 2],
}
OPTS = ("MODEL.TOY.DROPOUT", 0.0, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", ())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "data"
    write_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def pair(dataset, tmp_path_factory):
    """Train all variants in one job of two processes; returns its folder."""
    output = tmp_path_factory.mktemp("pair")
    argv = ["--data", dataset, "--output", output, "--variants", json.dumps(VARIANTS), *OPTS]
    launch(toy_train.main, num_gpus=2, args=(toy_train.parse(map(str, argv)),), device="cpu")
    return output


def steps(folder):
    return [json.loads(line) for line in (Path(folder) / "steps.json").read_text().splitlines()]


def final(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)["model"]


def one(dataset, folder, *opts):
    """Train in this process; returns steps and weights likewise."""
    folder.mkdir()
    cfg = toy_config(dataset / "annotations.json", dataset / "images", folder, (*OPTS, *opts))
    trainer = ToyTrainer(cfg, METHOD)
    trainer.register_hooks([toy_train.Recorder(folder / "steps.json")])
    trainer.train()
    return steps(folder), final(folder)


def read(folder):
    return steps(folder), final(folder)


def assert_equal(got, want, rtol=1e-5):
    """Compare losses, and weights relative to the largest of their tensor."""
    (got_steps, got_weights), (want_steps, want_weights) = got, want
    assert len(got_steps) == len(want_steps) == 5
    for a, b in zip(got_steps, want_steps, strict=True):
        assert a == pytest.approx(b, rel=rtol)
    for key, value in want_weights.items():
        spread = max(float(value.abs().max()), 0.1)
        torch.testing.assert_close(got_weights[key], value, rtol=rtol, atol=rtol * spread)


@pytest.mark.parametrize("name", ["global", "global_accumulated"])
def test_global_normaliser_equals_one_process(pair, dataset, tmp_path, name):
    """Design section 7. With accumulation, one process has as many parts of twice the size."""
    assert_equal(read(pair / name), one(dataset, tmp_path / "one", *VARIANTS[name]))


def test_local_normaliser_is_the_mean_of_the_processes(pair, dataset, tmp_path):
    """One process with two micro-batches takes the mean of two local losses: the same."""
    local = VARIANTS["local"]
    got = read(pair / "local")
    assert_equal(got, one(dataset, tmp_path / "one", *local, "INSTSEG.ACCUMULATE", 2))
    # The test could fail: normalising over the whole batch is something else.
    whole = one(dataset, tmp_path / "whole", *local)
    assert got[0][0]["loss_mask"] != pytest.approx(whole[0][0]["loss_mask"], rel=1e-2)


def test_batch_norm_clipping_and_accumulation_together(pair):
    recorded, weights = read(pair / "batch_norm")
    assert len(recorded) == 5
    assert weights["backbone.1.num_batches_tracked"] == 10
    assert all(torch.isfinite(v).all() for v in weights.values())


@pytest.mark.slow
def test_torchrun_equals_the_launcher(dataset, tmp_path):
    """One job of two processes, one set of outputs, the same losses."""
    opts = (*OPTS, "MODEL.TOY.DROPOUT", 0.3, "INSTSEG.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 2)
    launched, elastic = tmp_path / "launched", tmp_path / "elastic"
    finish(TOY_TRAIN, "--num-gpus", 2, "--data", dataset, "--output", launched, *opts)
    log = finish(*TORCHRUN, "--data", dataset, "--output", elastic, *opts)
    assert_equal(read(elastic), read(launched))
    assert "Process 0 of 2." in log
    names = [p.name.split(".out")[0] for p in elastic.iterdir()]
    assert sorted(names) == [
        "config.yaml", "environment.txt", "events", "last_checkpoint", "log.txt", "log.txt.rank1",
        "metrics.json", "model_final.pth", "steps.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_torchrun_refuses_num_gpus(dataset, tmp_path):
    log = finish(
        *TORCHRUN, "--num-gpus", 2, "--data", dataset, "--output", tmp_path / "x", ok=False
    )
    assert "torchrun has already started the processes" in log


@pytest.mark.slow
def test_non_finite_loss_of_one_process_stops_all(dataset, tmp_path):
    log = finish(
        TOY_TRAIN, "--num-gpus", 2, "--data", dataset, "--output", tmp_path / "x",
        "--poison", "image", *OPTS, ok=False,
    )  # fmt: skip
    assert "training stopped at iteration 0: loss_mask is nan for" in log
    assert "(process 1)" in log
    assert "(process 0)" not in log
    assert not list((tmp_path / "x").glob("*.pth"))
