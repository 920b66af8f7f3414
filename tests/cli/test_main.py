"""The console script: dispatch, overrides anywhere, one sentence per user error."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from instseg_ext.cli import main as cli


def parser_with(run, takes_overrides=True):
    parser = argparse.ArgumentParser(prog="tool")
    parser.add_argument("--flag", action="store_true")
    parser.set_defaults(run=run, takes_overrides=takes_overrides, needs_detectron2=False)
    return parser


def test_overrides_may_stand_anywhere():
    seen = {}

    def run(args):
        seen.update(opts=args.opts, flag=args.flag)
        return 0

    assert cli.run_command(parser_with(run), ["A.B", "1", "--flag", "C.D", "-1"]) == 0
    assert seen == {"opts": ["A.B", "1", "C.D", "-1"], "flag": True}


@pytest.mark.parametrize(("argv", "takes_overrides"), [(["--flga"], True), (["A.B", "1"], False)])
def test_unknown_arguments_are_refused(argv, takes_overrides, capsys):
    with pytest.raises(SystemExit):
        cli.run_command(parser_with(lambda args: 0, takes_overrides), argv)
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, KeyError, FileNotFoundError, ImportError])
def test_user_errors_are_one_line(error, capsys):
    def run(args):
        raise error("the file x.json has no images; give another one.")

    assert cli.run_command(parser_with(run), []) == 2
    assert capsys.readouterr().err == (
        "tool: error: the file x.json has no images; give another one.\n"
    )


def test_defects_keep_their_traceback():
    def run(args):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        cli.run_command(parser_with(run), [])


def test_help_needs_neither_torch_nor_detectron2():
    script = (
        "import sys; sys.modules['torch'] = sys.modules['detectron2'] = None\n"
        "from instseg_ext.cli.main import main\n"
        "main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    checks = ("doctor", "check-dataset", "check-model")
    for command in (*checks, "train", "predict", "visualize", "benchmark"):
        assert command in done.stdout


def test_models_lists_and_filters(capsys):
    assert cli.main(["models", "nuclei_mask"]) == 0
    out = capsys.readouterr().out
    assert "MaskRCNN/nuclei_mask_rcnn_R_18_FPN" in out
    assert "R_50" not in out


def test_models_without_a_match(capsys):
    assert cli.main(["models", "no such"]) == 2
    assert "'no such'" in capsys.readouterr().err
