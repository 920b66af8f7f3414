"""Start test scripts in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOY_TRAIN = str(Path(__file__).with_name("toy_train.py"))


def environment(**more):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    paths = [str(ROOT), str(ROOT / "tests")]
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    return {**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def start(*command, own_group=False, **env):
    """Start ``python command...`` with its output in a pipe.

    With ``own_group`` it and all processes that it starts can be killed by ``os.killpg``.
    """
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=own_group,
    )


def finish(*command, ok=True, **env):
    """Run ``python command...`` to its end and return its output."""
    process = start(*command, **env)
    output = process.communicate(timeout=600)[0]
    assert (process.returncode == 0) == ok, output
    return output
