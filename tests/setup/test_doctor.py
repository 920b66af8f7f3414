"""``instseg doctor`` describes what is there, survives what is broken, and judges it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from instseg_ext import compat, doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def forget_checks():
    """The checks remember success; each test here breaks something else."""
    compat.require_detectron2.cache_clear()
    compat.require_torchvision_ops.cache_clear()
    yield
    compat.require_detectron2.cache_clear()
    compat.require_torchvision_ops.cache_clear()


def finding(name):
    return next(found for found in doctor.diagnose() if found.name == name)


def test_a_usable_environment(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    for part in ("Python", "torch", "CUDA", "torchvision", "detectron2", "OpenCV", "pycocotools"):
        assert f"ok  {part} " in out
    assert "nms, roi_align, deform_conv2d work" in out
    assert "compiled operators:" in out
    assert "can run here" in out
    assert len(out.splitlines()) <= 40
    assert max(map(len, out.splitlines())) <= 120


def test_as_a_module_without_torch_and_detectron2():
    code = "import sys, runpy; sys.modules.update(torch=None, detectron2=None)\n"
    code += "runpy.run_module('instseg_ext.doctor', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "FAIL  torch " in result.stdout
    assert "FAIL  detectron2" in result.stdout
    assert "detectron2 is not installed" in " ".join(result.stdout.split())
    assert "cannot run here" in result.stdout


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("torch", "torch"),
        ("torchvision", "torchvision"),
        ("detectron2", "detectron2"),
        ("cv2", "OpenCV"),
        ("numpy", "numpy"),
        ("PIL", "Pillow"),
        ("pycocotools", "pycocotools"),
        ("faster_coco_eval", "faster-coco-eval"),
    ],
)
def test_each_missing_part_is_fatal(monkeypatch, capsys, module, part):
    monkeypatch.setitem(sys.modules, module, None)
    assert doctor.main() == 1
    out = capsys.readouterr().out
    assert f"FAIL  {part} " in out
    assert "install" in out.partition(f"- {part}: ")[2]


def test_an_operator_that_does_not_run(monkeypatch):
    import torchvision

    def refuse(*args, **kwargs):
        raise RuntimeError("Couldn't load custom C++ ops. This can happen if ...")

    monkeypatch.setattr(torchvision.ops, "deform_conv2d", refuse)
    found = finding("torchvision")
    assert found.fatal
    assert found.problem.startswith("Couldn't load custom C++ ops")
    assert "install the torchvision that belongs to this torch" in found.problem


def test_an_operator_with_wrong_results(monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.ops, "roi_align", lambda *args, **kwargs: torch.zeros(1))
    assert "wrong results" in finding("torchvision").problem


def test_broken_compiled_operators_are_a_note(monkeypatch):
    monkeypatch.setattr(compat, "detectron2_ops", lambda: "broken")
    found = finding("detectron2")
    assert not found.fatal
    assert "do not load with this torch" in found.problem


def test_missing_system_library_names_the_headless_package(monkeypatch):
    def broken():
        raise ImportError("OpenCV does not load (libGL.so.1): pip install opencv-python-headless")

    monkeypatch.setattr(compat, "opencv", broken)
    found = finding("OpenCV")
    assert found.fatal
    assert "opencv-python-headless" in found.problem


def test_a_gpu_that_does_not_compute_is_a_note(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old card")

    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available\nmore")

    monkeypatch.setattr(torch, "ones", refuse)
    found = doctor._check_cuda()
    assert "Old card" in found.text
    assert not found.fatal
    assert "no kernel image is available" in found.problem
    assert "MODEL.DEVICE cpu" in found.problem


def test_missing_files_are_fatal(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(doctor.resources, "root", lambda: tmp_path)
    found = finding("files")
    assert found.fatal
    assert found.problem.startswith("projects, datasets missing there")


def test_missing_optional_packages_are_a_note(monkeypatch):
    """Also a part of a package, with and without the package itself."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    found = doctor._check_optional()
    assert not found.fatal
    assert "reading .caffemodel files of Caffe, reading .mat files of SBD" in found.problem
    assert re.search(r"`pip install .*\bprotobuf scipy\b", found.problem)
    monkeypatch.setattr(doctor, "_OPTIONAL", (("no_such_package.part", "part", "parts"),))
    assert doctor._check_optional().problem.startswith("no parts; for these `pip install part`")


def test_the_same_cause_is_told_once():
    findings = [
        doctor.Finding("a", "x", "one cause.", fatal=True),
        doctor.Finding("b", "y", "one cause.", fatal=True),
    ]
    assert doctor.report(findings).count("one cause.") == 1


def test_the_command():
    from instseg_ext.cli.main import main

    assert main(["doctor"]) == 0
