"""Whose files lie in an output folder, and whether a run may go on with them."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from instseg_ext.checkpoint import read_metadata

__all__ = [
    "ALTERNATING_RECORD",
    "check_output_dir",
    "check_resume",
    "last_checkpoint",
    "periodic_checkpoints",
]

logger = logging.getLogger(__name__)

# What an alternating training has finished; no other run can go on in its folder.
ALTERNATING_RECORD = "alternating.json"

_PERIODIC = re.compile(r"model_\d{7}\.pth")
_BEST = "model_best.pth"
_CHECKPOINTS = ("last_checkpoint", "model_final.pth", _BEST)
# What one run writes and a run that replaces it must not append to.
_RUN_FILES = ("metrics.json", "results.json", "config.yaml", ALTERNATING_RECORD)
# Keys of MODEL that say where and from what, not what.
_FREE_KEYS = frozenset({"MODEL.WEIGHTS", "MODEL.DEVICE"})
# Keys outside MODEL without which the optimiser's state has another form.
_BOUND_KEYS = frozenset({"INSTSEG.OPTIMIZER"})


def periodic_checkpoints(output_dir: str) -> list[Path]:
    """Return the periodic checkpoints of a folder, oldest first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if _PERIODIC.fullmatch(f.name))


def last_checkpoint(output_dir: str) -> Path | None:
    """Return the checkpoint a run would resume from, or None.

    Raises:
        FileNotFoundError: if ``last_checkpoint`` names a file that is gone.
    """
    pointer = Path(output_dir) / "last_checkpoint"
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text().strip()
    if not path.is_file():
        raise FileNotFoundError(
            f"{pointer} names {path.name}, which does not exist: write the name of an existing "
            "checkpoint into it, or pass --overwrite to start anew."
        )
    return path


def check_output_dir(
    output_dir: str, resume: bool, overwrite: bool, cfg: CfgNode | None = None
) -> None:
    """Refuse to train into a folder that holds another run, unless told what to do with it.

    Call it before any long work, in the main process. With ``overwrite`` the checkpoints, metrics
    and results of the other run are deleted here, so that nothing of it is taken for the new one.
    Of an alternating training that is the joined model and the record; its steps' folders stay.

    Args:
        output_dir: may not exist yet.
        resume: go on with the run in the folder (start one if there is none).
        overwrite: replace it.
        cfg: with ``resume``, the config to compare with the one in the checkpoint.

    Raises:
        ValueError: if ``resume`` and ``overwrite`` are both given, or ``cfg`` describes another
            model.
        FileExistsError: if the folder holds another run and neither is given, or with ``resume`` if
            nothing in it says where that run can be gone on with.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite replaces it: give only one.")
    folder = Path(output_dir)
    found = [folder / name for name in _CHECKPOINTS if (folder / name).is_file()]
    found += periodic_checkpoints(output_dir)
    if overwrite:
        _clear(folder, found)
        return
    if resume:
        last = last_checkpoint(output_dir)
        if last is None:
            _require_unfinished(folder, found)
            logger.info("Nothing to resume in %s: starting from the beginning.", output_dir)
        elif cfg is not None:
            check_resume(cfg, str(last))
        return
    found += [path for path in (folder / ALTERNATING_RECORD,) if path.is_file()]
    if found:
        raise FileExistsError(
            f"{output_dir} holds another run ({found[0].name}): pass --resume to go on with it, "
            "--overwrite to replace it, or choose another OUTPUT_DIR."
        )


def _require_unfinished(folder: Path, found: list[Path]) -> None:
    """Refuse to start anew over checkpoints that a run without ``last_checkpoint`` has left."""
    remedy = "pass --overwrite to replace it, or choose another OUTPUT_DIR."
    if (folder / ALTERNATING_RECORD).is_file():
        raise FileExistsError(
            f"{folder} holds a run of train-alternating ({ALTERNATING_RECORD}), which only "
            f"train-alternating can go on with: {remedy}"
        )
    # The best weights alone are left by a run that was killed before its first checkpoint.
    kept = [path.name for path in found if path.name != _BEST]
    if kept:
        raise FileExistsError(
            f"{folder} holds {kept[0]}, but no file last_checkpoint: write into it the name of "
            f"the checkpoint to go on with, {remedy}"
        )


def _clear(folder: Path, checkpoints: list[Path]) -> None:
    """Delete what a run of ours writes, and nothing else."""
    if not folder.is_dir():
        return
    others = [folder / name for name in _RUN_FILES if (folder / name).is_file()]
    for path in [*checkpoints, *others, *folder.glob("events.out.tfevents.*")]:
        path.unlink(missing_ok=True)
    if (folder / "results").is_dir():
        shutil.rmtree(folder / "results")
    if checkpoints:
        logger.info(
            "Deleted the %d checkpoints of the earlier run in %s.", len(checkpoints), folder
        )


def check_resume(cfg: CfgNode, checkpoint: str) -> None:
    """Compare a config with the one a checkpoint was made with.

    Args:
        cfg: config of the run that wants to go on.
        checkpoint: file to resume from. One without a stored config is not judged.

    Raises:
        ValueError: naming the keys, if the model, its classes or the optimiser differ.
    """
    metadata = read_metadata(checkpoint)
    if "config" not in metadata:
        return
    saved = _flatten(yaml.safe_load(metadata["config"]))
    present = _flatten(yaml.safe_load(cfg.dump()))
    # A key that only one of them has came or went with a release: its default is what was used.
    changed = {
        key: (saved[key], present[key])
        for key in sorted(saved.keys() & present.keys())
        if saved[key] != present[key]
    }
    bound = [
        key
        for key in changed
        if key in _BOUND_KEYS or (key.startswith("MODEL.") and key not in _FREE_KEYS)
    ]
    if _names_differ(metadata.get("class_names"), list(cfg.INSTSEG.CLASS_NAMES)):
        bound.append("INSTSEG.CLASS_NAMES")
        changed["INSTSEG.CLASS_NAMES"] = (metadata["class_names"], list(cfg.INSTSEG.CLASS_NAMES))
    if bound:
        listed = "; ".join(f"{k} was {changed[k][0]!r}, is {changed[k][1]!r}" for k in bound[:5])
        more = f"; and {len(bound) - 5} more" if len(bound) > 5 else ""
        raise ValueError(
            f"cannot resume from {checkpoint}, which belongs to another model: {listed}{more}. "
            "Restore these keys, or start in another OUTPUT_DIR with MODEL.WEIGHTS."
        )
    free = [key for key in changed if key not in _FREE_KEYS and key not in ("OUTPUT_DIR", "SEED")]
    if free:
        logger.info("Resuming with changed settings: %s.", ", ".join(free))


def _names_differ(saved: list[str] | None, present: list[str]) -> bool:
    return bool(saved) and bool(present) and list(saved) != present


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
