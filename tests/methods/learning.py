"""What every method has to learn: three shapes on unseen images, four images by heart."""

import json

import numpy as np
from detectron2.engine import HookBase
from PIL import Image

import instseg_ext
from instseg_ext import data, zoo
from instseg_ext.engine import Trainer

SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.FPN.OUT_CHANNELS", 64,
    "DATASETS.TEST", (),
    "DATALOADER.NUM_WORKERS", 0,
    "SOLVER.CHECKPOINT_PERIOD", 100000,
    "INSTSEG.AUGMENTATIONS.ROTATE90", False,
    "INSTSEG.AUGMENTATIONS.VERTICAL_FLIP", False,
    "SEED", 1,
]  # fmt: skip
# Learning by heart needs little: a ResNet-50 of a quarter of the widths, at twice the rate, makes a
# step in a third of the time of the configs' ResNet-18.
NARROW = [
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 16,
    "SOLVER.BASE_LR", 0.002,
]  # fmt: skip
UNCHANGED = [
    "INPUT.RANDOM_FLIP", "none",
    "INSTSEG.AUGMENTATIONS.BRIGHTNESS", [],
    "INSTSEG.AUGMENTATIONS.CONTRAST", [],
]  # fmt: skip


class _StopWhenLearned(HookBase):
    """Ends training when mask AP50 reaches a goal: going on to the last iteration proves no more.

    Args:
        name: of the data set.
        every: iterations between two evaluations; the last iteration gets one, too.
        goal: AP50 that is enough, some points above the test's bar.
    """

    def __init__(self, name, every, goal):
        self._name, self._every, self._goal = name, every, goal
        self.metrics = None

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self._every and done < self.trainer.max_iter:
            return
        self.metrics = _mask_metrics(self.trainer.cfg, self.trainer, self._name)
        if self.metrics["AP50"] >= self._goal:
            self.trainer.stop_reason = f"AP50 is {self.metrics['AP50']:.1f}"


def three_shapes(config, tmp_path, opts):
    """Train on generated shapes of three classes and return the mask metrics on unseen ones.

    ``opts`` set the class count, the sizes (images have 128 pixels) and widths; by default there
    are at most 400 iterations.
    """
    stop = _StopWhenLearned("shapes_val", every=50, goal=65)
    opts = ["DATASETS.TRAIN", ("shapes_train",), "SOLVER.MAX_ITER", 400, *opts]
    _train(config, tmp_path, opts, stop)
    return stop.metrics


def by_heart(config, name, tmp_path, opts):
    """Train on four images of twelve classes; return mask AP50 on them, right and swapped.

    In the swapped ground truth two classes have changed places. ``name`` is unique: registered data
    sets stay for the whole process. ``opts`` set the class count, the sizes (images have 96 pixels)
    and widths; by default the ResNet is narrow and there are at most 150 iterations.
    """
    folder = tmp_path / "images"
    folder.mkdir()
    known, swapped = f"{name}_many", f"{name}_many_swapped"
    data.register(known, str(many_classes(folder)), str(folder))
    data.register(swapped, str(many_classes(folder, swap=(7, 31))), str(folder))
    stop = _StopWhenLearned(known, every=25, goal=96)
    opts = ["DATASETS.TRAIN", (known,), "SOLVER.MAX_ITER", 150, *NARROW, *UNCHANGED, *opts]
    trainer = _train(config, tmp_path, opts, stop)
    return stop.metrics["AP50"], _mask_metrics(trainer.cfg, trainer, swapped)["AP50"]


def _train(config, tmp_path, opts, stop):
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = instseg_ext.get_config(config, [*SMALL, "OUTPUT_DIR", str(folder), *opts])
    trainer = Trainer(cfg, zoo.method_of(cfg))
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([stop])
    trainer.train()
    return trainer


def _mask_metrics(cfg, trainer, name):
    cfg = cfg.clone()
    cfg.DATASETS.TEST = (name,)
    return Trainer.test(cfg, trainer.model, zoo.method_of(cfg))[name]["segm"]


def many_classes(folder, swap=()):
    """Write four images with twelve coloured ellipses each, one class per colour.

    Category ids have gaps. ``swap`` exchanges two categories in the annotations.
    """
    ids = [1, 3, 4, 7, 8, 9, 15, 16, 20, 31, 40, 90]
    renamed = {**{i: i for i in ids}, **dict([swap, swap[::-1]] if swap else [])}
    colours = np.random.default_rng(0).integers(30, 255, (len(ids), 3))
    images, annotations = [], []
    ys, xs = np.mgrid[:96, :96]
    for index in range(4):
        rng = np.random.default_rng([3, index])
        canvas = np.full((96, 96, 3), 10, dtype=np.uint8)
        for slot, kind in enumerate(rng.permutation(len(ids))):
            row, column = divmod(slot, 4)
            cy, cx = 16 + 32 * row + rng.integers(-2, 3), 12 + 24 * column + rng.integers(-1, 2)
            ry, rx = rng.integers(8, 13), rng.integers(7, 11)
            inside = ((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 < 1
            canvas[inside] = colours[kind]
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            polygon = np.stack([cx + rx * np.cos(angles), cy + ry * np.sin(angles)], 1) + 0.5
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": renamed[ids[kind]],
                    "bbox": [float(cx - rx), float(cy - ry), 2.0 * rx, 2.0 * ry],
                    "area": float(inside.sum()),
                    "iscrowd": 0,
                    "segmentation": [polygon.clip(0, 96).flatten().tolist()],
                }
            )
        Image.fromarray(canvas).save(folder / f"{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "height": 96, "width": 96})
    categories = [{"id": i, "name": f"class {i}"} for i in ids]
    path = folder / f"annotations{'_swapped' if swap else ''}.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path
