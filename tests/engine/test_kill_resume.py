"""SIGKILL in the middle of training, then resume: the same bits on a CPU."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest
import torch
from engine.processes import TOY_TRAIN, finish, start
from engine.toy_engine import weights_equal, write_dataset

OPTS = (
    "SOLVER.MAX_ITER", 60,
    "SOLVER.STEPS", (40,),
    "SOLVER.CHECKPOINT_PERIOD", 20,
    "SOLVER.IMS_PER_BATCH", 2,
    "TEST.EVAL_PERIOD", 10,
    "DATALOADER.NUM_WORKERS", 2,
    "INPUT.MIN_SIZE_TRAIN", (32, 40, 48),
    "INPUT.RANDOM_FLIP", "horizontal",
    "INSTSEG.AUGMENTATIONS.BRIGHTNESS", [0.7, 1.3],
    "INSTSEG.AUGMENTATIONS.CONTRAST", [0.7, 1.3],
    "INSTSEG.AUGMENTATIONS.SATURATION", [0.7, 1.3],
    "INSTSEG.ACCUMULATE", 2,
    "INSTSEG.EMA.ENABLED", True,
    "INSTSEG.BEST.METRIC", "segm/AP",
    "INSTSEG.BEST.PATIENCE", 50,
)  # fmt: skip


def recorded(folder):
    path = folder / "steps.json"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def checkpoint(path):
    content = torch.load(path, weights_only=True)
    content.pop("instseg_ext")
    content.get("trainer", {}).pop("run_id", None)
    return content


@pytest.mark.slow
def test_killed_and_resumed_run_ends_with_the_same_bits(tmp_path):
    write_dataset(tmp_path / "data")
    data = ("--data", tmp_path / "data")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finish(TOY_TRAIN, *data, "--output", straight, *OPTS)

    # Anywhere between the checkpoints of iterations 20 and 40.
    deadly = random.SystemRandom().randrange(21, 39)
    process = start(TOY_TRAIN, *data, "--output", killed, *OPTS)
    limit = time.monotonic() + 600
    while len(recorded(killed)) < deadly and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = recorded(killed)
    assert deadly <= len(before) < 60
    last = (killed / "last_checkpoint").read_text()
    log = finish(TOY_TRAIN, *data, "--output", killed, "--resume", *OPTS)
    assert f"iterations from {killed / last}" in log

    resumed_at = int(last.split("_")[1].split(".")[0]) + 1
    want = recorded(straight)
    assert before == want[: len(before)], f"killed after {deadly}"
    assert recorded(killed)[len(before) :] == want[resumed_at:], f"killed after {deadly}"
    for name in ("model_final.pth", "model_best.pth"):
        assert weights_equal(checkpoint(killed / name), checkpoint(straight / name)), name
    iterations = [
        json.loads(line)["iteration"] for line in (killed / "metrics.json").read_text().splitlines()
    ]
    assert iterations == sorted(set(iterations))
    assert {19, 39, 59} <= set(iterations)
