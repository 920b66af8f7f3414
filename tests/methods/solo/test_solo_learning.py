"""Every variant learns: three shapes on unseen images, and four many-class images by heart."""

import json

import numpy as np
import pytest
from PIL import Image

import instseg_ext
from instseg_ext import data, zoo
from instseg_ext.engine import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]

SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.FPN.OUT_CHANNELS", 64,
    "MODEL.SOLO.CONV_DIM", 64,
    "INPUT.MIN_SIZE_TRAIN", (96,),
    "INPUT.MIN_SIZE_TEST", 96,
    "DATALOADER.NUM_WORKERS", 0,
    "SOLVER.CHECKPOINT_PERIOD", 100000,
    "SEED", 1,
]  # fmt: skip
FOUR_LEVELS = ["MODEL.SOLO.NUM_GRIDS", [20, 14, 6, 3]]
GRIDS = {
    "solov2": ["MODEL.SOLO.NUM_GRIDS", [20, 14], "MODEL.SOLO.KERNEL_DIM", 32],
    "solo": FOUR_LEVELS,
    "decoupled_solo": FOUR_LEVELS,
    "decoupled_solo_light": FOUR_LEVELS,
}
# A channel of vanilla SOLO learns from the objects of one cell alone: it needs coarser grids and
# more images to learn, and more repetitions to know four by heart.
SHAPES = {
    "solo": ["MODEL.SOLO.NUM_GRIDS", [10, 8, 5, 3], "SOLVER.IMS_PER_BATCH", 8],
}
REPETITIONS = {"solo": 600}


@pytest.fixture(params=GRIDS)
def variant(request):
    return request.param


def train(variant, tmp_path, *opts):
    cfg = instseg_ext.get_config(
        f"SOLO/nuclei_{variant}_R_18_FPN",
        [*SMALL, *GRIDS[variant], "OUTPUT_DIR", str(tmp_path / "run"), *opts],
    )
    (tmp_path / "run").mkdir()
    trainer = Trainer(cfg, zoo.method_of(cfg))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return cfg, trainer


def mask_metrics(cfg, trainer, name):
    cfg = cfg.clone()
    cfg.DATASETS.TEST = (name,)
    return Trainer.test(cfg, trainer.model, zoo.method_of(cfg))[name]["segm"]


def test_three_shapes(variant, tmp_path):
    cfg, trainer = train(
        variant,
        tmp_path,
        "MODEL.SOLO.NUM_CLASSES", 3,
        "DATASETS.TRAIN", ("shapes_train",),
        "DATASETS.TEST", (),
        "SOLVER.MAX_ITER", 400,
        "MODEL.SOLO.CONV_DIM", 128,
        "INPUT.MIN_SIZE_TRAIN", (128,),
        "INPUT.MIN_SIZE_TEST", 128,
        "INSTSEG.AUGMENTATIONS.ROTATE90", False,
        "INSTSEG.AUGMENTATIONS.VERTICAL_FLIP", False,
        *SHAPES.get(variant, []),
    )  # fmt: skip
    metrics = mask_metrics(cfg, trainer, "shapes_val")
    assert metrics["AP50"] >= 60, metrics


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


def test_four_images_of_many_classes_by_heart(variant, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    # Registered names hold for the whole process: one pair for each variant.
    known, swapped_name = f"{variant}_many", f"{variant}_many_swapped"
    data.register(known, str(many_classes(folder)), str(folder))
    data.register(swapped_name, str(many_classes(folder, swap=(7, 31))), str(folder))
    cfg, trainer = train(
        variant,
        tmp_path,
        "MODEL.SOLO.NUM_CLASSES", 12,
        "DATASETS.TRAIN", (known,),
        "DATASETS.TEST", (),
        "SOLVER.MAX_ITER", REPETITIONS.get(variant, 250),
        "INPUT.RANDOM_FLIP", "none",
        "INSTSEG.AUGMENTATIONS.ROTATE90", False,
        "INSTSEG.AUGMENTATIONS.VERTICAL_FLIP", False,
        "INSTSEG.AUGMENTATIONS.BRIGHTNESS", [],
        "INSTSEG.AUGMENTATIONS.CONTRAST", [],
    )  # fmt: skip
    right = mask_metrics(cfg, trainer, known)["AP50"]
    swapped = mask_metrics(cfg, trainer, swapped_name)["AP50"]
    assert right >= 90
    # Two of twelve classes are wrong: what the other ten give is left.
    assert swapped < right - 10
