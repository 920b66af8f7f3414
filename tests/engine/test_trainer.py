"""The trainer's step against plain loops, its losses, averages, checkpoints and early stop."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from engine.toy_engine import METHOD, ToyTrainer, toy_config, weights_equal, write_dataset

from instseg_ext.engine import Trainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def config(dataset, tmp_path):
    def build(*opts, output="out"):
        return toy_config(*dataset, tmp_path / output, opts)

    return build


def run(cfg, resume=False, cls=ToyTrainer, **attributes):
    trainer = cls(cfg, METHOD)
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def state(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def load(path):
    return torch.load(path, weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.json").read_text().splitlines()]


class TestStep:
    def test_equals_plain_loop(self, config):
        """SGD with momentum, warm-up and a step, written out by hand on the same batches."""
        cfg = config("MODEL.TOY.DROPOUT", 0.0, "SOLVER.BASE_LR", 0.05)
        trainer = ToyTrainer(cfg, METHOD)
        model = copy.deepcopy(trainer.model)
        batches = iter(trainer.build_train_loader())
        trainer.train()

        momentum = {name: None for name, _ in model.named_parameters()}
        rates = [0.05 * f for f in (0.001, 0.5005, 1.0, 1.0, 0.1, 0.1)]
        for rate in rates:
            model.zero_grad()
            sum(model(next(batches)).values()).backward()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    norm = name.startswith("backbone.1")
                    decay = cfg.SOLVER.WEIGHT_DECAY_NORM if norm else cfg.SOLVER.WEIGHT_DECAY
                    gradient = p.grad + decay * p
                    old = momentum[name]
                    momentum[name] = gradient if old is None else 0.9 * old + gradient
                    p -= rate * momentum[name]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(trainer.model.state_dict()[key], value, rtol=1e-5, atol=1e-6)

    def test_accumulation_is_the_mean_over_micro_batches(self, config):
        cfg = config("INSTSEG.ACCUMULATE", 2, "MODEL.TOY.DROPOUT", 0.0, "SOLVER.MAX_ITER", 1)
        trainer = ToyTrainer(cfg, METHOD)
        model = copy.deepcopy(trainer.model)
        batches = iter(trainer.build_train_loader())
        gradients = {}

        class Keep(HookBase):
            def after_backward(self):
                for name, p in self.trainer.model.named_parameters():
                    gradients[name] = p.grad.clone()

        trainer.register_hooks([Keep()])
        trainer.train()
        parts = [next(batches), next(batches)]
        assert [len(part) for part in parts] == [2, 2]
        losses = [sum(model(part).values()) for part in parts]
        ((losses[0] + losses[1]) / 2).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("limit", [0.01, 1e6])
    def test_clips_the_whole_gradient(self, config, limit):
        cfg = config("INSTSEG.CLIP_GRAD_NORM", limit, "SOLVER.MAX_ITER", 1)
        trainer = ToyTrainer(cfg, METHOD)
        norms = []

        class Keep(HookBase):
            def after_backward(self):
                norms.append(_norm(self.trainer.model))

            def after_step(self):
                norms.append(_norm(self.trainer.model))

        trainer.register_hooks([Keep()])
        trainer.train()
        assert norms[1] == pytest.approx(min(limit, norms[0]), rel=1e-3)

    def test_bf16_runs_the_forward_in_low_precision(self, config):
        seen = []
        cfg = config("INSTSEG.PRECISION", "bf16", "SOLVER.MAX_ITER", 1)
        trainer = ToyTrainer(cfg, METHOD)
        trainer.model.head.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        trainer.train()
        assert seen == [torch.bfloat16]
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())

    def test_model_with_own_precision_is_not_wrapped(self, config):
        seen = []
        trainer = ToyTrainer(config("INSTSEG.PRECISION", "bf16", "SOLVER.MAX_ITER", 1), METHOD)
        trainer.model.precision = lambda: None
        trainer.model.head.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        trainer.train()
        assert seen == [torch.float32]

    def test_batch_that_cannot_be_split(self, config):
        with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH 4 must be a multiple of 3"):
            Trainer(config("INSTSEG.ACCUMULATE", 3), METHOD)

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_cuda_precisions(self, config, precision):
        cfg = config("INSTSEG.PRECISION", precision, "MODEL.DEVICE", "cuda")
        trainer = run(cfg)
        assert trainer.grad_scaler.is_enabled() == (precision == "fp16")
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def _norm(model):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))


class TestNonFinite:
    def test_names_iteration_term_and_files(self, config):
        cfg = config()
        trainer = ToyTrainer(cfg, METHOD)
        trainer.model.poison = "image_3"
        with pytest.raises(FloatingPointError) as error:
            trainer.train()
        text = str(error.value)
        assert f"iteration {trainer.iter}" in text
        assert "loss_mask is nan" in text
        assert "loss_size" not in text
        assert "image_3.png" in text

    def test_weights_stay_as_they_were(self, config):
        trainer = ToyTrainer(config("SOLVER.IMS_PER_BATCH", 8), METHOD)
        trainer.model.poison = "image"
        before = state(trainer)
        with pytest.raises(FloatingPointError):
            trainer.train()
        assert weights_equal(before, state(trainer))
        assert not list(Path(trainer.cfg.OUTPUT_DIR).glob("*.pth"))


class TestEma:
    def test_follows_the_formula(self, config):
        cfg = config("INSTSEG.EMA.ENABLED", True, "INSTSEG.EMA.WARMUP", 3, "INSTSEG.EMA.DECAY", 0.5)
        trainer = ToyTrainer(cfg, METHOD)
        expected = [state(trainer)]

        class Follow(HookBase):
            def after_step(self):
                t = self.trainer.iter
                d = min(0.5, (1 + t) / (3 + t))
                new = self.trainer.model.state_dict()
                expected.append({k: d * v + (1 - d) * new[k] for k, v in expected[-1].items()})

        trainer.register_hooks([Follow()])
        trainer.train()
        for key, value in trainer.ema.weights().items():
            torch.testing.assert_close(value, expected[-1][key], rtol=1e-5, atol=1e-6)

    def test_evaluation_sees_the_average_and_training_goes_on_without_it(self, config):
        plain = run(config(output="plain"))
        averaged = run(
            config("INSTSEG.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 2, output="averaged")
        )
        assert weights_equal(state(plain), state(averaged))
        score = -float(sum(v.double().abs().sum() for v in averaged.ema.weights().values()))
        assert averaged.calls[-1] == (6, score)
        assert plain.calls[-1][1] != score

    def test_checkpoint_gives_the_average_to_anyone_and_the_trained_weights_to_a_resume(
        self, config
    ):
        cfg = config("INSTSEG.EMA.ENABLED", True)
        trainer = run(cfg)
        content = load(Path(cfg.OUTPUT_DIR) / "model_final.pth")
        assert weights_equal(dict(content["model"]), trainer.ema.weights())
        assert weights_equal(dict(content["train_model"]), state(trainer))
        assert not weights_equal(dict(content["model"]), dict(content["train_model"]))

        resumed = ToyTrainer(cfg, METHOD)
        resumed.resume_or_load(True)
        assert weights_equal(state(resumed), state(trainer))
        assert weights_equal(resumed.ema.weights(), trainer.ema.weights())
        assert resumed.ema.updates == trainer.ema.updates == 6

    def test_integer_buffers_are_copied(self, config):
        trainer = run(config("INSTSEG.EMA.ENABLED", True, "MODEL.TOY.NORM", "BN"))
        assert trainer.ema.weights()["backbone.1.num_batches_tracked"] == 6

    def test_switching_it_off_resumes_from_trained_weights(self, config):
        first = run(config("INSTSEG.EMA.ENABLED", True))
        second = ToyTrainer(config("INSTSEG.EMA.ENABLED", False), METHOD)
        second.resume_or_load(True)
        assert weights_equal(state(first), state(second))


class _CrashError(Exception):
    pass


class _Crash(HookBase):
    def __init__(self, done):
        self.done = done

    def after_step(self):
        if self.trainer.iter + 1 == self.done:
            raise _CrashError


class TestResume:
    OPTS = (
        "SOLVER.CHECKPOINT_PERIOD", 2,
        "TEST.EVAL_PERIOD", 2,
        "SOLVER.MAX_ITER", 8,
        "SOLVER.STEPS", (5,),
        "INSTSEG.ACCUMULATE", 2,
        "INSTSEG.EMA.ENABLED", True,
        "INSTSEG.BEST.METRIC", "segm/AP",
        "INSTSEG.BEST.PATIENCE", 20,
        "INPUT.MIN_SIZE_TRAIN", (40, 48),
        "SOLVER.IMS_PER_BATCH", 2,
    )  # fmt: skip

    @pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
    @pytest.mark.parametrize("crash", [3, 5])
    def test_ends_with_the_same_bits(self, config, optimizer, crash):
        opts = (*self.OPTS, "INSTSEG.OPTIMIZER", optimizer, "SEED", -1)
        straight = ToyTrainer(config(*opts, output="straight"), METHOD)
        straight.train()
        cfg = config(*opts, output="killed")
        cfg.SEED = straight.seed
        killed = ToyTrainer(cfg, METHOD)
        killed.register_hooks([_Crash(crash)])
        with pytest.raises(_CrashError):
            killed.train()
        cfg.SEED = -1  # it must come from the checkpoint
        resumed = run(cfg, resume=True)
        assert resumed.start_iter == crash - 1
        assert resumed.seed == straight.seed
        folder = Path(cfg.OUTPUT_DIR)
        for name in ("model_final", "model_best"):
            got, want = (load(f / f"{name}.pth") for f in (folder, folder.parent / "straight"))
            for content in (got, want):
                content.pop("instseg_ext")
                content.get("trainer", {}).pop("run_id", None)
            assert weights_equal(got, want), name

    def test_metrics_have_each_iteration_once(self, config, monkeypatch):
        monkeypatch.setattr("instseg_ext.engine.trainer.WRITE_PERIOD", 1)
        cfg = config(*self.OPTS)
        killed = ToyTrainer(cfg, METHOD)
        killed.register_hooks([_Crash(5)])
        with pytest.raises(_CrashError):
            killed.train()
        assert [m["iteration"] for m in metrics(cfg.OUTPUT_DIR)] == [0, 1, 2, 3, 4]
        before = metrics(cfg.OUTPUT_DIR)[:4]
        run(cfg, resume=True)
        after = metrics(cfg.OUTPUT_DIR)
        assert [m["iteration"] for m in after] == list(range(8))
        assert after[:3] == before[:3]
        assert before[3].items() <= after[3].items()
        assert [m["iteration"] for m in after if "segm/AP" in m] == [1, 3, 5, 7]

    def test_evaluation_of_the_killed_iteration_is_made_up_for(self, config):
        cfg = config(*self.OPTS)
        killed = ToyTrainer(cfg, METHOD)

        def die(*args, **kwargs):
            raise _CrashError

        killed.test = die
        with pytest.raises(_CrashError):
            killed.train()  # the checkpoint of iteration 2 is written, its evaluation is not
        resumed = run(cfg, resume=True)
        assert [iteration for iteration, _ in resumed.calls] == [2, 4, 6, 8]

    def test_line_is_in_metrics_before_the_checkpoint_of_its_iteration(self, config, monkeypatch):
        """A kill after the checkpoint, during the evaluation, loses no line."""
        monkeypatch.setattr("instseg_ext.engine.trainer.WRITE_PERIOD", 1)
        trainer = ToyTrainer(config(*self.OPTS), METHOD)
        seen = []

        def evaluate(cfg, *args, iteration, **kwargs):
            assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file()
            seen.append((iteration, [m["iteration"] for m in metrics(cfg.OUTPUT_DIR)]))
            return {"toy": {"segm": {"AP": 0.0}}}

        trainer.test = evaluate
        trainer.train()
        assert seen == [(done, list(range(done))) for done in (2, 4, 6, 8)]

    def test_finished_run_does_nothing_more(self, config):
        cfg = config(*self.OPTS)
        first = run(cfg)
        again = run(cfg, resume=True)
        assert again.calls == []
        assert again.results == first.results
        assert weights_equal(state(first), state(again))

    def test_longer_run_goes_on(self, config):
        run(config(*self.OPTS))
        again = run(config(*self.OPTS, "SOLVER.MAX_ITER", 10), resume=True)
        assert again.start_iter == 8
        assert again.iter == 10

    def test_without_a_checkpoint_starts_from_the_beginning(self, config):
        assert run(config(), resume=True).start_iter == 0


class TestBest:
    OPTS = ("TEST.EVAL_PERIOD", 1, "INSTSEG.BEST.METRIC", "segm/AP", "SOLVER.MAX_ITER", 8)

    def test_keeps_the_best_weights(self, config):
        cfg = config(*self.OPTS)
        run(cfg, scores=[1.0, 3.0, math.nan, 2.0, 3.0, 0.0, 0.0, 0.0])
        best = load(Path(cfg.OUTPUT_DIR) / "model_best.pth")
        assert (best["iteration"], best["value"], best["metric"]) == (1, 3.0, "segm/AP")
        assert "optimizer" not in best
        assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_final.pth"

    def test_stops_early_and_stays_stopped(self, config):
        cfg = config(*self.OPTS, "INSTSEG.BEST.PATIENCE", 3)
        trainer = run(cfg, scores=[1.0, math.nan, math.nan, 0.5, 9.0, 9.0, 9.0, 9.0])
        assert len(trainer.calls) == 4
        assert trainer.iter == 4
        assert "segm/AP has not risen above 1.0000 in 3" in trainer.stop_reason
        final = load(Path(cfg.OUTPUT_DIR) / "model_final.pth")
        assert final["iteration"] == 3
        again = run(cfg, resume=True, scores=[9.0] * 8)
        assert again.calls == []
        assert again.stop_reason == trainer.stop_reason

    def test_patience_counts_over_a_resume(self, config):
        opts = (*self.OPTS, "INSTSEG.BEST.PATIENCE", 3, "SOLVER.CHECKPOINT_PERIOD", 3)
        cfg = config(*opts)
        killed = ToyTrainer(cfg, METHOD)
        killed.scores = [5.0, 1.0, 1.0, 1.0]
        killed.register_hooks([_Crash(4)])
        # The checkpoint of iteration 3 has seen two evaluations without improvement.
        killed.max_iter = 4
        with pytest.raises(_CrashError):
            killed.train()
        (Path(cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
        resumed = run(cfg, resume=True, scores=[1.0] * 8)
        assert resumed.iter == 4
        assert resumed.stop_reason

    def test_unknown_metric_lists_the_known(self, config):
        with pytest.raises(ValueError, match="'segm/APx' is not among the results: segm/AP"):
            run(config("INSTSEG.BEST.METRIC", "segm/APx"))

    def test_needs_a_test_set(self, config):
        with pytest.raises(ValueError, match="needs a test set"):
            Trainer(config("INSTSEG.BEST.METRIC", "segm/AP", "DATASETS.TEST", ()), METHOD)

    def test_patience_needs_a_metric(self, config):
        with pytest.raises(ValueError, match=r"set INSTSEG.BEST.METRIC"):
            Trainer(config("INSTSEG.BEST.PATIENCE", 2), METHOD)


class TestFiles:
    def test_keeps_the_newest_checkpoints(self, config):
        cfg = config("SOLVER.CHECKPOINT_PERIOD", 1, "INSTSEG.KEEP_CHECKPOINTS", 2)
        run(cfg)
        names = sorted(p.name for p in Path(cfg.OUTPUT_DIR).glob("*.pth"))
        assert names == ["model_0000003.pth", "model_0000004.pth", "model_final.pth"]

    def test_keeping_counts_over_a_resume(self, config):
        opts = ("SOLVER.CHECKPOINT_PERIOD", 1, "INSTSEG.KEEP_CHECKPOINTS", 2)
        run(config(*opts, "SOLVER.MAX_ITER", 4))
        run(config(*opts, "SOLVER.MAX_ITER", 5), resume=True)
        cfg = config(*opts, "SOLVER.MAX_ITER", 7)
        run(cfg, resume=True)
        names = sorted(p.name for p in Path(cfg.OUTPUT_DIR).glob("model_0*.pth"))
        assert names == ["model_0000002.pth", "model_0000005.pth"]

    def test_checkpoint_carries_classes_and_registration(self, config):
        from instseg_ext.checkpoint import read_metadata

        cfg = config()
        run(cfg)
        metadata = read_metadata(str(Path(cfg.OUTPUT_DIR) / "model_final.pth"))
        assert metadata["class_names"] == ["disc", "square"]
        assert metadata["datasets"][0]["NAME"] == cfg.DATASETS.TRAIN[0]
        assert "ToySegmenter" in metadata["config"]
        assert "SEED: 7" in metadata["config"]

    def test_writes_tensorboard_and_json(self, config):
        cfg = config("SOLVER.MAX_ITER", 20)
        run(cfg)
        assert list(Path(cfg.OUTPUT_DIR).glob("events.out.tfevents.*"))
        last = metrics(cfg.OUTPUT_DIR)[-1]
        assert last["iteration"] == 19
        assert {"total_loss", "loss_mask", "loss_size", "lr", "time", "data_time"} <= last.keys()
        assert {"eta_seconds", "segm/AP"} <= last.keys()
        parts = last["loss_mask"] + last["loss_size"]
        assert last["total_loss"] == pytest.approx(parts, rel=0.2)


class TestSettings:
    def test_missing_weights_are_told_before_data(self, config):
        cfg = config("DATASETS.TRAIN", ("no_such_set",), "MODEL.WEIGHTS", "nowhere.pth")
        trainer = Trainer(cfg, METHOD)
        with pytest.raises(FileNotFoundError, match=r"nowhere.pth do not exist.*MODEL.WEIGHTS"):
            trainer.resume_or_load(False)

    def test_fp16_on_a_cpu(self, config):
        with pytest.raises(ValueError, match=r"INSTSEG.PRECISION fp16 needs CUDA"):
            Trainer(config("INSTSEG.PRECISION", "fp16"), METHOD)

    def test_precise_bn_is_refused(self, config):
        with pytest.raises(ValueError, match=r"TEST.PRECISE_BN.ENABLED"):
            Trainer(config("TEST.PRECISE_BN.ENABLED", True), METHOD)

    def test_files_of_proposals_are_looked_for_before_training(self, config, tmp_path):
        with pytest.raises(ValueError, match=r"a file for each .*PROPOSAL_FILES_TRAIN has 0"):
            Trainer(config("MODEL.LOAD_PROPOSALS", True), METHOD)
        given = ("MODEL.LOAD_PROPOSALS", True, "DATASETS.PROPOSAL_FILES_TRAIN")
        with pytest.raises(FileNotFoundError, match=r"no proposal file gone\.pth"):
            Trainer(config(*given, ("gone.pth",)), METHOD)
        (tmp_path / "some.pth").touch()
        with pytest.raises(ValueError, match=r"a file for each .*PROPOSAL_FILES_TEST has 0"):
            Trainer(config(*given, (str(tmp_path / "some.pth"),)), METHOD)

    def test_wandb_is_missing(self, config, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "wandb", None)
        with pytest.raises(ImportError, match=r"INSTSEG.WANDB.ENABLED needs the package wandb"):
            Trainer(config("INSTSEG.WANDB.ENABLED", True), METHOD)

    def test_start_up_line_and_batch_norm_warning(self, config, caplog):
        opts = ("SOLVER.IMS_PER_BATCH", 2, "INSTSEG.SCALE_LR_BATCH", 16, "MODEL.TOY.NORM", "BN")
        with caplog.at_level(logging.INFO, logger="instseg_ext"):
            trainer = Trainer(config(*opts), METHOD)
        assert (
            "learning rate 0.00125 (SOLVER.BASE_LR 0.01 scaled from a batch of 16)" in caplog.text
        )
        assert "for 2 images per step = 0.000625 per image" in caplog.text
        assert "1 batch normalisation layers (first: backbone.1)" in caplog.text
        assert trainer.optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.00125)
        # Stored unscaled, so that it is not scaled again.
        assert trainer.cfg.SOLVER.BASE_LR == 0.01

    def test_no_warning_for_group_norm(self, config, caplog):
        with caplog.at_level(logging.INFO, logger="instseg_ext"):
            Trainer(config("SOLVER.IMS_PER_BATCH", 1), METHOD)
        assert "batch normalisation" not in caplog.text


def test_real_evaluation_learns(config):
    """The whole way with the real evaluator: the toy finds bright rectangles."""
    cfg = config(
        "SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (), "SOLVER.BASE_LR", 0.03,
        "INSTSEG.OPTIMIZER", "adamw", "INSTSEG.CLIP_GRAD_NORM", 100.0, "MODEL.TOY.DROPOUT", 0.0,
        "INSTSEG.EMA.ENABLED", True, "INSTSEG.BEST.METRIC", "segm/AP",
    )  # fmt: skip
    trainer = run(cfg, cls=Trainer)
    assert set(trainer.results) == set(cfg.DATASETS.TEST)
    assert {"bbox", "segm"} <= set(trainer.results[cfg.DATASETS.TEST[0]])
    results = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    assert cfg.DATASETS.TEST[0] in results["datasets"]
    losses = [m["total_loss"] for m in metrics(cfg.OUTPUT_DIR)]
    assert losses[-1] < 0.95 * losses[0]
    assert [m["grad_norm"] > 0 for m in metrics(cfg.OUTPUT_DIR)] == [True] * 3
    assert trainer.results[cfg.DATASETS.TEST[0]]["segm"]["AP50"] > 10
