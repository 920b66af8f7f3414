"""Train the toy in a process of its own: what the tests kill, resume and run in parallel."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm
from engine.toy_engine import METHOD, ToyTrainer, toy_config

from instseg_ext.engine import check_output_dir, launch, setup


class Recorder(HookBase):
    """Writes every step's losses as they are put, without smoothing."""

    def __init__(self, path):
        self.file = Path(path).open("a") if comm.is_main_process() else None  # noqa: SIM115

    def after_step(self):
        if self.file:
            latest = self.trainer.storage.latest()
            values = {k: v for k, (v, _) in latest.items() if "loss" in k}
            self.file.write(json.dumps({"iteration": self.trainer.iter, **values}) + "\n")
            self.file.flush()


def parse(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--poison", default="")
    parser.add_argument(
        "--variants", default="", help="JSON: name -> opts, one run after the other"
    )
    parser.add_argument("opts", nargs="*")
    return parser.parse_args(argv)


def main(args):
    for name, opts in json.loads(args.variants or '{"": []}').items():
        train(args, Path(args.output) / name, [*args.opts, *opts])


def train(args, output, opts):
    data = Path(args.data)
    cfg = toy_config(data / "annotations.json", data / "images", output, opts)
    setup(cfg, args)
    trainer = ToyTrainer(cfg, METHOD)
    trainer.resume_or_load(args.resume)
    if comm.get_rank() == comm.get_world_size() - 1:
        getattr(trainer.model, "module", trainer.model).poison = args.poison
    trainer.register_hooks([Recorder(output / "steps.json")])
    trainer.train()


if __name__ == "__main__":
    arguments = parse()
    check_output_dir(arguments.output, arguments.resume, False)
    launch(main, num_gpus=arguments.num_gpus, args=(arguments,))
