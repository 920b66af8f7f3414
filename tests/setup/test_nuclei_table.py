"""The table script trains what is missing, and only that."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("nuclei_table", ROOT / "tools" / "nuclei_table.py")
nuclei_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(nuclei_table)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two configs, and a training that only writes results; returns the commands it was given."""
    for name in ("A/configs/nuclei_a", "B/configs/nuclei_b", "B/configs/other"):
        path = tmp_path / "projects" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    commands = []

    def train(command, **others):
        commands.append(command)
        if run.fail:
            return 1
        options = dict(zip(command[5::2], command[6::2], strict=True))
        fold1 = "fold1" in options["DATASETS.TEST"]
        name = "nuclei_fold1_val" if fold1 else "nuclei_val"
        segm, box = {"AP": 50.0 + 2 * fold1, "AP50": 80.0}, None if fold1 else 40.0
        results = {
            "datasets": {name: {"segm": segm, "bbox": {"AP": box}}},
            "speed": {"median_ms": {"total": 30.0}},
        }
        Path(options["OUTPUT_DIR"], "results.json").write_text(json.dumps(results))
        return 0

    def run(*arguments):
        commands.clear()
        monkeypatch.setattr(sys, "argv", ["nuclei_table.py", *arguments])
        return nuclei_table.main()

    def text(config, opts):
        return config.read_text() + repr(opts)

    monkeypatch.setattr(nuclei_table, "ROOT", tmp_path)
    monkeypatch.setattr(nuclei_table, "identity", text)
    monkeypatch.setattr(nuclei_table.subprocess, "call", train)
    run.commands, run.fail = commands, False
    return run


def test_the_table_holds_means_and_both_folds(runs, capsys):
    assert runs() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| config | segm AP | segm AP50 | bbox AP | ms/image |"
    assert lines[2] == (
        "| A/nuclei_a | 51.0 (50.0 / 52.0) | 80.0 (80.0 / 80.0) | - | 30.0 (30.0 / 30.0) |"
    )
    assert len(lines) == 4
    assert len(runs.commands) == 4


def test_finished_runs_are_kept_and_changed_ones_trained_anew(runs, tmp_path):
    runs()
    assert runs() == 0
    assert runs.commands == []
    (tmp_path / "projects" / "A" / "configs" / "nuclei_a.yaml").write_text("changed")
    runs()
    assert [command[3].endswith("nuclei_a.yaml") for command in runs.commands] == [True, True]
    assert all("--overwrite" in command for command in runs.commands)


def test_a_failed_run_is_named_and_resumed(runs, capsys):
    runs.fail = True
    assert runs("--only", "A/*") == 1
    captured = capsys.readouterr()
    assert "failed: A/nuclei_a fold 0" in captured.err
    assert "| A/nuclei_a | failed |" in captured.out
    runs.fail = False
    assert runs("--only", "A/*") == 0
    assert "--resume" in runs.commands[0]
    assert "--overwrite" in runs.commands[1]


def test_options_reach_every_run(runs):
    runs("--only", "A/*", "SOLVER.MAX_ITER", "2")
    assert all(command[-2:] == ["SOLVER.MAX_ITER", "2"] for command in runs.commands)


def test_what_a_run_needs_is_trained_before(runs, tmp_path, monkeypatch):
    """Weights of one model, proposals of that one, on the same fold; a command of its own."""
    monkeypatch.setattr(nuclei_table, "STARTS_FROM", {"B/nuclei_b": "A/nuclei_a"})
    assert runs("--only", "B/*") == 0
    root = tmp_path / "output" / "nuclei_table"
    assert [command[3].split("_")[-1] for command in runs.commands] == ["a.yaml", "b.yaml"] * 2
    for fold, command in enumerate(runs.commands[1::2]):
        weights = root / "A" / "nuclei_a" / f"fold{fold}" / "model_final.pth"
        assert command[-2:] == ["MODEL.WEIGHTS", str(weights)]
    runs.commands.clear()
    monkeypatch.setattr(nuclei_table, "STARTS_FROM", {})
    monkeypatch.setattr(nuclei_table, "PROPOSALS_OF", {"B/nuclei_b": "A/nuclei_a"})
    proposals = []
    train = nuclei_table.subprocess.call

    def call(command, **others):
        if "propose" in command:
            return proposals.append(command)
        return train(command, **others)

    monkeypatch.setattr(nuclei_table.subprocess, "call", call)
    assert runs("--only", "B/*") == 0
    assert [command[7] for command in proposals] == [name for f in nuclei_table.FOLDS for name in f]
    files = [f"('{command[9]}',)" for command in proposals]
    assert [runs.commands[0][-3], runs.commands[0][-1]] == files[:2]


def test_named_configs_exist():
    named = {*nuclei_table.STARTS_FROM, *nuclei_table.PROPOSALS_OF, *nuclei_table.COMMANDS}
    named |= {*nuclei_table.STARTS_FROM.values(), *nuclei_table.PROPOSALS_OF.values()}
    assert named <= {nuclei_table.title(path) for path in nuclei_table.configs("*")}


def test_nothing_to_train_is_an_error(runs, capsys):
    with pytest.raises(SystemExit):
        runs("--only", "C/*")
    assert "no projects/*/configs/nuclei_*.yaml matches 'C/*'" in capsys.readouterr().err
