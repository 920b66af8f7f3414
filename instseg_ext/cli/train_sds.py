"""``instseg train-sds``: regions, fine-tuning, features, linear models, one checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from instseg_ext.cli import train

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from instseg_ext.method import Method

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``instseg train-sds``."""
    parser = subparsers.add_parser(
        "train-sds",
        help="train SDS: fine-tune its networks, then fit its linear models",
        description="Train SDS in its stages: region proposals, fine-tuning, features, support "
        "vector machines, refinement. OUTPUT_DIR/model_final.pth holds all of it. --resume leaves "
        "out finished stages and goes on inside the interrupted one.",
    )
    train.add_training_arguments(parser)
    parser.set_defaults(run=run, eval_only=False)


def run(args: argparse.Namespace) -> int:
    """Check what is cheap to check, make the regions, then train in as many processes as asked for.

    Raises:
        ValueError, KeyError, FileNotFoundError, FileExistsError: one sentence naming what is wrong.
    """
    from instseg_ext import engine

    cfg, method = _prepare(args)
    if train.is_first(args):
        final = Path(cfg.OUTPUT_DIR) / "model_final.pth"
        if final.is_file() and not (args.resume or args.overwrite):
            raise FileExistsError(
                f"{final} exists: pass --resume to go on with its run, --overwrite to replace it, "
                "or choose another OUTPUT_DIR."
            )
        finetune = _finetune_config(cfg)
        engine.check_output_dir(finetune.OUTPUT_DIR, args.resume, args.overwrite, finetune)
        train.check_inputs(finetune, args)
        method.build_mapper(cfg, False)  # raises where the regions of the test images are missing
        _make_regions(cfg, _training_dicts(cfg, args))
    train.launch(_worker, cfg, args)
    return 0


def _prepare(args: argparse.Namespace) -> tuple[CfgNode, Method]:
    """Return the config of the run, with a folder of regions.

    Raises:
        ValueError: if the config is of another method.
    """
    from instseg_ext.methods import sds

    cfg, method = train.prepare(args)
    if method is not sds.METHOD:
        raise ValueError(
            f"train-sds trains SDS, but the config is of {method.name}: use `instseg train`."
        )
    cfg.defrost()
    if not cfg.MODEL.SDS.REGIONS_TRAIN:
        cfg.MODEL.SDS.REGIONS_TRAIN = str(Path(cfg.OUTPUT_DIR) / "regions")
    cfg.freeze()
    return cfg, method


def _finetune_config(cfg: CfgNode) -> CfgNode:
    """Return the config of the fine-tuning, which nobody evaluates, in a folder of its own."""
    finetune = cfg.clone()
    finetune.defrost()
    finetune.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / "finetune")
    finetune.DATASETS.TEST = ()
    finetune.freeze()
    return finetune


def _training_dicts(cfg: CfgNode, args: argparse.Namespace) -> list[dict]:
    """Return the images that are trained on; those of a dry run are few."""
    from instseg_ext import data, engine

    limit = engine.DRY_RUN_IMAGES if args.dry_run else None
    return data.training_dicts(cfg, cfg.DATASETS.TRAIN, limit)


def _make_regions(cfg: CfgNode, dicts: list[dict]) -> None:
    """Make the regions that are missing, in the run's own folder only."""
    from instseg_ext.methods import sds

    own = Path(cfg.OUTPUT_DIR) / "regions"
    if Path(cfg.MODEL.SDS.REGIONS_TRAIN) != own:
        return
    if len({str(d["image_id"]) for d in dicts}) < len(dicts):
        raise ValueError(
            "Two images of DATASETS.TRAIN have the same id, by which regions are found: train on "
            "one of the sets, or join them in one file with different ids."
        )
    maximum = cfg.MODEL.SDS.MAX_REGIONS
    source = sds.region_source(None, "builtin", maximum, 0)
    settings = {"dataset": list(cfg.DATASETS.TRAIN), "max_regions": maximum}
    sds.write_regions(dicts, own, source, settings, workers=max(1, cfg.DATALOADER.NUM_WORKERS))


def _worker(args: argparse.Namespace) -> None:
    """Train in one process."""
    from detectron2.modeling import build_model
    from detectron2.utils import comm

    from instseg_ext import engine
    from instseg_ext.checkpoint import InstSegCheckpointer
    from instseg_ext.methods import sds

    cfg, method = _prepare(args)
    engine.setup(cfg, args)
    limit = engine.DRY_RUN_IMAGES if args.dry_run else None
    finetune = _finetune_config(cfg)
    Path(finetune.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = engine.Trainer(finetune, method, train_limit=limit, unsafe=args.unsafe)
    trainer.resume_or_load(resume=args.resume, reset_classifier=args.reset_classifier)
    trainer.train()
    del trainer

    output = Path(cfg.OUTPUT_DIR)
    finetuned = Path(finetune.OUTPUT_DIR) / "model_final.pth"
    model = build_model(cfg).eval()
    InstSegCheckpointer(model).load(str(finetuned), checkpointables=[])
    store = sds.extract_features(cfg, model, _training_dicts(cfg, args), output / "features")
    if comm.is_main_process():
        sds.fit_linear_models(cfg, model, store, output / "fit")
        sds.save_fitted(cfg, model, finetuned)
    comm.synchronize()
    del model
    if cfg.DATASETS.TEST:
        cfg.defrost()
        cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
        engine.evaluate_checkpoint(cfg, method, limit=limit)
