"""Dense methods under the engine's promises: two processes against one, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from engine import real_train
from engine.processes import finish
from engine.toy_engine import weights_equal, write_dataset

from instseg_ext import zoo
from instseg_ext.engine import Trainer

pytestmark = pytest.mark.slow

# Methods whose losses follow INSTSEG.LOSS_NORMALIZER and draw no random samples.
DENSE = ["SOLOv2", "SOLO", "Decoupled", "YOLACT", "PolarMask"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "data"
    write_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def pair(dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("pair")
    variants = {
        f"{name}_{kind}": (name, ["INSTSEG.LOSS_NORMALIZER", kind])
        for name in DENSE
        for kind in ("global", "local")
    }
    finish(
        Path(real_train.__file__), "--data", dataset, "--output", output,
        "--variants", json.dumps(variants),
    )  # fmt: skip
    return output


def read(folder):
    weights = torch.load(Path(folder) / "model_final.pth", weights_only=True)["model"]
    steps = [json.loads(x) for x in (Path(folder) / "steps.json").read_text().splitlines()]
    return steps, weights


def differences(got, want):
    """Return the largest relative difference of losses, and of weights.

    A weight is compared with the largest of its tensor, or 0.1 where all are tiny: biases that
    start at zero hold little more than rounding after five steps.
    """
    losses = max(
        abs(a[key] - b[key]) / max(abs(b[key]), 1e-6)
        for a, b in zip(got[0], want[0], strict=True)
        for key in b
    )
    weights = max(
        float((got[1][key] - value).abs().max() / value.abs().max().clamp(min=0.1))
        for key, value in want[1].items()
        if value.is_floating_point()
    )
    return losses, weights


@pytest.mark.parametrize("name", DENSE)
def test_global_normaliser_equals_one_process(pair, dataset, tmp_path, name):
    opts = ["INSTSEG.LOSS_NORMALIZER", "global"]
    real_train.train(real_train.config(name, dataset, tmp_path, opts))
    losses, weights = differences(read(pair / f"{name}_global"), read(tmp_path))
    assert losses < 1e-5
    assert weights < 1e-5


@pytest.mark.parametrize("name", DENSE)
def test_local_normaliser_is_the_mean_of_the_processes(pair, dataset, tmp_path, name):
    opts = ["INSTSEG.LOSS_NORMALIZER", "local"]
    parts = [*opts, "INSTSEG.ACCUMULATE", 2]
    real_train.train(real_train.config(name, dataset, tmp_path / "parts", parts))
    got = read(pair / f"{name}_local")
    losses, weights = differences(got, read(tmp_path / "parts"))
    assert losses < 1e-5
    assert weights < 1e-5
    real_train.train(real_train.config(name, dataset, tmp_path / "whole", opts))
    assert differences(got, read(tmp_path / "whole"))[0] > 1e-3


class _CrashError(Exception):
    pass


class _Crash(HookBase):
    def after_step(self):
        if self.trainer.iter == 3:
            raise _CrashError


@pytest.mark.parametrize("name", ["SOLOv2", "MaskRCNN"])
def test_resume_is_exact_with_the_real_evaluation(dataset, tmp_path, name):
    opts = [
        "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2, "INSTSEG.EMA.ENABLED", True,
        "INSTSEG.BEST.METRIC", "segm/AP", "INSTSEG.ACCUMULATE", 2, "INPUT.MIN_SIZE_TRAIN", (48, 64),
    ]  # fmt: skip

    def build(folder):
        cfg = real_train.config(name, dataset, tmp_path / folder, opts)
        cfg.DATASETS.TEST = ("toy",)
        return Trainer(cfg, zoo.method_of(cfg), eval_limit=2)

    build("straight").train()
    killed = build("killed")
    killed.register_hooks([_Crash()])
    with pytest.raises(_CrashError):
        killed.train()
    # As if killed before the checkpoint of iteration 4 was complete.
    (tmp_path / "killed" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = build("killed")
    resumed.resume_or_load(True)
    assert resumed.start_iter == 2
    resumed.train()
    contents = []
    for folder in ("straight", "killed"):
        content = torch.load(tmp_path / folder / "model_final.pth", weights_only=True)
        content.pop("instseg_ext")
        content["trainer"].pop("run_id")
        contents.append(content)
    assert weights_equal(*contents)
