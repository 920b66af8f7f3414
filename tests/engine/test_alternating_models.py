"""Alternating training of every two-stage method, and in two processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from contract.cases import CASES, TINY_RESNET
from engine.processes import finish, start

from instseg_ext import data
from instseg_ext.cli import main as cli
from instseg_ext.data import make_shapes
from instseg_ext.engine import defaults

pytestmark = pytest.mark.slow

ITERATIONS = ["--iterations", "2", "2", "2", "2"]
SHORT = [
    "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64",
    "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.WARMUP_ITERS", "0",
]  # fmt: skip
TINY_C4 = (
    "MODEL.WEIGHTS", "",
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
)  # fmt: skip
TINY = {case.name: (case.config, (*TINY_RESNET, *case.opts)) for case in CASES}
MODELS = {
    "FPN": TINY["MaskRCNN"],
    "Faster": (TINY["MaskRCNN"][0], (*TINY["MaskRCNN"][1], "MODEL.MASK_ON", False)),
    "C4": ("MaskRCNN/mask_rcnn_R_50_C4_1x", TINY_C4),
    "PointRend": TINY["PointRend"],
    "PANet": TINY["PANet"],
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alternating_data")
    json_file, images = make_shapes(folder, 6, 64, 1)
    files = [str(json_file), "--train-images", str(images)]
    return ["--train-json", *files, "--val-json", files[0], "--val-images", files[2]]


def command(shapes, output, name, *more):
    config, opts = MODELS[name]
    argv = ["train-alternating", "--config-file", config, "--skip-check", *ITERATIONS, *shapes]
    opts = [*map(str, opts), *SHORT, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output)]
    return [*argv, *more, *opts]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def check(output):
    """What is joined is what steps 3 and 4 hold, on the backbone of step 2, and was evaluated."""
    joined = weights(output / "model_final.pth")
    parts = {n: weights(output / f"step{n}" / "model_final.pth") for n in (2, 3, 4)}
    for key, value in joined.items():
        sources = {"backbone": (2, 3, 4), "proposal_generator": (3,), "roi_heads": (4,)}
        for number in sources[key.partition(".")[0]]:
            assert torch.equal(parts[number][key], value), (number, key)
    (results,) = json.loads((output / "results.json").read_text())["datasets"].values()
    assert results["bbox"]["AP"] is not None


@pytest.mark.parametrize("name", MODELS)
def test_every_two_stage_method(shapes, tmp_path, monkeypatch, name):
    monkeypatch.setattr(defaults, "setup_logger", lambda *args, **kwargs: None)
    assert cli.main(command(shapes, tmp_path, name)) == 0
    check(tmp_path)


def test_two_processes_killed_and_resumed(shapes, tmp_path):
    """SIGKILL of all of them in step 2; every image has its proposals once."""
    argv = ["-m", "instseg_ext.cli.main", *command(shapes, tmp_path, "FPN", "--num-gpus", "2")]
    process = start(*argv, own_group=True)
    limit = time.monotonic() + 600
    while not (tmp_path / "step2" / "config.yaml").is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    log = finish(*argv, "--resume")
    assert "Step 1 of 4: RPN" not in log
    assert "Step 2 of 4: detector" in log
    check(tmp_path)
    content = json.loads(Path(shapes[1]).read_text())
    shown = sorted({str(a["image_id"]) for a in content["annotations"] if not a["iscrowd"]})
    for step in (1, 3):
        stored = data.ProposalFile(tmp_path / f"step{step}" / "proposals_0.pth")
        assert sorted(stored.ids) == shown
