"""``instseg check-model``: it runs what the method brings, and its exit status says the rest."""

from __future__ import annotations

from dataclasses import replace

import cv2
import pytest

from instseg_ext.cli import common
from instseg_ext.cli import main as cli
from instseg_ext.method import CheckResult


@pytest.fixture
def pictures(tmp_path, picture):
    """Write two pictures of different sizes; return the names of the files."""
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, name in enumerate(names):
        cv2.imwrite(name, picture(height=60 + i))
    return names


@pytest.fixture
def checked(monkeypatch, use_blobs, blob_method):
    """Let a check be run by the command; what it was given comes back."""

    def install(**checks):
        method = replace(blob_method, checks=lambda cfg: checks)
        monkeypatch.setattr(common, "config_from_args", lambda args: (use_blobs, method))

    return install


def heights(wanted):
    """A check that passes if the model finds both objects in pictures of these heights."""

    def check(predictor, pictures):
        found = [(len(predictor(picture)), picture.shape[0]) for picture in pictures]
        passed = [height for count, height in found if count == 1] == wanted
        return CheckResult(passed, f"It saw {found}.")

    return check


def test_a_check_that_passes(checked, pictures, capsys):
    checked(**{"blob order": heights([60, 61])})
    assert cli.main(["check-model", "--input", *pictures]) == 0
    assert capsys.readouterr().out == "blob order: ok. It saw [(1, 60), (1, 61)].\n"


def test_every_check_is_run_and_one_that_fails_gives_status_1(checked, pictures, capsys):
    checked(first=heights([]), second=heights([60, 61]))
    assert cli.main(["check-model", "--input", *pictures]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("first: WRONG. It saw")
    assert second.startswith("second: ok.")


def test_pictures_that_decide_nothing_give_status_2(checked, pictures, capsys):
    def check(predictor, pictures):
        raise ValueError("Give more pictures.")

    checked(order=check)
    assert cli.main(["check-model", "--input", *pictures]) == 2
    assert "instseg: error: Give more pictures.\n" in capsys.readouterr().err


def test_keys_behind_the_pictures_are_overrides(checked, pictures, monkeypatch):
    checked(order=heights([60, 61]))
    seen = []
    config_from_args = common.config_from_args
    monkeypatch.setattr(
        common, "config_from_args", lambda args: seen.append(args.opts) or config_from_args(args)
    )
    assert cli.main(["check-model", "--input", *pictures, "MODEL.DEVICE", "cpu"]) == 0
    assert seen == [["MODEL.DEVICE", "cpu"]]


def test_a_method_without_checks_is_named(use_blobs, pictures, capsys):
    assert cli.main(["check-model", "--input", *pictures]) == 2
    assert "blobs has no checks" in capsys.readouterr().err


def test_an_untrained_model_is_refused(checked, use_blobs, pictures, capsys):
    checked(order=heights([60, 61]))
    use_blobs.MODEL.WEIGHTS = ""
    assert cli.main(["check-model", "--input", *pictures]) == 2
    assert "--weights is missing" in capsys.readouterr().err


def test_a_file_that_is_no_picture_is_named(checked, pictures, tmp_path, capsys):
    checked(order=heights([]))
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    assert cli.main(["check-model", "--input", *pictures, str(broken)]) == 2
    assert "broken.png" in capsys.readouterr().err
