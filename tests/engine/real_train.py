"""Train the contract suite's models in several processes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from contract.cases import CASES
from engine.toy_train import Recorder

from instseg_ext import zoo
from instseg_ext.engine import Trainer, launch

# Equal image sizes and no statistics over a batch: what design section 7 asks for.
OPTS = (
    # Group normalisation has 32 groups: the contract's narrow model has too few channels.
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 64,
    "MODEL.RESNETS.NORM", "GN",
    "MODEL.FPN.NORM", "GN",
    "INPUT.CROP.ENABLED", False,
    "INSTSEG.AUGMENTATIONS.ROTATE90", False,
    "DATALOADER.NUM_WORKERS", 0,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False,
    "SOLVER.IMS_PER_BATCH", 4,
    "SOLVER.MAX_ITER", 5,
    "SOLVER.CHECKPOINT_PERIOD", 0,
    "SOLVER.WARMUP_ITERS", 0,
    "SOLVER.BASE_LR", 0.0002,
    "TEST.EVAL_PERIOD", 0,
    "INSTSEG.BEST.METRIC", "",
    "INSTSEG.EMA.ENABLED", False,
    "INSTSEG.CLIP_GRAD_NORM", 0.0,
    "INSTSEG.PRECISION", "fp32",
    # AdamW divides by the gradient's size and turns rounding errors of tiny ones into full steps.
    "INSTSEG.OPTIMIZER", "sgd",
    # Some cases begin with high scores, whose enormous first losses would magnify rounding errors.
    "MODEL.SOLO.PRIOR_PROB", 0.01,
    "SEED", 3,
)  # fmt: skip


def config(name, data, output, opts=()):
    """Return a contract case's config on the toy data set, without evaluation."""
    from instseg_ext import data as instseg_data

    case = next(case for case in CASES if case.name == name)
    cfg = case.cfg(*OPTS, "OUTPUT_DIR", str(output), *opts)
    json_file, images = Path(data) / "annotations.json", Path(data) / "images"
    cfg.INSTSEG.DATASETS = [{"NAME": "toy", "JSON": str(json_file), "IMAGES": str(images)}]
    cfg.INSTSEG.CLASS_NAMES = ["disc", "square"]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy",), ()
    zoo.set_class_count(cfg, 2)
    Path(output).mkdir(parents=True, exist_ok=True)
    instseg_data.register_from_config(cfg)
    return cfg


def train(cfg):
    trainer = Trainer(cfg, zoo.method_of(cfg))
    trainer.register_hooks([Recorder(Path(cfg.OUTPUT_DIR) / "steps.json")])
    trainer.train()
    return trainer


def main(args):
    for variant, (name, opts) in json.loads(args.variants).items():
        train(config(name, args.data, Path(args.output) / variant, opts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--variants", required=True)
    arguments = parser.parse_args()
    launch(main, num_gpus=2, args=(arguments,))
