"""The set-up script: an environment is reused only when it is finished and current."""

import hashlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("make_env", ROOT / "tools" / "make_env.py")
make_env = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_env)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose set-up makes a stand-in for an environment in no time."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "constraints.txt").write_text("numpy==2.0\n")
    (root / "pyproject.toml").write_text('[project]\nname = "x"\n[tool.ruff]\nline-length = 100\n')
    monkeypatch.setattr(make_env, "ROOT", root)
    monkeypatch.setattr(make_env, "create", fake_create)
    monkeypatch.setattr(make_env, "fill", lambda *args, **kwargs: None)
    return root


def fake_create(venv):
    make_env.remove(venv)
    (venv / "bin").mkdir(parents=True)
    make_env.write_atomically(venv / make_env.OWNER, "ours")
    (venv / "bin" / "python").symlink_to(sys.executable)


def test_made_once_then_reused(checkout, tmp_path, monkeypatch):
    venv = tmp_path / "env"
    assert make_env.ensure(venv) == "create"
    monkeypatch.setattr(make_env, "fill", None)  # would fail if called
    assert make_env.ensure(venv) == "reuse"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("constraints.txt", "numpy==2.1\n"),
        ("pyproject.toml", '[project]\nname = "x"\ndependencies = ["torch"]\n'),
    ],
)
def test_changed_requirements_update_it(checkout, tmp_path, file, text):
    venv = tmp_path / "env"
    make_env.ensure(venv)
    (checkout / file).write_text(text)
    assert make_env.ensure(venv) == "update"
    assert make_env.ensure(venv) == "reuse"


def test_another_detectron2_or_place_updates_it(checkout, tmp_path):
    venv = tmp_path / "env"
    make_env.ensure(venv)
    assert make_env.ensure(venv, detectron2="git+https://example.org/d2") == "update"
    moved = tmp_path / "moved"
    venv.rename(moved)
    assert make_env.ensure(moved, detectron2="git+https://example.org/d2") == "update"


def test_tool_settings_do_not_count(checkout, tmp_path):
    venv = tmp_path / "env"
    make_env.ensure(venv)
    (checkout / "pyproject.toml").write_text(
        '# a comment\n[project]\nname = "x"\n\n[tool.ruff]\nline-length = 80\n'
    )
    assert make_env.ensure(venv) == "reuse"


def test_an_interrupted_set_up_starts_again(checkout, tmp_path, monkeypatch):
    venv = tmp_path / "env"

    def stop(*args, **kwargs):
        (venv / "half").write_text("installed")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_env, "fill", stop)
        with pytest.raises(KeyboardInterrupt):
            make_env.ensure(venv)
    assert (venv / "half").exists()
    assert make_env.ensure(venv) == "create"
    assert not (venv / "half").exists()


def test_an_interrupted_update_starts_again(checkout, tmp_path, monkeypatch):
    venv = tmp_path / "env"
    make_env.ensure(venv)
    (checkout / "constraints.txt").write_text("numpy==2.1\n")

    def fail(*args, **kwargs):
        raise make_env.SetupError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(make_env, "fill", fail)
        with pytest.raises(make_env.SetupError, match="no network"):
            make_env.ensure(venv)
    # The old requirements come back: what they made is no longer complete.
    (checkout / "constraints.txt").write_text("numpy==2.0\n")
    assert make_env.ensure(venv) == "create"


def killed_set_up(root, venv):
    make_env.ROOT, make_env.create = root, fake_create
    make_env.fill = lambda *args, **kwargs: os.kill(os.getpid(), 9)
    make_env.ensure(venv)


def test_a_killed_set_up_is_not_taken_for_finished(checkout, tmp_path):
    venv = tmp_path / "env"
    process = multiprocessing.get_context("fork").Process(
        target=killed_set_up, args=(checkout, venv)
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    assert (venv / make_env.OWNER).exists()
    assert make_env.plan(venv, make_env.fingerprint(checkout, venv, "", "dev")) == "create"
    assert make_env.ensure(venv) == "create"  # the lock of the dead process is gone too


def test_a_users_environment_is_filled_but_never_deleted(checkout, tmp_path, monkeypatch):
    venv = tmp_path / "env"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "theirs").write_text("keep")
    owned = []
    monkeypatch.setattr(make_env, "fill", lambda *args, **kwargs: owned.append(kwargs["owned"]))
    assert make_env.ensure(venv) == "adopt"
    (checkout / "constraints.txt").write_text("numpy==2.1\n")
    assert make_env.ensure(venv) == "adopt"
    assert make_env.ensure(venv) == "reuse"
    assert owned == [False, False]
    assert (venv / "theirs").read_text() == "keep"


def test_a_folder_of_something_else_is_refused(checkout, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.png").write_bytes(b"")
    with pytest.raises(make_env.SetupError, match="photos exists and is no Python environment"):
        make_env.ensure(folder)
    assert (folder / "cat.png").exists()


def test_an_environment_whose_python_is_gone_is_made_again(checkout, tmp_path):
    venv = tmp_path / "env"
    make_env.ensure(venv)
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to(tmp_path / "uninstalled")
    assert make_env.ensure(venv) == "create"


def test_removing_leaves_nothing_half_deleted_in_place(checkout, tmp_path, monkeypatch):
    venv = tmp_path / "env"
    make_env.ensure(venv)
    monkeypatch.setattr(make_env.shutil, "rmtree", lambda *args, **kwargs: None)  # "killed" here
    make_env.remove(venv)
    assert not venv.exists()
    assert make_env.plan(venv, "anything") == "create"


@pytest.mark.parametrize("present", [True, False])
def test_a_detectron2_that_is_there_is_used(tmp_path, monkeypatch, present):
    calls = []
    monkeypatch.setattr(make_env, "has_detectron2", lambda venv: present)
    monkeypatch.setattr(make_env, "unpack_wheel", lambda *args: calls.append("unpack"))
    monkeypatch.setattr(make_env, "check_sha256", lambda *args: None)

    def pip(venv, *arguments):
        calls.append(arguments[0])
        Path(arguments[arguments.index("--dest") + 1], "x.whl").write_bytes(b"")

    monkeypatch.setattr(make_env, "pip", pip)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    make_env.install_detectron2(tmp_path, "", owned=False)
    assert calls == ([] if present else ["download", "unpack"])


def test_a_spec_replaces_ours_and_builds_without_isolation(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(make_env, "has_detectron2", lambda venv: True)
    monkeypatch.setattr(make_env, "pip", lambda venv, *arguments: calls.append(arguments))
    make_env.install_detectron2(tmp_path, "git+https://example.org/d2", owned=True)
    assert [call[0] for call in calls] == ["uninstall", "uninstall", "install"]
    assert {"--no-build-isolation", "--no-deps", "git+https://example.org/d2"} <= set(calls[-1])


def test_a_changed_wheel_is_refused(tmp_path):
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"something else")
    with pytest.raises(make_env.SetupError, match="nothing of it was used"):
        make_env.check_sha256(wheel, make_env.WHEEL_SHA256)
    make_env.check_sha256(wheel, hashlib.sha256(b"something else").hexdigest())


def test_only_the_python_part_of_the_wheel_is_unpacked(tmp_path):
    info = "sal_detectron2-0.7.2.dist-info"
    members = {
        "detectron2/__init__.py": "",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled",
        "tools/train_net.py": "",
        f"{info}/METADATA": "Name: sal-detectron2\nVersion: 0.7.2\n",
        f"{info}/WHEEL": "",
    }
    record = "".join(f"{name},,\n" for name in [*members, f"{info}/RECORD"])
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**members, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    site = tmp_path / "site"
    make_env.unpack_wheel(wheel, site)
    found = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert found == {
        "detectron2/__init__.py",
        *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "INSTALLER")),
    }
    listed = {line.split(",")[0] for line in (site / info / "RECORD").read_text().splitlines()}
    assert listed == found


def test_an_old_python_gets_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(make_env.sys, "version_info", (3, 8, 1, "final", 0))
    assert make_env.main() == 1
    error = capsys.readouterr().err
    assert "Python 3.8 is too old" in error
    assert len(error.splitlines()) == 1


def test_a_python_without_ensurepip_gets_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(make_env.SetupError, match="python3-venv"):
        make_env.create(tmp_path / "env")
    assert not (tmp_path / "env").exists()


def test_every_requirement_is_pinned():
    """Each declared package, whatever the Python, has exactly one version in constraints.txt."""
    from packaging.requirements import Requirement

    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pyproject = (ROOT / "pyproject.toml").read_text()
    block = pyproject.partition("dependencies = [")[2].partition("\n]")[0]
    block += pyproject.partition("dev = [")[2].partition("\n]")[0]
    declared = [
        Requirement(line.strip().strip('",'))
        for line in block.splitlines()
        if line.strip().startswith('"')
    ]
    assert len(declared) > 20
    for requirement in declared:
        for python in ("3.10", "3.11", "3.13"):
            versions = [
                next(iter(pin.specifier)).version
                for pin in pins
                if pin.name == requirement.name.lower()
                and (pin.marker is None or pin.marker.evaluate({"python_version": python}))
            ]
            assert len(versions) == 1, (requirement.name, python, versions)
            assert requirement.specifier.contains(versions[0], prereleases=True), requirement


def test_make_lists_its_targets():
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("env", "demo", "test", "test-slow", "lint", "bench", "nuclei-table", "clean"):
        assert f"make {target} " in out.stdout
