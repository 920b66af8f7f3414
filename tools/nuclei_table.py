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
# Models that start from another one's weights, or read its proposals for both sets, of the same
# fold; and commands other than train_net.py.
STARTS_FROM = {"DeepMask/nuclei_sharpmask_R_18": "DeepMask/nuclei_deepmask_R_18"}
PROPOSALS_OF = {"MultiPathNet/nuclei_multipathnet_file_R_18_FPN": "DeepMask/nuclei_sharpmask_R_18"}
INSTSEG = ("-m", "instseg_ext.cli.main")
COMMANDS = {"SDS/nuclei_sds_R_18": (*INSTSEG, "train-sds")}


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


def train(config: Path, fold: int, root: Path, opts: list) -> bool:
    """Bring one run to its end, and before it those that it needs.

    Args:
        config: what to train.
        fold: 0 or 1.
        root: folder of all runs.
        opts: options of every run.

    Returns:
        False when a training failed.
    """
    output = folder(title(config), fold, root)
    train_set, test_set = FOLDS[fold]
    options = ["DATASETS.TRAIN", f"('{train_set}',)", "DATASETS.TEST", f"('{test_set}',)", *opts]
    needed = {**STARTS_FROM, **PROPOSALS_OF}.get(title(config))
    files = {name: output.parent / f"proposals_{name}.pth" for name in FOLDS[fold]}
    before = ""
    if needed:
        project, _, name = needed.partition("/")
        if not train(ROOT / "projects" / project / "configs" / f"{name}.yaml", fold, root, opts):
            return False
        before = read(folder(needed, fold, root) / DONE)
        weights = ["MODEL.WEIGHTS", str(folder(needed, fold, root) / "model_final.pth")]
        if title(config) in STARTS_FROM:
            options += weights
        else:
            for key, name in zip(("TRAIN", "TEST"), FOLDS[fold], strict=True):
                options += [f"DATASETS.PROPOSAL_FILES_{key}", f"('{files[name]}',)"]
    wanted = identity(config, options) + before
    if read(output / DONE) == wanted and (output / "results.json").exists():
        return True
    how = "--resume" if read(output / IDENTITY) == wanted else "--overwrite"
    output.mkdir(parents=True, exist_ok=True)
    (output / IDENTITY).write_text(wanted + "\n")
    commands = []
    if title(config) in PROPOSALS_OF:
        for name, file in files.items():
            propose = [*INSTSEG, "propose", "--config-file", needed, "--dataset", name]
            commands.append([*propose, "--output", str(file), "--overwrite", *weights, *opts])
    command = [*COMMANDS.get(title(config), ["train_net.py"]), "--config-file", str(config), how]
    commands.append([*command, "OUTPUT_DIR", str(output), *options])
    for command in commands:
        sys.stderr.write(f"{title(config)}, fold {fold}: {' '.join(command)}\n")
        if subprocess.call([sys.executable, *command], cwd=str(ROOT), stdout=sys.stderr):
            return False
    (output / DONE).write_text(wanted + "\n")
    return True


def folder(name: str, fold: int, root: Path) -> Path:
    """Return the folder of a run."""
    return (root / name / f"fold{fold}").absolute()


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
            if not train(config, fold, ROOT / arguments.output, arguments.opts):
                failed.append(f"{title(config)} fold {fold}")
                folds.clear()
                break
            folds.append(scores(folder(title(config), fold, ROOT / arguments.output), fold))
    sys.stdout.write(table(rows))
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
