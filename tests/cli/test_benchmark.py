"""``instseg benchmark`` and what it measures with."""

import argparse
import json

import cv2
import pytest
import torch
from detectron2.structures import ImageList, Instances
from torch import nn

from instseg_ext.cli import benchmark
from instseg_ext.evaluation import timing
from instseg_ext.evaluation.benchmark import build_floor, measure_speed, synthetic_batch


def run(*words):
    parser = argparse.ArgumentParser()
    benchmark.add_parser(parser.add_subparsers())
    args, rest = parser.parse_known_args(["benchmark", *map(str, words)])
    args.opts = rest
    return args.run(args)


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def perf_counter(self):
        return self.seconds

    def sleep(self, seconds):
        self.seconds += seconds


CLOCK = Clock()


class Slow(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))
        self.seconds, self.calls = seconds, 0

    def forward(self, x, *_rest):
        self.calls += 1
        CLOCK.sleep(self.seconds)
        return x

    def layers(self, x):
        return self.forward(x)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Slow(0.004), Slow(0.006)
        self.mask_output = "bool"
        self.forms = set()

    def preprocess_image(self, batch):
        return ImageList.from_tensors([image["image"] for image in batch])

    def forward(self, batch):
        self.forms.add(self.mask_output)
        self.head(self.backbone(self.preprocess_image(batch).tensor))
        CLOCK.sleep(0.010)
        return [{"instances": Instances((4, 4), scores=torch.ones(3))} for _ in batch]


class TwoStage(Dense):
    def __init__(self):
        super().__init__()
        del self.head
        self.proposal_generator, self.roi_heads = nn.Module(), nn.Module()
        self.proposal_generator.rpn_head = Slow(0.002)
        self.roi_heads.box_pooler = nn.Module()
        self.roi_heads.box_head = nn.ModuleList([Slow(0.001), Slow(0.001)])
        self.roi_heads.mask_head = Slow(0.002)

    def forward(self, batch):
        self.forms.add(self.mask_output)
        x = self.backbone(self.preprocess_image(batch).tensor)
        self.proposal_generator.rpn_head(x)
        for head in self.roi_heads.box_head:
            head(x)
        self.roi_heads.mask_head(x, ["instances"])
        CLOCK.sleep(0.010)
        return [{"instances": Instances((4, 4), scores=torch.ones(3))} for _ in batch]


# The two-stage model's parts are called past the hooks of its proposal generator and ROI heads.
@pytest.mark.parametrize(("kind", "post_ms"), [(Dense, 10), (TwoStage, 16)])
def test_floor_is_the_network_alone(kind, post_ms, monkeypatch):
    monkeypatch.setattr(timing, "time", CLOCK)
    model = kind().train()
    figures = measure_speed(model, synthetic_batch((32, 48), 2), repeat=5, warmup=1)
    assert figures["floor_ms"] == pytest.approx({"median": 10, "best": 10})
    assert figures["ratio_to_floor"] == pytest.approx(2)
    assert figures["best_ms"] == pytest.approx(20)
    assert figures["median_ms"]["total"] == pytest.approx(20)
    assert figures["median_ms"]["post"] == pytest.approx(post_ms)
    assert (figures["batch"], figures["input_hw"]) == (2, [32, 48])
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["detections"] == 3
    assert model.forms == {"rle"}
    assert model.training
    assert model.mask_output == "bool"


def test_floor_runs_every_part_once_per_call():
    model = TwoStage().eval()
    floor = build_floor(model, synthetic_batch((8, 8), 1))
    parts = [m for m in model.modules() if isinstance(m, Slow)]
    assert len(parts) == 5
    before = [part.calls for part in parts]
    floor()
    assert [part.calls for part in parts] == [count + 1 for count in before]


def test_equal_seeds_give_equal_noise():
    first, again = synthetic_batch((8, 6), 2), synthetic_batch((8, 6), 2)
    assert torch.equal(first[1]["image"], again[1]["image"])
    assert not torch.equal(first[0]["image"], first[1]["image"])
    assert first[0]["image"].shape == (3, 8, 6)


def test_command_writes_figures(use_blobs, tmp_path, picture, caplog):
    out = tmp_path / "speed.json"
    cv2.imwrite(str(tmp_path / "a.png"), picture())
    words = ["--repeat", 2, "--warmup", 0, "--output", out]
    with caplog.at_level("INFO"):
        assert run("--input", tmp_path / "a.png", *words, "--no-floor") == 0
    figures = json.loads(out.read_text())
    assert figures["input_hw"] == [60, 90]
    assert figures["detections"] == 1
    assert figures["precision"] == "fp32"
    assert "floor_ms" not in figures
    assert "images/s" in caplog.text
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(*words)
    assert run("--size", 24, 32, "--batch", 2, "--no-floor", *words, "--overwrite") == 0
    assert json.loads(out.read_text())["input_hw"] == [24, 32]


@pytest.mark.parametrize("words", [("--batch", 0), ("--repeat", 0), ("--size", 0, 4)])
def test_senseless_numbers_are_refused(use_blobs, words):
    with pytest.raises(ValueError, match=words[0]):
        run(*words)
