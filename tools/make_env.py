"""Make, reuse or mend the project's Python environment. Standard library only.

``make env`` runs this with any Python >= 3.10. What it knows about an environment is in two files
inside it:

- ``instseg-owner``: written first; says that this script created the environment, so that it may
  also delete it. An environment without it belongs to the user: packages are added, nothing is
  pinned, a detectron2 in it stays as it is, and it is never deleted.
- ``instseg-stamp``: written last, atomically; holds a hash of everything the environment was made
  from. No stamp means an unfinished set-up, another hash an outdated one.

The file is kept readable for old Pythons, so that they get one sentence instead of a traceback.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWNER, STAMP = "instseg-owner", "instseg-stamp"
MINIMUM = (3, 10)

# detectron2 has no project of its own on the package index. The Python files of this wheel equal
# upstream's main branch of April 2024 (a59f0563). Its name carries cp310 for the sake of compiled
# operators, which we neither need nor unpack.
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


class SetupError(Exception):
    """A problem the user can mend; its text is one sentence that says how."""


# --- what an environment was made from ------------------------------------------------------------


def requirement_text(pyproject: str) -> str:
    """Return the tables of pyproject.toml that decide what is installed, dropping tool settings."""
    kept, keep = [], True
    for line in pyproject.splitlines():
        if line.startswith("["):
            keep = line.startswith(("[build-system]", "[project", "[tool.setuptools"))
        if keep and line.strip() and not line.lstrip().startswith("#"):
            kept.append(line.rstrip())
    return "\n".join(kept)


def fingerprint(root: Path, venv: Path, detectron2: str, extras: str) -> str:
    """Hash everything the content of an environment follows from.

    The two locations are part of it: scripts and the editable install hold absolute paths, so a
    moved checkout or environment is an outdated one.
    """
    parts = [
        "layout 1",
        "{}.{}".format(*sys.version_info),
        sys.platform,
        str(root),
        str(venv),
        detectron2 or WHEEL_SHA256,
        extras,
        (root / "constraints.txt").read_text(encoding="utf-8"),
        requirement_text((root / "pyproject.toml").read_text(encoding="utf-8")),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def python_of(venv: Path) -> Path:
    """Return the interpreter of an environment."""
    return venv / "bin" / "python"


def plan(venv: Path, wanted: str) -> str:
    """Decide what to do with an environment.

    Returns:
        ``reuse``: finished and up to date. ``update``: ours and finished once, from something else.
        ``create``: not there, or ours and never finished. ``adopt``: the user's own.

    Raises:
        SetupError: if the folder is something else than a Python environment.
    """
    if not venv.exists() or (venv.is_dir() and not any(venv.iterdir())):
        return "create"
    works = os.access(str(python_of(venv)), os.X_OK)
    stamp = read(venv / STAMP)
    if stamp == wanted and works:
        return "reuse"
    if (venv / OWNER).exists():
        return "update" if stamp and works else "create"
    if not works:
        raise SetupError(
            f"{venv} exists and is no Python environment: choose another place with VENV=..."
        )
    return "adopt"


def read(path: Path) -> str:
    """Return the text of a file, empty when there is none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader finds the whole of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(str(temporary), "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(str(temporary), str(path))


# --- making it ------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Report progress at once, also into a pipe."""
    sys.stdout.write("env: " + text + "\n")
    sys.stdout.flush()


def run(command: list, what: str) -> None:
    """Run a command of the set-up; its own output explains a failure."""
    # A neutral folder: a `tools` or `detectron2` beside the caller must not be imported by mistake.
    if subprocess.call([str(part) for part in command], cwd=tempfile.gettempdir()):
        raise SetupError(f"{what} failed (see above); `make env` starts again.")


def pip(venv: Path, *arguments: object) -> None:
    """Run the environment's pip."""
    quiet = ["--disable-pip-version-check", "-qq" if arguments[0] == "uninstall" else "-q"]
    run([python_of(venv), "-m", "pip", arguments[0], *quiet, *arguments[1:]], "pip " + arguments[0])


def remove(venv: Path) -> None:
    """Delete an environment of ours; an interruption leaves no half-deleted one in its place."""
    trash = venv.with_name(venv.name + ".old.instseg-env")
    if venv.exists():
        shutil.rmtree(str(trash), ignore_errors=True)
        os.replace(str(venv), str(trash))
    shutil.rmtree(str(trash), ignore_errors=True)


def create(venv: Path) -> None:
    """Make an empty environment, marked as ours before anything else is in it."""
    try:
        import ensurepip  # noqa: F401  (Debian ships venv without it)
        import venv as module
    except ImportError:
        raise SetupError(
            f"{sys.executable} cannot make environments: install its venv package (on Debian and "
            "Ubuntu `apt-get install python3-venv`)."
        ) from None
    remove(venv)
    venv.mkdir(parents=True, exist_ok=True)
    write_atomically(venv / OWNER, "made by tools/make_env.py, which may delete this environment")
    module.create(str(venv), with_pip=True, symlinks=True)


def has_detectron2(venv: Path) -> bool:
    """Tell whether the environment's Python finds a detectron2 package."""
    code = (
        "import importlib.util as u, sys; s = u.find_spec('detectron2'); "
        "sys.exit(s is None or s.origin is None)"
    )
    return subprocess.call([str(python_of(venv)), "-c", code], cwd=tempfile.gettempdir()) == 0


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the one we know."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise SetupError(
            f"{path.name} has sha256 {found}, not {expected}: it is not the file this project was "
            "tested with, so nothing of it was used (DETECTRON2=<pip spec> takes another source)."
        )


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Unpack the Python part of the detectron2 wheel, as pip would.

    Left out: the compiled operators (built for another Python and torch) and a top-level package
    ``tools``, whose name belongs to nobody. The list of installed files is cut accordingly, so
    that pip can uninstall the package.
    """
    with zipfile.ZipFile(str(wheel)) as archive:
        names = [name for name in archive.namelist() if is_python_part(name)]
        archive.extractall(str(site), names)
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        lines = archive.read(record).decode().splitlines()
    installed = [line for line in lines if is_python_part(line.split(",")[0])]
    info = (site / record).parent
    write_atomically(info / "INSTALLER", "pip")
    installed.append(f"{info.name}/INSTALLER,,")
    write_atomically(site / record, "\n".join(installed))


def is_python_part(name: str) -> bool:
    """Tell whether a member of the detectron2 wheel is to be unpacked."""
    top = name.split("/")[0]
    ours = top == "detectron2" or top.endswith(".dist-info")
    return ours and not name.endswith((".so", ".pyd"))


def install_detectron2(venv: Path, spec: str, owned: bool) -> None:
    """Put detectron2 into the environment: the pinned wheel, or what the user asked for."""
    if owned and has_detectron2(venv):
        for name in ("detectron2", "sal-detectron2"):
            pip(venv, "uninstall", "-y", name)
    if spec:
        say(f"installing detectron2 from {spec}")
        pip(venv, "install", "--no-build-isolation", "--no-deps", "--force-reinstall", spec)
        return
    if has_detectron2(venv):
        say("using the detectron2 that is already there")
        return
    site = subprocess.check_output(
        [str(python_of(venv)), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = ["--no-deps", "--only-binary=:all:", "--python-version", "3.10"]
        pip(venv, "download", *binary, "--dest", folder, WHEEL)
        wheel = next(Path(folder).glob("*.whl"))
        check_sha256(wheel, WHEEL_SHA256)
        unpack_wheel(wheel, Path(site.decode().strip()))


def fill(venv: Path, detectron2: str, extras: str, owned: bool) -> None:
    """Install the requirements, this checkout and detectron2, and see that they work together."""
    pinned = ["-c", ROOT / "constraints.txt"] if owned else []
    say("installing packages (torch is large: a few minutes)")
    # Building with the pinned setuptools, not in isolated folders: same result every day, and no
    # download per source package. Compiling what is imported is left to the first import.
    pip(venv, "install", *pinned, "setuptools>=77", "wheel")
    target = f"{ROOT}[{extras}]" if extras else str(ROOT)
    pip(venv, "install", *pinned, "--no-build-isolation", "--no-compile", "-e", target)
    install_detectron2(venv, detectron2, owned)
    check = (
        "import sys\nfrom instseg_ext import compat\n"
        "try: compat.require_detectron2(); compat.opencv()\n"
        "except ImportError as error: sys.exit(f'env: {error}')"
    )
    run([python_of(venv), "-W", "ignore", "-c", check], "the check of the finished environment")


@contextlib.contextmanager
def locked(venv: Path):
    """Keep a second set-up of the same environment waiting until this one has ended."""
    import fcntl

    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(str(venv.with_name(venv.name + ".lock")), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure(venv: Path, detectron2: str = "", extras: str = "dev") -> str:
    """Bring an environment into the wanted state, doing nothing when it is in it.

    Returns:
        What was done: see :func:`plan`.
    """
    wanted = fingerprint(ROOT, venv, detectron2, extras)
    if plan(venv, wanted) == "reuse":
        return "reuse"
    with locked(venv):
        action = plan(venv, wanted)  # again: another process may have finished it meanwhile
        if action == "reuse":
            return action
        start = time.time()
        say(f"{action} {venv}")
        with contextlib.suppress(FileNotFoundError):
            (venv / STAMP).unlink()
        if action == "create":
            create(venv)
        fill(venv, detectron2, extras, owned=(venv / OWNER).exists())
        write_atomically(venv / STAMP, wanted)
        say(f"ready in {time.time() - start:.0f} s")
        return action


def main() -> int:
    """Run the command line."""
    if sys.version_info < MINIMUM:
        sys.stderr.write(
            "env: Python {}.{} is too old: 3.10 or newer is needed (make PYTHON=python3.11 ...).\n"
            "".format(*sys.version_info)
        )
        return 1
    parser = argparse.ArgumentParser(description="Make, reuse or mend the Python environment.")
    parser.add_argument("--venv", default=".venv", help="folder of the environment (.venv)")
    parser.add_argument("--detectron2", default="", help="pip spec of another detectron2")
    parser.add_argument("--extras", default="dev", help="extras of the package to install (dev)")
    arguments = parser.parse_args()
    # Not resolve(): the interpreter of an environment may be found through a link.
    venv = Path(os.path.abspath(os.path.expanduser(arguments.venv)))
    try:
        ensure(venv, arguments.detectron2.strip(), arguments.extras.strip())
    except SetupError as error:
        sys.stderr.write(f"env: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("env: interrupted; the next `make env` starts again.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
