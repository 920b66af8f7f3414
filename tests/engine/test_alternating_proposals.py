"""What the RPN of an alternating training writes for the sets it was trained on."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.modeling import build_model
from engine.test_alternating import CONFIG, TINY
from tqdm import tqdm

import instseg_ext
from instseg_ext import data, zoo
from instseg_ext.data import make_shapes
from instseg_ext.engine.alternating_plan import STEPS, plan_steps, proposal_files
from instseg_ext.engine.alternating_step import propose
from instseg_ext.evaluation import progress

IMAGES = 3


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A data set of shapes, and one of the same images without any object."""
    folder = tmp_path_factory.mktemp("proposal_data")
    json_file, images = make_shapes(folder, IMAGES, 64, 1)
    content = json.loads(json_file.read_text())
    bare = folder / "bare.json"
    bare.write_text(json.dumps({**content, "annotations": []}))
    names = ("proposals_shapes", "proposals_bare")
    for name, file in zip(names, (json_file, bare), strict=True):
        data.register(name, file, images)
    return names


@pytest.fixture
def cfg(sets, tmp_path):
    """The whole model's; step 1 holds random weights."""
    opts = [*TINY, "DATASETS.TRAIN", str(sets), "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = instseg_ext.get_config(CONFIG, opts)
    folder = tmp_path / "run" / "step1"
    folder.mkdir(parents=True)
    weights = build_model(cfg).state_dict()
    kept = {k: v for k, v in weights.items() if not k.startswith("roi_heads.")}
    torch.save({"model": kept}, folder / "model_final.pth")
    return cfg


def write(cfg):
    files = proposal_files(cfg, STEPS[0])
    return files, propose(plan_steps(cfg)[0], zoo.method_of(cfg), files)


def test_a_set_without_objects_gets_an_empty_file(cfg):
    files, summary = write(cfg)
    assert [len(data.ProposalFile(file).ids) for file in files] == [IMAGES, 0]
    assert summary.images == IMAGES
    step2 = plan_steps(cfg)[1]
    loader = data.build_train_loader(step2, data.build_mapper(step2, True), seed=0)
    assert all("proposals" in sample for sample in next(iter(loader)))


def test_nothing_to_train_on_in_any_set(cfg, sets):
    cfg.DATASETS.TRAIN = sets[1:]
    assert write(cfg)[1].images == 0
    step2 = plan_steps(cfg)[1]
    with pytest.raises(ValueError, match="no image has an object to train on"):
        data.build_train_loader(step2, data.build_mapper(step2, True), seed=0)


def test_one_process_writes_what_it_finds_at_once_and_says_how_far_it_is(cfg, monkeypatch):
    """It gathers nothing first, and needs no file of its own beside the set's."""
    lines, written = [], []

    def slow_write(path, found):
        for image_id, _, _ in found:
            written.append((path.name, image_id, len(lines)))

    monkeypatch.setattr(data, "write_proposals", slow_write)
    monkeypatch.setattr(progress, "tqdm", lambda **kwargs: tqdm(**{**kwargs, "disable": True}))
    monkeypatch.setattr(
        progress, "log_every_n_seconds", lambda level, line, **kwargs: lines.append(line)
    )
    write(cfg)
    assert lines == [
        f"Proposed regions for {n} of {IMAGES} batches of proposals_shapes."
        for n in range(1, IMAGES + 1)
    ]
    assert [(name, seen) for name, _, seen in written] == [
        ("proposals_0.pth", n) for n in range(IMAGES)
    ]


def test_what_a_killed_process_left_is_removed(cfg):
    files, _ = write(cfg)
    folder = files[0].parent
    for name in (".proposals_0.pth.0", ".proposals_1.pth.7", ".proposals_0.pth.3.4711.part"):
        (folder / name).touch()
    write(cfg)
    assert not list(folder.glob(".*"))
