"""Alternating training: four steps, one shared backbone, and no step done twice or on sand."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model

import instseg_ext
from instseg_ext import data, engine, zoo
from instseg_ext.cli import main as cli
from instseg_ext.cli import train
from instseg_ext.data import make_shapes
from instseg_ext.engine import alternating, alternating_step, defaults
from instseg_ext.engine.alternating_plan import STEPS, plan_steps
from instseg_ext.engine.alternating_record import Record

CONFIG = "MaskRCNN/nuclei_mask_rcnn_R_18_FPN"
# A backbone of one level whose norms have statistics that a frozen backbone must keep.
TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.BACKBONE.NAME", "build_vgg16_backbone",
    "MODEL.VGG.WIDTH", "4",
    "MODEL.VGG.NORM", "BN",
    "MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32]]",
    "MODEL.RPN.IN_FEATURES", "['conv5']",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "30",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "20",
    "MODEL.ROI_HEADS.IN_FEATURES", "['conv5']",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "8",
    "MODEL.ROI_MASK_HEAD.NUM_CONV", "1",
    "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64",
    "INSTSEG.EMA.ENABLED", "True",
    "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.WARMUP_ITERS", "0",
    "SOLVER.CHECKPOINT_PERIOD", "2",
    "SOLVER.MAX_ITER", "8",
    "SOLVER.STEPS", "(4,)",
    "SEED", "5",
]  # fmt: skip
LENGTHS = [4, 4, 3, 3]
ITERATIONS = ["--iterations", *map(str, LENGTHS)]


@pytest.fixture(scope="module", autouse=True)
def no_log_files():
    """detectron2's set-up would cut the loggers off from pytest's for all later tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(defaults, "setup_logger", lambda *args, **kwargs: None)
        yield


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alternating_data")
    (train_json, train_images), (val_json, val_images) = (
        make_shapes(folder / "train", 6, 64, 1),
        make_shapes(folder / "val", 2, 64, 2),
    )
    return [
        "--train-json", str(train_json), "--train-images", str(train_images),
        "--val-json", str(val_json), "--val-images", str(val_images),
    ]  # fmt: skip


def run(shapes, output, *more, config=CONFIG, opts=TINY):
    argv = ["train-alternating", "--config-file", config, "--skip-check", *shapes, *more]
    return cli.main([*argv, *opts, "OUTPUT_DIR", str(output)])


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory):
    """The folder of an uninterrupted run."""
    output = tmp_path_factory.mktemp("alternating")
    assert run(shapes, output, *ITERATIONS) == 0
    return output


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def weights(path, prefix=""):
    content = torch.load(path, weights_only=True)["model"]
    return {key: value for key, value in content.items() if key.startswith(prefix)}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def cfg_of(folder):
    return zoo.load_config(str(folder / "config.yaml"))[0]


# --- what a run leaves ----------------------------------------------------------------------------


def test_rpn_and_detector_share_the_backbone_of_step_2(finished):
    steps = [finished / f"step{n}" / "model_final.pth" for n in (1, 2, 3, 4)]
    backbones = [weights(path, "backbone.") for path in steps]
    assert any(key.endswith("running_mean") for key in backbones[0])
    assert not equal(backbones[0], backbones[1])
    assert equal(backbones[1], backbones[2])
    assert equal(backbones[1], backbones[3])
    heads = [weights(steps[n], "roi_heads.") for n in (1, 3)]
    assert not any(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    rpns = [weights(steps[n], "proposal_generator.") for n in (0, 2)]
    assert not equal(*rpns)
    joined = weights(finished / "model_final.pth")
    assert equal(joined, {**backbones[1], **heads[1], **rpns[1]})
    assert not weights(steps[0], "roi_heads.")
    assert not weights(steps[1], "proposal_generator.")


def test_proposals_are_those_of_training(finished):
    """As many as the RPN gives in training, at the size of the image file, for every image."""
    for step in (1, 3):
        stored = data.ProposalFile(finished / f"step{step}" / "proposals_0.pth")
        assert stored.ids
        boxes = [stored[i][0] for i in stored.ids]
        assert 20 < max(map(len, boxes)) <= 30
        assert torch.cat(boxes).amin() >= 0
        assert 32 < torch.cat(boxes).amax() <= 64
    assert not list(finished.glob("step*/.*"))


def test_the_joined_model_is_an_ordinary_one(finished, shapes, tmp_path):
    results = json.loads((finished / "results.json").read_text())["datasets"]
    argv = ["--config-file", str(finished / "config.yaml"), "--eval-only", "--skip-check"]
    opts = ["MODEL.WEIGHTS", str(finished / "model_final.pth"), "OUTPUT_DIR", str(tmp_path)]
    assert train.main([*argv, *opts]) == 0
    again = json.loads((tmp_path / "results.json").read_text())["datasets"]
    assert again == results
    content = torch.load(finished / "model_final.pth", weights_only=True)["instseg_ext"]
    assert content["class_names"] == ["circle", "square", "triangle"]
    assert "PrecomputedProposals" not in content["config"]


def test_each_step_is_reported(finished):
    steps = json.loads((finished / "alternating.json").read_text())["steps"]
    assert [steps[n]["iterations"] for n in "1234"] == LENGTHS
    for number, part in zip("1234", ["loss_rpn_cls", "loss_mask"] * 2, strict=True):
        report = steps[number]["report"]
        assert report.startswith(f"Step {number} of 4, ")
        assert part in report
        assert ("proposals per image" in report) == (number in "13")
        assert (finished / f"step{number}" / "metrics.json").is_file()


# --- going on -------------------------------------------------------------------------------------


class _CrashError(Exception):
    pass


class _Crash(HookBase):
    """Dies after the third iteration, the first after a checkpoint."""

    def after_step(self):
        if self.trainer.iter == 2:
            raise _CrashError


def test_a_run_that_dies_twice_ends_with_the_same_bits(finished, shapes, tmp_path, monkeypatch):
    """Inside step 2, and between the training of step 3 and its proposals."""
    output, command = tmp_path / "killed", (shapes, tmp_path / "killed", *ITERATIONS)
    hooks = alternating_step.StepTrainer._build_hooks

    def deadly_hooks(self):
        return [*hooks(self), *([_Crash()] if self._step.number == 2 else [])]

    def no_proposals(*args):
        raise _CrashError

    monkeypatch.setattr(alternating_step.StepTrainer, "_build_hooks", deadly_hooks)
    with pytest.raises(_CrashError):
        run(*command)
    assert (output / "step2" / "last_checkpoint").read_text() == "model_0000001.pth"
    first = (output / "step1" / "model_final.pth").stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.setattr(alternating, "propose", no_proposals)
    with pytest.raises(_CrashError):
        run(*command, "--resume")
    assert (output / "step3" / "model_final.pth").exists()
    assert not (output / "step3" / "proposals_0.pth").exists()
    monkeypatch.undo()
    assert run(*command, "--resume") == 0
    assert (output / "step1" / "model_final.pth").stat().st_mtime_ns == first
    assert equal(weights(output / "model_final.pth"), weights(finished / "model_final.pth"))


def test_a_finished_run_is_left_alone(copy, shapes, capsys, caplog):
    before = {f: f.read_bytes() for f in copy.rglob("*.pth")}
    assert run(shapes, copy, *ITERATIONS) == 2
    assert "--resume" in capsys.readouterr().err
    with caplog.at_level("INFO"):
        assert run(shapes, copy, *ITERATIONS, "--resume") == 0
    assert "Nothing to do: all steps are done" in caplog.text
    assert {f: f.read_bytes() for f in copy.rglob("*.pth")} == before


@pytest.mark.parametrize("fate", ["gone", "replaced"])
def test_a_joined_model_that_is_no_more_is_joined_and_evaluated_again(
    copy, shapes, monkeypatch, caplog, fate
):
    """As after a deletion by hand, or another program's training into the folder."""
    joined, evaluated = copy / "model_final.pth", []
    expected = weights(joined)
    monkeypatch.setattr(alternating, "_evaluate", lambda *args: evaluated.append(args[2]))
    if fate == "gone":
        joined.unlink()
    else:
        shutil.copy(copy / "step4" / "model_final.pth", joined)
    with caplog.at_level("INFO"):
        assert run(shapes, copy, *ITERATIONS, "--resume") == 0
    assert "is not the joined model any more: joining again" in caplog.text
    assert equal(weights(joined), expected)
    assert evaluated == [joined]


@pytest.mark.parametrize("finished_steps", [True, False])
def test_train_net_leaves_the_folder_alone(copy, finished_steps):
    """It finds no last_checkpoint there, and would start anew over what lies there."""
    if not finished_steps:
        (copy / "model_final.pth").unlink()
    with pytest.raises(FileExistsError, match=r"holds another run \((model|alternating).*--resume"):
        engine.check_output_dir(str(copy), False, False)
    with pytest.raises(FileExistsError, match=r"holds a run of train-alternating .*--overwrite"):
        engine.check_output_dir(str(copy), True, False)
    engine.check_output_dir(str(copy), False, True)
    assert not (copy / "model_final.pth").exists()
    assert (copy / "step4" / "model_final.pth").exists()
    engine.check_output_dir(str(copy), False, False)
    assert Record.load(copy) is None


@pytest.mark.parametrize("name", ["step2/model_final.pth", "step3/proposals_0.pth"])
def test_a_changed_file_of_a_finished_step_is_noticed(copy, shapes, capsys, name):
    content = torch.load(copy / name, weights_only=True)
    torch.save({**content, "note": "not what the step wrote"}, copy / name)
    assert run(shapes, copy, *ITERATIONS, "--resume") == 2
    error = capsys.readouterr().err
    assert f"{name} is not what step {name[4]} wrote;" in error
    (copy / name).unlink()
    assert run(shapes, copy, *ITERATIONS, "--resume") == 2
    assert f"{name} is gone, which step {name[4]} wrote;" in capsys.readouterr().err


def test_settings_that_the_finished_steps_contradict_are_refused(copy, shapes, capsys):
    assert run(shapes, copy, "--resume") == 2
    assert "step 1 was finished with 4 iterations, not 8" in capsys.readouterr().err
    other = [*TINY, "MODEL.ROI_BOX_HEAD.FC_DIM", "20"]
    assert run(shapes, copy, *ITERATIONS, "--resume", opts=other) == 2
    assert "MODEL.ROI_BOX_HEAD.FC_DIM was 16, is 20" in capsys.readouterr().err


def test_overwriting_starts_with_an_empty_folder(copy):
    cfg = cfg_of(copy)
    with pytest.raises(FileExistsError, match="--overwrite"):
        engine.check_alternating(cfg, LENGTHS)
    with pytest.raises(ValueError, match="give only one"):
        engine.check_alternating(cfg, LENGTHS, resume=True, overwrite=True)
    cfg.OUTPUT_DIR = str(copy)
    (copy / "notes.txt").touch()
    (copy / "step3" / ".proposals_0.pth.1").touch()
    engine.check_alternating(cfg, LENGTHS, overwrite=True)
    assert not list(copy.rglob("*.pth"))
    assert not list(copy.glob("step*/.*"))
    assert not (copy / "alternating.json").exists()
    assert (copy / "notes.txt").exists()


def test_the_folder_of_another_kind_of_run_is_refused(copy):
    cfg = cfg_of(copy)
    cfg.OUTPUT_DIR = str(copy)
    (copy / "alternating.json").write_text("{}")
    with pytest.raises(ValueError, match=r"alternating\.json is damaged .*--overwrite"):
        engine.check_alternating(cfg, LENGTHS, resume=True)
    (copy / "alternating.json").unlink()
    with pytest.raises(FileExistsError, match=r"not of train-alternating.*another OUTPUT_DIR"):
        engine.check_alternating(cfg, LENGTHS, resume=True)


# --- one backbone ---------------------------------------------------------------------------------


def test_a_backbone_that_moved_is_not_joined(copy, shapes, capsys, monkeypatch):
    """Step 4 runs again, with its backbone set free: there is no joined model then."""
    record = json.loads((copy / "alternating.json").read_text())
    del record["steps"]["4"]
    (copy / "alternating.json").write_text(json.dumps({**record, "joined": ""}))
    shutil.rmtree(copy / "step4")
    (copy / "model_final.pth").unlink()
    build = engine.Trainer.build_model
    monkeypatch.setattr(alternating_step.StepTrainer, "build_model", build)
    assert run(shapes, copy, *ITERATIONS, "--resume") == 2
    assert "do not share one backbone" in capsys.readouterr().err
    assert not (copy / "model_final.pth").exists()


@pytest.mark.parametrize(
    "other",
    [
        {"backbone.w": torch.tensor([1.0, -0.0])},
        {"backbone.w": torch.tensor([[1.0, 0.0]])},
        {"backbone.w": torch.tensor([1.0, 0.0]).double()},
        {"backbone.v": torch.tensor([1.0, 0.0])},
    ],
    ids=["bit", "shape", "dtype", "name"],
)
def test_one_bit_is_enough_to_refuse(other):
    rpn = {"backbone.w": torch.tensor([1.0, 0.0]), "proposal_generator.w": torch.ones(1)}
    with pytest.raises(ValueError, match=r"of [12] tensors differ, the first backbone\.[vw]"):
        alternating.join_weights(rpn, {**other, "roi_heads.w": torch.ones(1)})


def test_equal_bits_are_joined_whatever_they_mean(caplog):
    caplog.set_level("INFO")
    rpn = {"backbone.w": torch.tensor([float("nan")]), "proposal_generator.w": torch.ones(1)}
    detector = {"backbone.w": torch.tensor([float("nan")]), "roi_heads.w": torch.zeros(1)}
    joined = alternating.join_weights(rpn, detector)
    assert set(joined) == {"backbone.w", "proposal_generator.w", "roi_heads.w"}
    assert "share one backbone: 1 tensors are equal bit by bit" in caplog.text


# --- said before the first step -------------------------------------------------------------------


def test_weights_for_other_classes_are_refused_before_step_1(shapes, tmp_path, capsys):
    """Step 1 builds no classifier, and would take them."""
    opts = [*TINY, "MODEL.ROI_HEADS.NUM_CLASSES", "5"]
    other = build_model(instseg_ext.get_config(CONFIG, opts))
    torch.save({"model": other.state_dict()}, tmp_path / "five.pth")
    opts = [*TINY, "MODEL.WEIGHTS", str(tmp_path / "five.pth")]
    assert run(shapes, tmp_path / "run", *ITERATIONS, opts=opts) == 2
    error = capsys.readouterr().err
    assert "trained for another number of classes" in error
    assert "--reset-classifier" in error
    assert not (tmp_path / "run" / "step1").exists()


def test_settings_of_the_evaluation_are_read_before_step_1(tmp_path):
    """The steps have no test set, of which the mapper would see what is missing."""
    seen = []

    def build_mapper(cfg, is_train):
        seen.append((tuple(cfg.DATASETS.TEST), is_train))
        raise ValueError("no standard deviations")

    cfg = instseg_ext.get_config(CONFIG, [*TINY, "OUTPUT_DIR", str(tmp_path)])
    method = replace(zoo.method_of(cfg), build_mapper=build_mapper)
    with pytest.raises(ValueError, match="no standard deviations"):
        alternating.train_alternating(cfg, method)
    assert seen == [(tuple(cfg.DATASETS.TEST), True)]
    assert cfg.DATASETS.TEST
    assert not list(tmp_path.iterdir())


# --- the plan -------------------------------------------------------------------------------------


def test_configs_of_the_steps(tmp_path):
    cfg = instseg_ext.get_config("MaskRCNN/mask_rcnn_R_50_C4_1x", ["OUTPUT_DIR", str(tmp_path)])
    before = cfg.dump()
    plan = plan_steps(cfg, [80000, 40000, 90000, 45000])
    assert cfg.dump() == before
    assert [c.OUTPUT_DIR for c in plan] == [str(tmp_path / f"step{n}") for n in (1, 2, 3, 4)]
    step2 = str(tmp_path / "step2" / "model_final.pth")
    assert [c.MODEL.WEIGHTS for c in plan] == [cfg.MODEL.WEIGHTS] * 2 + [step2] * 2
    assert [c.SOLVER.MAX_ITER for c in plan] == [80000, 40000, 90000, 45000]
    assert plan[0].SOLVER.STEPS == (53333, 71111)
    assert plan[1].SOLVER.STEPS == (26667, 35556)
    assert plan[2].SOLVER.STEPS == (60000, 80000)
    assert [c.MODEL.LOAD_PROPOSALS for c in plan] == [False, True] * 2
    (proposals,) = plan[3].DATASETS.PROPOSAL_FILES_TRAIN
    assert proposals == str(tmp_path / "step3" / "proposals_0.pth")
    for rpn in plan[::2]:
        assert rpn.MODEL.RPN.POST_NMS_TOPK_TEST == cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN == 2000
    assert all(c.DATASETS.TEST == () for c in plan)
    assert [c.SOLVER.MAX_ITER for c in plan_steps(cfg)] == [cfg.SOLVER.MAX_ITER] * 4
    assert plan_steps(cfg, [10] * 4)[0].SOLVER.WARMUP_ITERS == 10
    with pytest.raises(ValueError, match="4 positive numbers"):
        plan_steps(cfg, [1, 1, 0, 1])


def test_models_without_two_stages_are_refused(tmp_path, capsys):
    argv = ["train-alternating", "--config-file", "SOLO/nuclei_solov2_R_18_FPN"]
    assert cli.main([*argv, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]) == 2
    assert "SOLOv2 is no two-stage model" in capsys.readouterr().err
    argv[2] = CONFIG
    opts = ["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
    assert cli.main([*argv, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), *opts]) == 2
    assert "leaves no RPN to train" in capsys.readouterr().err


def test_features_that_the_rpn_leaves_alone_get_a_gradient():
    """Even of values whose sum would not fit into half precision."""
    heads = alternating_step.NoHeads(["p2"])
    used = torch.ones(1, 4, requires_grad=True)
    idle = torch.full((1, 4), 6e4, dtype=torch.float16, requires_grad=True)
    proposals, losses = heads(None, {"p2": used, "p3": idle}, ["proposals"], None)
    assert proposals == ["proposals"]
    assert losses["loss_idle_features"].item() == 0
    losses["loss_idle_features"].backward()
    assert idle.grad is not None
    assert used.grad is None
    assert heads(None, {"p2": used, "p3": idle.detach()}, [], None)[1] == {}
    assert heads.eval()(None, {"p3": idle}, [], None)[1] == {}


def test_steps_are_those_of_the_paper():
    assert [step.proposes for step in STEPS] == [True, False, True, False]
    assert [step.frozen for step in STEPS] == [False, False, True, True]
