"""Train every ``projects/*/configs/nuclei_*.yaml`` on both folds and print the table of scores.

Runs one training after the other (each takes minutes) and keeps what is finished: started again,
it goes on where it was. A run whose config changed since is trained anew.
"""

import argparse
import fnmatch
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDS = (
    ("nuclei_train", "nuclei_val"),
    ("nuclei_fold1_train", "nuclei_fold1_val"),
)
COLUMNS = (("segm", "AP"), ("segm", "AP50"), ("bbox", "AP"))
IDENTITY = "table_run.txt"  # hash of the config that a folder's checkpoints belong to
DONE = "table_done.txt"  # the same, written when the training has ended


def configs(pattern: str) -> list:
    """Return the config files whose ``Project/name`` matches a shell pattern."""
    found = sorted((ROOT / "projects").glob("*/configs/nuclei_*.yaml"))
    return [path for path in found if fnmatch.fnmatch(title(path), pattern)]


def title(config: Path) -> str:
    """Return ``Project/name``, by which a config can also be asked for."""
    return f"{config.parent.parent.name}/{config.stem}"


def identity(config: Path, opts: list) -> str:
    """Hash the complete config of a run, bases and typed options included."""
    import instseg_ext

    return hashlib.sha256(instseg_ext.get_config(str(config), opts).dump().encode()).hexdigest()


def train(config: Path, fold: int, output: Path, opts: list) -> bool:
    """Bring one run to its end.

    Returns:
        False when the training failed.
    """
    train_set, test_set = FOLDS[fold]
    options = ["DATASETS.TRAIN", f"('{train_set}',)", "DATASETS.TEST", f"('{test_set}',)", *opts]
    wanted = identity(config, options)
    if read(output / DONE) == wanted and (output / "results.json").exists():
        return True
    how = "--resume" if read(output / IDENTITY) == wanted else "--overwrite"
    output.mkdir(parents=True, exist_ok=True)
    (output / IDENTITY).write_text(wanted + "\n")
    command = [sys.executable, "train_net.py", "--config-file", str(config), how]
    command += ["OUTPUT_DIR", str(output), *options]
    sys.stderr.write(f"{title(config)}, fold {fold}: {' '.join(command[1:])}\n")
    if subprocess.call(command, cwd=str(ROOT), stdout=sys.stderr):
        return False
    (output / DONE).write_text(wanted + "\n")
    return True


def read(path: Path) -> str:
    """Return the text of a file, empty when there is none."""
    return path.read_text().strip() if path.exists() else ""


def scores(output: Path, fold: int) -> list:
    """Read the columns of one run; None for what it does not have."""
    results = json.loads((output / "results.json").read_text())
    tasks = results["datasets"].get(FOLDS[fold][1], {})
    speed = (results.get("speed") or {}).get("median_ms") or {}
    return [*(tasks.get(task, {}).get(key) for task, key in COLUMNS), speed.get("total")]


def cell(values: list) -> str:
    """Write the mean of the folds with the single values beside it, a dash where one is missing."""
    if any(value is None for value in values):
        return "-"
    return f"{sum(values) / len(values):.1f} ({' / '.join(f'{value:.1f}' for value in values)})"


def table(rows: dict) -> str:
    """Lay the scores out as markdown; ``rows`` maps a title to one list of scores per fold."""
    head = ["config", *(f"{task} {key}" for task, key in COLUMNS), "ms/image"]
    lines = [head, ["---", *("--:" for _ in head[1:])]]
    for name, folds in rows.items():
        cells = [cell(list(values)) for values in zip(*folds, strict=True)]
        lines.append([name, *(cells or ["failed"] + ["-"] * (len(head) - 2))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="shell pattern of Project/name, e.g. 'SOLO/*'")
    parser.add_argument("--output", default="output/nuclei_table", help="folder of the runs")
    parser.add_argument("opts", nargs="*", help="config options of every run, KEY VALUE ...")
    arguments = parser.parse_args()
    chosen = configs(arguments.only)
    if not chosen:
        parser.error(f"no projects/*/configs/nuclei_*.yaml matches {arguments.only!r}.")
    rows, failed = {}, []
    for config in chosen:
        rows[title(config)] = folds = []
        for fold in range(len(FOLDS)):
            output = (ROOT / arguments.output / title(config) / f"fold{fold}").absolute()
            if not train(config, fold, output, arguments.opts):
                failed.append(f"{title(config)} fold {fold}")
                folds.clear()
                break
            folds.append(scores(output, fold))
    sys.stdout.write(table(rows))
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
