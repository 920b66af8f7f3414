"""What an alternating training has finished, and whether its folder may be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode

from instseg_ext.checkpoint import atomic_write, sha256_of
from instseg_ext.engine.alternating_plan import (
    FINAL,
    STEPS,
    Step,
    check_two_stage,
    plan_steps,
    proposal_files,
    unfinished_files,
)
from instseg_ext.engine.outputs import (
    ALTERNATING_RECORD,
    check_output_dir,
    check_resume,
    last_checkpoint,
)

__all__ = ["FinishedStep", "Record", "check_alternating"]


@dataclass(frozen=True)
class FinishedStep:
    """What a step has left.

    Attributes:
        iterations: how long it trained.
        sha256: of each of its files that later steps read, by path relative to ``OUTPUT_DIR``.
        report: sentences about it.
    """

    iterations: int
    sha256: Mapping[str, str]
    report: str


@dataclass
class Record:
    """The finished steps of a run, kept in ``OUTPUT_DIR/alternating.json``.

    Attributes:
        folder: ``OUTPUT_DIR``.
        steps: finished steps by number.
        joined: SHA-256 of the joined and evaluated model; "" while there is none.
    """

    folder: Path
    steps: dict[int, FinishedStep] = field(default_factory=dict)
    joined: str = ""

    def is_joined(self) -> bool:
        """Whether the joined model lies there as it was evaluated."""
        path = self.folder / FINAL
        return bool(self.joined) and path.is_file() and sha256_of(str(path)) == self.joined

    @classmethod
    def load(cls, folder: str | Path) -> Record | None:
        """Return the record in a folder, None if there is none.

        Raises:
            ValueError: if it cannot be understood.
        """
        path = Path(folder) / ALTERNATING_RECORD
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            steps = {int(n): FinishedStep(**entry) for n, entry in content["steps"].items()}
            return cls(Path(folder), steps, content["joined"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): restore it, or pass --overwrite to start anew."
            ) from error

    def save(self) -> None:
        """Write the record; its folder must exist."""
        content = {
            "steps": {str(number): vars(entry) for number, entry in self.steps.items()},
            "joined": self.joined,
        }
        with atomic_write(self.folder / ALTERNATING_RECORD) as file:
            file.write(json.dumps(content, indent=2).encode())

    def finish(self, step: Step, iterations: int, files: Sequence[Path], report: str) -> None:
        """Note that a step is done, and the fingerprints of its files."""
        sums = {str(path.relative_to(self.folder)): sha256_of(str(path)) for path in files}
        self.steps[step.number] = FinishedStep(iterations, sums, report)
        self.save()

    def verify(self) -> None:
        """Check that the files of finished steps are those that the steps wrote.

        Raises:
            ValueError: naming the first that is not.
        """
        for number, entry in self.steps.items():
            for name, expected in entry.sha256.items():
                path = self.folder / name
                if path.is_file() and sha256_of(str(path)) == expected:
                    continue
                fate = "is not what" if path.is_file() else "is gone, which"
                raise ValueError(
                    f"{path} {fate} step {number} wrote; later steps build on it: restore the "
                    "file, or pass --overwrite to train all steps anew."
                )


def check_alternating(
    cfg: CfgNode,
    iterations: Sequence[int] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Check, before anything slow, that the run is possible and what its folder holds.

    Call it in the main process. With ``overwrite`` the files of the run in the folder are deleted
    here.

    Args:
        cfg: of the whole model.
        iterations: see ``plan_steps``.
        resume: go on with the run in the folder (start one if there is none).
        overwrite: replace it.

    Raises:
        ValueError: if the model is not of two stages, the settings contradict each other or those
            of the run in the folder, or a finished step's file is not what it was.
        FileExistsError: if the folder holds a run and neither option is given, or a run of another
            kind.
    """
    check_two_stage(cfg)
    plan = plan_steps(cfg, iterations)
    if resume and not overwrite:
        _check_resumable(cfg, plan)
        return
    for folder in (cfg.OUTPUT_DIR, *(c.OUTPUT_DIR for c in plan)):
        check_output_dir(folder, resume, overwrite)
    if overwrite:
        for file in (f for step in STEPS if step.proposes for f in proposal_files(cfg, step)):
            for path in (file, *unfinished_files(file)):
                path.unlink(missing_ok=True)


def _check_resumable(cfg: CfgNode, plan: Sequence[CfgNode]) -> None:
    record = Record.load(cfg.OUTPUT_DIR)
    if record is None:
        folder = Path(cfg.OUTPUT_DIR)
        if (folder / FINAL).is_file() or last_checkpoint(cfg.OUTPUT_DIR):
            raise FileExistsError(
                f"{folder} holds checkpoints, but no {ALTERNATING_RECORD}: they are not of "
                "train-alternating. Choose another OUTPUT_DIR."
            )
        return
    record.verify()
    for number, entry in record.steps.items():
        wanted = plan[number - 1].SOLVER.MAX_ITER
        if entry.iterations != wanted:
            raise ValueError(
                f"step {number} was finished with {entry.iterations} iterations, not {wanted}: ask "
                "for the same --iterations and SOLVER.MAX_ITER, or pass --overwrite to train all "
                "steps anew."
            )
    if record.steps:  # each was compared with the one before it when it was trained
        last = plan[max(record.steps) - 1]
        check_resume(last, str(Path(last.OUTPUT_DIR) / FINAL))
