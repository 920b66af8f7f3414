"""A small data set of label maps, and the config of a small model for it."""

from __future__ import annotations

import contextlib

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

CLASSES = ["ground", "disc", "bar"]
COLOURS = np.array([[40, 90, 40], [200, 60, 60], [60, 60, 220]])
# The published recipe on an R-50 of an eighth of the width.
TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.PIXEL_STD", [58.0, 57.0, 57.0],
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 8,
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    "MODEL.POINT_HEAD.FC_DIM", 16,
    "MODEL.POINT_HEAD.TRAIN_NUM_POINTS", 64,
    "MODEL.POINT_HEAD.SUBDIVISION_NUM_POINTS", 128,
    "INPUT.MIN_SIZE_TRAIN", (48, 56),
    "INPUT.MIN_SIZE_TEST", 48,
    "INPUT.CROP.SIZE", (45, 50),
    "SOLVER.IMS_PER_BATCH", 2,
    "DATALOADER.NUM_WORKERS", 0,
]  # fmt: skip


def scene(height, width, gen):
    """An image, RGB, and its label map: a disc and a bar on the ground, a strip of 255 below."""
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), dtype=np.uint8)
    centre = gen.uniform(0.2, 0.8, 2) * (height, width)
    labels[np.hypot(y - centre[0], x - centre[1]) < min(height, width) / 4] = 1
    left = gen.integers(0, width - 10)
    labels[:, left : left + 10] = 2
    noise = gen.integers(-15, 16, (height, width, 3))
    image = (COLOURS[labels] + noise).clip(0, 255).astype(np.uint8)
    labels[-4:] = 255
    return image, labels


def write_scenes(folder, count=4, size=(45, 61), sizes_known=True):
    """Write images and label maps; return the dictionaries in detectron2's form."""
    gen = np.random.default_rng(0)
    dicts = []
    for number in range(count):
        image, labels = scene(*size, gen)
        files = [folder / f"{kind}_{number}.png" for kind in ("image", "labels")]
        Image.fromarray(image).save(files[0])
        Image.fromarray(labels).save(files[1])
        dicts.append({"file_name": str(files[0]), "sem_seg_file_name": str(files[1])})
        if sizes_known:
            dicts[-1] |= {"height": size[0], "width": size[1]}
    return dicts


@contextlib.contextmanager
def registered(name, dicts, **metadata):
    """Register the dictionaries under a name meanwhile."""
    known = {"stuff_classes": CLASSES, "ignore_label": 255, "evaluator_type": "sem_seg"}
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(**{**known, **metadata})
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
