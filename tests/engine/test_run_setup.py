"""Output folders, resume checks, writers, optimiser groups, dry run, set-up, launch."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from detectron2.utils.events import EventStorage
from engine.toy_engine import METHOD, ToyTrainer, toy_config, write_dataset
from torch import nn

from instseg_ext.engine import (
    apply_dry_run,
    build_optimizer,
    check_output_dir,
    check_resume,
    check_weights,
    evaluate_checkpoint,
    launch,
    setup,
)
from instseg_ext.engine.best import BestTracker, flatten_results, select_metric
from instseg_ext.engine.distributed import plain_batch_norms
from instseg_ext.engine.optim import build_scheduler
from instseg_ext.engine.seeding import choose_seed, seed_step
from instseg_ext.engine.writers import MetricsWriter, WandbWriter
from instseg_ext.modeling.dilated_resnet import FixedBatchNorm2d


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def config(dataset, tmp_path):
    def build(*opts, output="out"):
        return toy_config(*dataset, tmp_path / output, opts)

    return build


@pytest.fixture
def finished(config):
    """Return the folder of a finished run."""
    cfg = config("SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 3)
    ToyTrainer(cfg, METHOD).train()
    return cfg.OUTPUT_DIR


class TestOutputFolder:
    def test_other_run_is_refused_unless_told(self, finished):
        with pytest.raises(FileExistsError, match=r"--resume .*--overwrite .*OUTPUT_DIR"):
            check_output_dir(finished, False, False)
        check_output_dir(finished, True, False)

    @pytest.mark.parametrize(
        "name", ["model_0000001.pth", "model_final.pth", "model_best.pth", "last_checkpoint"]
    )
    def test_any_checkpoint_counts(self, tmp_path, name):
        (tmp_path / name).write_text("")
        with pytest.raises(FileExistsError, match=name):
            check_output_dir(str(tmp_path), False, False)

    def test_new_and_empty_folders(self, tmp_path):
        check_output_dir(str(tmp_path / "new"), False, False)
        (tmp_path / "notes.txt").write_text("")
        check_output_dir(str(tmp_path), False, False)
        check_output_dir(str(tmp_path), True, False)

    def test_overwrite_deletes_what_a_run_writes_and_nothing_else(self, finished):
        folder = Path(finished)
        for name in ("notes.txt", "model_zoo.pth", "model_x.pth"):
            (folder / name).write_text("mine")
        (folder / "results").mkdir()
        check_output_dir(finished, False, True)
        assert sorted(p.name for p in folder.iterdir()) == [
            "model_x.pth",
            "model_zoo.pth",
            "notes.txt",
        ]

    def test_both_flags(self, tmp_path):
        with pytest.raises(ValueError, match="give only one"):
            check_output_dir(str(tmp_path), True, True)

    @pytest.mark.parametrize("name", ["model_0000001.pth", "model_final.pth"])
    def test_checkpoints_without_a_pointer_are_not_written_over(self, tmp_path, name):
        (tmp_path / name).write_text("")
        with pytest.raises(FileExistsError, match=rf"{name}, but no file last_checkpoint: write "):
            check_output_dir(str(tmp_path), True, False)
        (tmp_path / name).rename(tmp_path / "model_best.pth")
        check_output_dir(str(tmp_path), True, False)

    def test_pointer_to_a_lost_file(self, finished):
        (Path(finished) / "model_final.pth").unlink()
        with pytest.raises(FileNotFoundError, match=r"names model_final.pth, which does not exist"):
            check_output_dir(finished, True, False)


class TestResumeCheck:
    @pytest.mark.parametrize(
        ("opts", "key"),
        [
            (("MODEL.TOY.NUM_CLASSES", 3), "MODEL.TOY.NUM_CLASSES was 2, is 3"),
            (("MODEL.TOY.NORM", "BN"), "MODEL.TOY.NORM was 'GN', is 'BN'"),
            (("INSTSEG.OPTIMIZER", "adamw"), "INSTSEG.OPTIMIZER"),
            (("INSTSEG.CLASS_NAMES", ["square", "disc"]), "INSTSEG.CLASS_NAMES"),
        ],
    )
    def test_other_model_is_refused(self, config, finished, opts, key):
        cfg = config(*opts)
        with pytest.raises(ValueError, match="belongs to another model") as error:
            check_output_dir(finished, True, False, cfg)
        assert key in str(error.value)
        trainer = ToyTrainer(cfg, METHOD)
        with pytest.raises(ValueError, match="belongs to another model"):
            trainer.resume_or_load(True)

    def test_other_schedule_and_device_are_told(self, config, finished, caplog):
        cfg = config("SOLVER.MAX_ITER", 9, "MODEL.WEIGHTS", "x.pth", "SEED", 3)
        with caplog.at_level(logging.INFO, logger="instseg_ext"):
            check_weights(cfg, resume=True)
        assert "SOLVER.MAX_ITER" in caplog.text
        assert "SEED" not in caplog.text

    def test_keys_of_another_release_do_not_matter(self, config, finished):
        cfg = config()
        cfg.MODEL.TOY.NEW_KEY = 1
        check_resume(cfg, str(Path(finished) / "model_final.pth"))

    def test_foreign_checkpoint_is_not_judged(self, config, tmp_path):
        torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "x.pth")
        check_resume(config(), str(tmp_path / "x.pth"))


class TestMetricsWriter:
    def write(self, path, start, values):
        """Put and write ``[(iteration, {key: value})]``, one write each."""
        writer = MetricsWriter(str(path), start)
        with EventStorage(start) as storage:
            for iteration, scalars in values:
                storage.iter = iteration
                storage.put_scalars(smoothing_hint=False, **scalars)
                writer.write()
        writer.close()
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_late_values_join_their_line(self, tmp_path):
        lines = self.write(
            tmp_path / "m.json",
            0,
            [(0, {"a": 1.0}), (1, {"a": 2.0}), (1, {"b": 3.0}), (2, {"a": 4})],
        )
        assert lines == [
            {"iteration": 0, "a": 1.0},
            {"iteration": 1, "a": 2.0, "b": 3.0},
            {"iteration": 2, "a": 4.0},
        ]

    def test_shorter_line_leaves_no_rest(self, tmp_path):
        lines = self.write(tmp_path / "m.json", 0, [(0, {"a": 1.123456789012345}), (0, {"a": 1.0})])
        assert lines[0]["iteration"] == 0

    def test_not_a_number_is_null(self, tmp_path):
        lines = self.write(tmp_path / "m.json", 0, [(0, {"a": float("nan"), "b": float("inf")})])
        assert lines == [{"iteration": 0, "a": None, "b": None}]

    def test_resume_drops_what_runs_again_and_a_halved_line(self, tmp_path):
        path = tmp_path / "m.json"
        self.write(path, 0, [(i, {"a": float(i)}) for i in range(5)])
        path.write_text(path.read_text() + '{"iteration": 2, "a"')
        assert self.write(path, 3, [(3, {"a": 30.0})]) == [
            {"iteration": 0, "a": 0.0},
            {"iteration": 1, "a": 1.0},
            {"iteration": 2, "a": 2.0},
            {"iteration": 3, "a": 30.0},
        ]

    def test_made_up_evaluation_joins_the_last_line(self, tmp_path):
        path = tmp_path / "m.json"
        self.write(path, 0, [(0, {"a": 1.0}), (1, {"a": 2.0})])
        lines = self.write(path, 2, [(1, {"AP": 7.0}), (2, {"a": 3.0})])
        assert lines[1] == {"iteration": 1, "a": 2.0, "AP": 7.0}
        assert len(lines) == 3


def test_wandb_writer_logs_each_value_once(monkeypatch, tmp_path):
    logged, arguments = [], {}

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    fake = SimpleNamespace(init=lambda **kwargs: arguments.update(kwargs) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = WandbWriter("project", "id", str(tmp_path), {})
    with EventStorage() as storage:
        storage.put_scalars(a=1.0, smoothing_hint=False)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalars(a=2.0, smoothing_hint=False)
        writer.write()
    writer.close()
    assert logged == [(0, {"a": 1.0}), (1, {"a": 2.0}), "finished"]
    assert (arguments["project"], arguments["id"], arguments["resume"]) == (
        "project",
        "id",
        "allow",
    )


class TestBestTracker:
    def test_not_a_number_is_worst(self):
        tracker = BestTracker(2)
        values = [float("nan"), -5.0, float("nan"), -6.0]
        assert [tracker.update(v, i) for i, v in enumerate(values)] == [False, True, False, False]
        assert tracker.exhausted
        assert (tracker.value, tracker.iteration) == (-5.0, 1)

    def test_patience_zero_never_stops(self):
        tracker = BestTracker(0)
        for i in range(50):
            tracker.update(-float(i), i)
        assert not tracker.exhausted

    def test_names_of_metrics(self):
        one = {"x": {"segm": {"AP": 1.0}}}
        two = {**one, "y": {"segm": {"AP": 2.0}}}
        assert flatten_results(one) == {"segm/AP": 1.0}
        assert flatten_results(two) == {"x/segm/AP": 1.0, "y/segm/AP": 2.0}
        assert select_metric(two, "segm/AP") == 1.0
        assert select_metric(two, "y/segm/AP") == 2.0


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
        self.head = nn.Conv2d(4, 2, 1)


class TestOptimizer:
    @staticmethod
    def settings(cfg, model):
        """Rate and weight decay of every parameter."""
        groups = build_optimizer(cfg, model).param_groups
        found = {
            p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
        }
        assert len(found) == sum(len(group["params"]) for group in groups)
        return {name: found[p] for name, p in model.named_parameters()}

    @pytest.mark.parametrize("norm_biases_are_biases", [True, False])
    def test_groups_follow_the_config(self, config, norm_biases_are_biases):
        cfg = config(
            "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.WEIGHT_DECAY_NORM", 0.0,
            "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.5,
            "INSTSEG.NORM_BIASES_ARE_BIASES", norm_biases_are_biases,
        )  # fmt: skip
        cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
        got = self.settings(cfg, Parts())
        want = {
            "backbone.0.weight": (0.01, 0.01),
            "backbone.0.bias": (0.02, 0.5),
            "backbone.1.weight": (0.01, 0.0),
            "backbone.1.bias": (0.02, 0.5) if norm_biases_are_biases else (0.01, 0.0),
            "head.weight": (0.1, 0.01),
            "head.bias": (0.2, 0.5),
        }
        assert got.keys() == want.keys()
        for name, pair in want.items():
            assert got[name] == pytest.approx(pair), name

    def test_norm_biases_without_a_decay_of_their_own(self, config):
        """WEIGHT_DECAY_NORM None, as in a config that leaves it to WEIGHT_DECAY; one is frozen."""
        cfg = config(
            "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.BIAS_LR_FACTOR", 2.0,
            "SOLVER.WEIGHT_DECAY_BIAS", 0.5, "INSTSEG.NORM_BIASES_ARE_BIASES", False,
        )  # fmt: skip
        cfg.SOLVER.WEIGHT_DECAY_NORM = None
        model = nn.Sequential(nn.BatchNorm2d(3), nn.LayerNorm(3, bias=False), nn.Linear(3, 3))
        got = self.settings(cfg, model)
        assert got.pop("2.bias") == (0.2, 0.5)
        assert len(got) == 4
        assert set(got.values()) == {(0.1, 0.01)}
        model.append(nn.GroupNorm(1, 3).requires_grad_(False))
        groups = build_optimizer(cfg, model).param_groups
        assert sum(len(group["params"]) for group in groups) == 5

    @pytest.mark.parametrize("bias_decay", [None, 0.5])
    @pytest.mark.parametrize("norm_biases_are_biases", [True, False])
    def test_norms_of_fixed_statistics_are_norms(self, config, norm_biases_are_biases, bias_decay):
        """They are treated as the norms that detectron2 knows; frozen ones are left out."""
        cfg = config(
            "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.WEIGHT_DECAY_NORM", 0.002,
            "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", bias_decay,
            "INSTSEG.NORM_BIASES_ARE_BIASES", norm_biases_are_biases,
        )  # fmt: skip
        model = nn.Sequential(FixedBatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
        got = self.settings(cfg, model)
        for part in ("weight", "bias"):
            assert got[f"0.{part}"] == got[f"1.{part}"]
        assert got["0.weight"] == (0.1, 0.002)
        assert got["2.weight"] == (0.1, 0.01)
        model[0].requires_grad_(False)
        groups = build_optimizer(cfg, model).param_groups
        assert sum(len(group["params"]) for group in groups) == 4

    def test_a_module_can_ask_for_another_rate(self, config):
        """Factors multiply: those of nested modules, of the backbone and of biases."""
        cfg = config("SOLVER.BASE_LR", 0.1, "SOLVER.BIAS_LR_FACTOR", 2.0)
        cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
        model = Parts()
        model.head.lr_factor = 3.0
        model.backbone.lr_factor, model.backbone[0].lr_factor = 2.0, 5.0
        rates = {name: rate for name, (rate, _) in self.settings(cfg, model).items()}
        want = {"head.weight": 0.3, "head.bias": 0.6, "backbone.0.weight": 0.1}
        want |= {"backbone.0.bias": 0.2, "backbone.1.weight": 0.02, "backbone.1.bias": 0.04}
        assert rates == pytest.approx(want)

    @pytest.mark.parametrize(
        ("name", "cls"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)]
    )
    def test_kinds(self, config, name, cls):
        optimizer = build_optimizer(config("INSTSEG.OPTIMIZER", name), Parts())
        assert type(optimizer) is cls

    def test_frozen_parameters_are_left_out(self, config):
        model = Parts()
        model.backbone.requires_grad_(False)
        groups = build_optimizer(config(), model).param_groups
        assert sum(len(group["params"]) for group in groups) == 2

    def test_unknown_kind(self, config):
        with pytest.raises(ValueError, match=r"INSTSEG.OPTIMIZER must be one of sgd, adamw"):
            build_optimizer(config("INSTSEG.OPTIMIZER", "lion"), Parts())

    def test_per_parameter_clipping_of_detectron2(self, config):
        cfg = config(
            "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"
        )
        assert type(build_optimizer(cfg, Parts())).__name__ == "SGDWithGradientClip"

    @pytest.mark.parametrize("maximum", [1, 4, 5])
    def test_steps_beyond_the_end_are_left_out(self, config, maximum):
        cfg = config("SOLVER.STEPS", (4, 5), "SOLVER.MAX_ITER", maximum)
        build_scheduler(cfg, build_optimizer(cfg, Parts()))
        assert cfg.SOLVER.STEPS == (4, 5)


def test_plain_batch_norms_are_found():
    from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm

    model = nn.Sequential(
        nn.BatchNorm2d(2), nn.SyncBatchNorm(2), FrozenBatchNorm2d(2), NaiveSyncBatchNorm(2),
        nn.GroupNorm(1, 2),
    )  # fmt: skip
    assert plain_batch_norms(model) == ["0"]
    assert plain_batch_norms(model.eval()) == ["0"]
    model.train()[0].eval()
    assert plain_batch_norms(model) == []


class TestDryRun:
    def test_settings(self, config):
        cfg = config("SOLVER.IMS_PER_BATCH", 16, "INSTSEG.ACCUMULATE", 4, "SOLVER.MAX_ITER", 90000)
        cfg.DATALOADER.NUM_WORKERS = 8
        apply_dry_run(cfg, set(), world_size=2)
        assert cfg.SOLVER.MAX_ITER == 20
        assert cfg.SOLVER.IMS_PER_BATCH == 2
        assert cfg.INSTSEG.ACCUMULATE == 1
        assert pytest.approx(0.01 * 2 / 16) == cfg.SOLVER.BASE_LR
        assert cfg.TEST.EVAL_PERIOD == 0
        assert cfg.SOLVER.STEPS == ()
        assert cfg.DATALOADER.NUM_WORKERS == 2

    def test_typed_options_win(self, config):
        opts = ("SOLVER.MAX_ITER", 7, "SOLVER.IMS_PER_BATCH", 4, "TEST.EVAL_PERIOD", 3)
        cfg = config(*opts)
        apply_dry_run(cfg, {"SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "TEST.EVAL_PERIOD"})
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.TEST.EVAL_PERIOD) == (7, 4, 3)
        assert cfg.SOLVER.BASE_LR == 0.01
        cfg = config("SOLVER.BASE_LR", 0.5)
        apply_dry_run(cfg, {"SOLVER.BASE_LR"})
        assert cfg.SOLVER.BASE_LR == 0.5

    def test_scaling_is_not_applied_twice(self, config):
        cfg = config("INSTSEG.SCALE_LR_BATCH", 16, "SOLVER.IMS_PER_BATCH", 16)
        apply_dry_run(cfg, set())
        lr = build_optimizer(cfg, Parts()).param_groups[0]["lr"]
        assert lr == pytest.approx(0.01 / 16)


class TestSetup:
    def test_stores_a_config_that_repeats_the_run(self, config):
        cfg = config("SEED", -1)
        cfg.freeze()
        setup(cfg, SimpleNamespace(resume=False))
        stored = yaml.safe_load((Path(cfg.OUTPUT_DIR) / "config.yaml").read_text())
        assert cfg.is_frozen()
        assert stored["SEED"] == cfg.SEED >= 0
        again = config("SEED", -1)
        setup(again, SimpleNamespace(resume=True))
        assert again.SEED == cfg.SEED
        other = config("SEED", -1)
        setup(other, SimpleNamespace(resume=False))
        assert other.SEED != cfg.SEED

    def test_evaluation_leaves_the_stored_config_alone(self, config):
        cfg = config()
        setup(cfg, SimpleNamespace(eval_only=True))
        assert not (Path(cfg.OUTPUT_DIR) / "config.yaml").exists()
        assert (Path(cfg.OUTPUT_DIR) / "log.txt").is_file()

    def test_logs_of_this_package_reach_the_file(self, config):
        cfg = config(output="logs")
        setup(cfg, None)
        logging.getLogger("instseg_ext.engine.trainer").info("a line of ours")
        logging.getLogger("fvcore.common").info("a line of theirs")
        text = (Path(cfg.OUTPUT_DIR) / "log.txt").read_text()
        assert "a line of ours" in text
        assert "a line of theirs" in text

    @pytest.fixture(autouse=True)
    def _restore_logging(self):
        names = ("fvcore", "detectron2", "instseg_ext")
        before = [
            (logging.getLogger(n), logging.getLogger(n).handlers[:], logging.getLogger(n).propagate)
            for n in names
        ]
        yield
        from detectron2.utils.logger import setup_logger

        setup_logger.cache_clear()
        for logger, handlers, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(logging.NOTSET)


class TestSeeds:
    def test_a_step_draws_the_same_whatever_came_before(self):
        import random

        import numpy as np

        def draw(*where):
            seed_step(*where)
            return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

        first = draw(1, 2, 0)
        torch.rand(5)
        assert draw(1, 2, 0) == first
        others = [draw(1, 3, 0), draw(1, 2, 1), draw(2, 2, 0)]
        for other in others:
            assert all(a != b for a, b in zip(first, other, strict=True))

    def test_random_seed_is_chosen_once(self):
        assert choose_seed(5) == 5
        assert choose_seed(-1) != choose_seed(-1)


def test_evaluate_checkpoint_gives_the_averaged_weights(config, monkeypatch):
    cfg = config("INSTSEG.EMA.ENABLED", True, "SOLVER.MAX_ITER", 3)
    trainer = ToyTrainer(cfg, METHOD)
    trainer.train()
    seen = {}

    def evaluate(cfg, model, method, *, limit, output_dir):
        seen.update(model.state_dict())
        return {"limit": limit}

    monkeypatch.setattr("instseg_ext.engine.standalone.evaluate", evaluate)
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    assert evaluate_checkpoint(cfg, METHOD, limit=3) == {"limit": 3}
    for key, value in trainer.ema.weights().items():
        assert torch.equal(seen[key], value)


class TestLaunch:
    def test_one_process_is_this_one(self):
        assert launch(lambda x: x + 1, args=(1,)) == 2

    def test_torchrun_and_num_gpus_contradict(self, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="torchrun has already started the processes"):
            launch(print, num_gpus=2)

    @pytest.mark.parametrize("numbers", [(0, 1, 0), (1, 2, 2), (1, 1, -1)])
    def test_impossible_numbers(self, numbers):
        with pytest.raises(ValueError, match="--num-gpus"):
            launch(print, *numbers)

    def test_several_machines_need_an_address(self):
        with pytest.raises(ValueError, match="--dist-url"):
            launch(print, num_gpus=1, num_machines=2)

    def test_more_processes_than_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(ValueError, match="this machine has 1 CUDA"):
            launch(print, num_gpus=2)
