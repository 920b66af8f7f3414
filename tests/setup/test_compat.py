"""Broken environments end in one clear sentence. Each is acted out in a fresh Python."""

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from instseg_ext import compat, resources

ROOT = Path(__file__).resolve().parents[2]


def python(code, *, path=(), **environment):
    """Run code with fake packages in front of the real ones; return its last line of output."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def message_of(call, *, path=(), setup="", torch=True):
    """The error of a check; ``torch=False`` saves importing torch where it plays no part."""
    skip = "" if torch else "compat.require_torchvision_ops = lambda: None"
    return python(
        f"{setup}\nfrom instseg_ext import compat\n{skip}\n"
        f"try: compat.{call}\nexcept ImportError as error: print(error)",
        path=path,
    )


def package(folder, name, **files):
    """Write a package; keyword names are file names, with ``__`` for a folder separator."""
    for file, text in {"__init__": "", **files}.items():
        target = folder / name / (file if file == "__init__" else file.replace("__", "/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".py").write_text(text)
    return folder


@pytest.fixture
def release06(tmp_path):
    """The part of the 0.6 release that tells it from the main branch."""
    use = "from PIL import Image\ndef resize(interp=Image.LINEAR): pass\n"
    return package(tmp_path / "d2", "detectron2", data__transforms__transform=use)


# --- detectron2 ---------------------------------------------------------------------------------


def test_no_detectron2():
    text = message_of("require_detectron2()", setup="import sys; sys.modules['detectron2'] = None")
    assert text.startswith("detectron2 is not installed: run `make env`")
    assert len(text.splitlines()) == 1


def test_without_detectron2_the_package_imports_and_says_what_to_do():
    out = python(
        "import sys; sys.modules['detectron2'] = None\nimport instseg_ext\n"
        "try: instseg_ext.get_config('x')\nexcept ImportError as error: print(error)"
    )
    assert "detectron2 is not installed" in out
    assert "pip install --no-build-isolation" in out


def test_a_folder_that_happens_to_be_called_detectron2(tmp_path):
    (tmp_path / "detectron2").mkdir()
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    text = python(
        f"{code}from instseg_ext import compat; print(compat.detectron2_origin())",
        path=[tmp_path],
    )
    assert text == "not installed"


def test_release_06_on_new_pillow(release06):
    text = message_of("require_detectron2()", path=[release06])
    assert "is the 0.6 release (or older), which does not work with Pillow" in text
    assert str(release06 / "detectron2") in text
    assert "pip install" in text
    assert len(text.splitlines()) == 1


def test_release_06_on_numpy_without_bool(release06):
    setup = "import PIL.Image, numpy\nPIL.Image.LINEAR = 2\ndel numpy.bool\n"
    text = message_of("require_detectron2()", path=[release06], setup=setup)
    assert "does not work with numpy" in text


def test_release_06_with_old_libraries_is_not_refused_for_its_age(release06):
    setup = "import PIL.Image\nPIL.Image.LINEAR = 2\n"
    text = message_of("require_detectron2()", path=[release06], setup=setup, torch=False)
    assert "0.6 release" not in text  # it goes on to the import, which this stand-in fails
    assert "cannot be imported" in text


def test_detectron2_with_a_missing_requirement(tmp_path):
    package(tmp_path, "detectron2", layers="import a_package_nobody_has\n")
    text = message_of("require_detectron2()", path=[tmp_path], torch=False)
    assert "cannot be imported (No module named 'a_package_nobody_has')" in text
    assert len(text.splitlines()) == 1


def test_origin_names_folder_and_kind(release06):
    code = "from instseg_ext import compat; print(compat.detectron2_origin())"
    text = python(code, path=[release06])
    assert f"in {release06 / 'detectron2'} (0.6 release or older)" in text
    assert "(main branch)" in python(code) or "0.6 release" in python(code)


def test_operators_that_do_not_load_are_told_from_absent_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "require_detectron2", lambda: None)
    monkeypatch.setattr(compat, "_detectron2_folder", lambda: tmp_path)
    if hasattr(torch.ops.detectron2, "nms_rotated"):
        assert compat.detectron2_ops() == "loaded"
        assert compat.has_detectron2_ops()
        return
    assert compat.detectron2_ops() == "absent"
    (tmp_path / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_text("")
    assert compat.detectron2_ops() == "broken"
    assert not compat.has_detectron2_ops()


# --- torch and torchvision ----------------------------------------------------------------------


def test_the_environment_of_the_tests_is_usable():
    compat.require_torchvision_ops()
    compat.require_detectron2()


def test_no_torch():
    text = message_of("require_torchvision_ops()", setup="import sys; sys.modules['torch'] = None")
    assert text.startswith("torch cannot be imported")
    assert "install torch >= 2.6" in text


def test_old_torch(tmp_path):
    package(tmp_path, "torch", __init__="__version__ = '2.5.1'")
    assert "torch 2.5.1 is too old" in message_of("require_torchvision_ops()", path=[tmp_path])


def test_no_torchvision(tmp_path):
    package(tmp_path, "torch", __init__="__version__ = '2.10.0+cpu'")
    setup = "import sys; sys.modules['torchvision'] = None"
    text = message_of("require_torchvision_ops()", path=[tmp_path], setup=setup)
    assert text.startswith("torchvision is not installed: install the torchvision release that")


def test_torchvision_that_does_not_fit_torch(tmp_path):
    # What torchvision raises when its library was built for another torch.
    package(tmp_path, "torchvision", __init__="raise RuntimeError('operator nms does not exist')")
    package(tmp_path, "torch", __init__="__version__ = '2.10.0+cpu'")
    text = message_of("require_detectron2()", path=[tmp_path])
    assert text.startswith("torchvision's compiled operators do not load (operator nms does not")
    assert "belongs to torch 2.10.0" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(enabled):
    a = torch.ones(4, 4)
    outer = compat.autocast("cpu", torch.bfloat16, enabled=True)
    with outer, compat.autocast("cpu", torch.bfloat16, enabled=enabled):
        assert (a @ a).dtype == (torch.bfloat16 if enabled else torch.float32)
    with compat.autocast("meta", torch.bfloat16, enabled=enabled):
        assert (a.to("meta") @ a.to("meta")).dtype == torch.float32


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_scaler(enabled):
    scaler = compat.grad_scaler("cpu", enabled)
    assert scaler.is_enabled() is enabled
    assert (scaler.scale(torch.ones(())) > 1).item() is enabled


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"TORCHELASTIC_RUN_ID": "none"}, True),
    ],
)
def test_under_torchrun(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compat.under_torchrun() is expected


# --- OpenCV -------------------------------------------------------------------------------------


def test_no_opencv():
    text = message_of("opencv()", setup="import sys; sys.modules['cv2'] = None")
    assert "OpenCV is not installed: `pip install opencv-python`" in text


def test_opencv_without_its_system_libraries(tmp_path):
    reason = "libGL.so.1: cannot open shared object file: No such file or directory"
    package(tmp_path, "cv2", __init__=f"raise ImportError('{reason}')")
    text = message_of("opencv()", path=[tmp_path])
    assert "libGL.so.1" in text
    assert "pip install opencv-python-headless" in text


@pytest.mark.parametrize(
    ("gui", "display", "expected"),
    [("QT5", ":0", True), ("NONE", ":0", False), ("QT5", "", False)],
)
def test_has_gui(monkeypatch, gui, display, expected):
    class Module:
        @staticmethod
        def getBuildInformation():
            return f"General\n  GUI:                           {gui}\n    GTK+:   NO\n"

    monkeypatch.setattr(compat, "opencv", lambda: Module)
    monkeypatch.setattr(compat.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", display)
    assert compat.has_gui() is expected


def test_find_contours():
    mask = np.zeros((10, 12), dtype=bool)
    mask[2:6, 3:8] = True
    mask[3:5, 5:6] = False
    mask[9, 11] = True
    before = mask.copy()
    contours = compat.find_contours(mask)
    assert np.array_equal(mask, before)
    assert all(c.dtype == np.int32 and c.ndim == 2 and c.shape[1] == 2 for c in contours)
    assert sorted(len(c) for c in contours) == [1, 14]
    points = {tuple(point) for contour in contours for point in contour.tolist()}
    border = {(x, y) for y in range(2, 6) for x in range(3, 8) if x in (3, 7) or y in (2, 5)}
    assert points == border | {(11, 9)}
    corners = max(compat.find_contours(mask, simplify=True), key=len)
    assert {tuple(point) for point in corners.tolist()} == {(3, 2), (3, 5), (7, 5), (7, 2)}
    assert len(compat.find_contours(mask, external=False)) == 3
    assert compat.find_contours(np.zeros((4, 4), dtype=np.uint8)) == []


# --- calls and files ----------------------------------------------------------------------------


def test_call_supported():
    def new(a, *, b=1, c=2):
        return a, b, c

    def any_keyword(a, **others):
        return a, others

    assert compat.call_supported(new, 0, b=5, gone=7) == (0, 5, 2)
    assert compat.call_supported(any_keyword, 0, kept=7) == (0, {"kept": 7})
    assert compat.call_supported(max, [1, 3]) == 3
    with pytest.raises(TypeError):
        compat.call_supported(new)


def test_root_is_the_checkout_when_there_is_one(tmp_path, monkeypatch):
    assert resources.root() == ROOT
    module = tmp_path / "instseg_ext" / "resources.py"
    monkeypatch.setattr(resources, "__file__", str(module))
    assert resources.root() == tmp_path / "instseg_ext" / "shipped"
    (tmp_path / "projects").mkdir()  # a package of that name in site-packages is no checkout
    assert resources.root() == tmp_path / "instseg_ext" / "shipped"
    (tmp_path / "pyproject.toml").write_text("")
    assert resources.root() == tmp_path
