"""A model of a few hundred weights and a data set of a few images, for tests of the engine."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from PIL import Image
from torch import distributed, nn

from instseg_ext import data
from instseg_ext.config import add_shared_config
from instseg_ext.data import add_data_config
from instseg_ext.engine import Trainer
from instseg_ext.method import Method

CLASSES = ["disc", "square"]
SIZE = (48, 64)


def write_dataset(folder: Path, images: int = 8) -> tuple[str, str]:
    """Write COCO files of 0 to 2 rectangles per image; returns (annotations, image folder)."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    height, width = SIZE
    for i in range(images):
        pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
        name = f"image_{i}.png"
        for k in range(i % 3):  # some images are empty
            x, y = int(rng.integers(2, 20)) + 25 * k, int(rng.integers(2, 20))
            w, h = int(rng.integers(8, 16)), int(rng.integers(8, 20))
            pixels[y : y + h, x : x + w] = rng.integers(150, 255, 3)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": i + 1,
                    "category_id": 1 + (i + k) % 2,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        Image.fromarray(pixels).save(folder / "images" / name)
        content["images"].append({"id": i + 1, "file_name": name, "height": height, "width": width})
    (folder / "annotations.json").write_text(json.dumps(content))
    return str(folder / "annotations.json"), str(folder / "images")


class ToySegmenter(nn.Module):
    """Predicts a class per pixel; one instance per class at inference."""

    @configurable
    def __init__(self, *, num_classes: int, global_normalizer: bool, dropout: float, norm: str):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.GroupNorm(2, 8) if norm == "GN" else nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(8, num_classes, 3, padding=1)
        self.global_normalizer = global_normalizer
        self.dropout = dropout
        self.poison = ""

    @classmethod
    def from_config(cls, cfg):
        return {
            "num_classes": cfg.MODEL.TOY.NUM_CLASSES,
            "global_normalizer": cfg.INSTSEG.LOSS_NORMALIZER == "global",
            "dropout": cfg.MODEL.TOY.DROPOUT,
            "norm": cfg.MODEL.TOY.NORM,
        }

    def logits(self, batch):
        images = torch.stack([x["image"].float() for x in batch]) / 255 - 0.4
        images = images.to(self.head.weight.device)
        features = F.dropout(self.backbone(images), self.dropout, self.training)
        return self.head(features)

    def forward(self, batch):
        logits = self.logits(batch)
        if not self.training:
            return [self.instances(x, item) for x, item in zip(logits, batch, strict=True)]
        target = torch.zeros_like(logits)
        count = logits.new_zeros(())
        for i, item in enumerate(batch):
            gt = item["instances"]
            count += len(gt)
            for mask, label in zip(gt.gt_masks.tensor, gt.gt_classes.tolist(), strict=True):
                small = mask[::2, ::2].float()
                target[i, label] = torch.maximum(target[i, label], small.to(target))
        processes = comm.get_world_size() if self.global_normalizer else 1
        if processes > 1:
            distributed.all_reduce(count)
        # The floor belongs to the sum: a mean over processes may well be a fraction.
        count = count.clamp(min=1) / processes
        losses = {
            "loss_mask": F.binary_cross_entropy_with_logits(
                logits.float(), target.float(), reduction="sum"
            )
            / count
            / 100,
            "loss_size": logits.float().square().sum() / count / 1000,
        }
        if self.poison and any(self.poison in x["file_name"] for x in batch):
            losses["loss_mask"] = losses["loss_mask"] * float("nan")
        return losses

    def instances(self, logits, item):
        size = (item["height"], item["width"])
        probs = F.interpolate(logits[None].float().sigmoid(), size, mode="bilinear")[0]
        masks = probs > 0.4
        keep = masks.flatten(1).any(1)
        result = Instances(size)
        boxes = []
        for mask in masks[keep]:
            ys, xs = mask.nonzero().unbind(1)
            boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        result.pred_masks = masks[keep]
        result.pred_classes = keep.nonzero().flatten()
        result.scores = probs.flatten(1).max(1).values[keep]
        return {"instances": result}


if "ToySegmenter" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(ToySegmenter)


def add_toy_config(cfg):
    cfg.MODEL.TOY = CfgNode({"NUM_CLASSES": len(CLASSES), "DROPOUT": 0.2, "NORM": "GN"})


METHOD = Method(
    name="Toy",
    add_config=add_toy_config,
    meta_architectures=("ToySegmenter",),
    class_count_keys=("MODEL.TOY.NUM_CLASSES",),
)


def toy_config(json_file, images, output, opts=()):
    """Return a config that trains in well under a second per ten iterations."""
    cfg = get_cfg()
    add_shared_config(cfg)
    add_data_config(cfg)
    add_toy_config(cfg)
    name = f"toy_{zlib.crc32(str(json_file).encode())}"
    cfg.INSTSEG.DATASETS = [{"NAME": name, "JSON": str(json_file), "IMAGES": str(images)}]
    cfg.INSTSEG.CLASS_NAMES = list(CLASSES)
    cfg.MODEL.META_ARCHITECTURE = "ToySegmenter"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MIN_SIZE_TRAIN = (SIZE[0],)
    cfg.INPUT.MIN_SIZE_TEST = SIZE[0]
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.MAX_ITER = 6
    cfg.SOLVER.STEPS = (4,)
    cfg.SOLVER.WARMUP_ITERS = 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 0
    cfg.TEST.EVAL_PERIOD = 0
    cfg.SEED = 7
    cfg.OUTPUT_DIR = str(output)
    cfg.merge_from_list([str(o) if isinstance(o, Path) else o for o in opts])
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    data.register_from_config(cfg)
    return cfg


class ToyTrainer(Trainer):
    """Evaluates by a number that follows from the weights alone."""

    scores: list[float] | None = None
    calls: list[tuple[int, float]]

    def __init__(self, *args, **kwargs):
        self.calls = []
        super().__init__(*args, **kwargs)

    def test(self, cfg, model, method, *, limit=None, iteration=None):
        with torch.no_grad():
            score = -float(sum(p.double().abs().sum() for p in model.state_dict().values()))
        if self.scores is not None:
            score = self.scores[len(self.calls)]
        self.calls.append((iteration, score))
        return {cfg.DATASETS.TEST[0]: {"segm": {"AP": score}}}


def weights_equal(a, b):
    """Compare two nested structures of tensors and numbers bit by bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(weights_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(weights_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)
