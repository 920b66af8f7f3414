"""``pip install .`` into somebody's environment ships the configs and the bundled data."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("configs", "projects", "datasets")
KINDS = (".yaml", ".yml", ".png", ".json", ".md")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package installed from a copy of the checkout, so that building leaves nothing in it."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in ("instseg_ext", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    site = folder / "site"
    command = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", site]
    result = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, command), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return site


def test_all_files_are_shipped_side_by_side(installed):
    shipped = installed / "instseg_ext" / "shipped"
    for folder in FOLDERS:
        ours = {
            path.relative_to(ROOT)
            for path in (ROOT / folder).rglob("*")
            if path.suffix in KINDS and "__pycache__" not in path.parts
        }
        missing = [str(path) for path in ours if not (shipped / path).is_file()]
        assert not missing
        if folder == "configs":
            assert ours


def test_all_modules_are_shipped(installed):
    ours = {path.relative_to(ROOT) for path in (ROOT / "instseg_ext").rglob("*.py")}
    assert not [str(path) for path in ours if not (installed / path).is_file()]


def test_the_installed_package_finds_its_configs(installed, tmp_path):
    configs = sorted((ROOT / "projects").glob("*/configs/*.yaml"))
    name = f"{configs[0].parent.parent.name}/{configs[0].stem}"
    code = (
        "import instseg_ext, os\n"
        "from instseg_ext import resources\n"
        f"cfg = instseg_ext.get_config({name!r})\n"
        "print(instseg_ext.__file__, resources.root(), cfg.MODEL.META_ARCHITECTURE, sep=os.linesep)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-P", "-c", code]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    file, root, architecture = result.stdout.strip().splitlines()[-3:]
    assert Path(file).is_relative_to(installed)
    assert Path(root) == installed / "instseg_ext" / "shipped"
    assert architecture
