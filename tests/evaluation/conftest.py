"""A generated data set with crowds and all sizes, and models that know its answers."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask as coco_mask
from torch import nn

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 7, "name": "bar"}, {"id": 8, "name": "ghost"}]
_NUMBERS = itertools.count()


def _encode(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")}


def random_mask(rng, height, width, side):
    """A filled rectangle with a ragged edge, ``side`` pixels long at most."""
    mask = np.zeros((height, width), dtype=bool)
    h, w = rng.integers(max(2, side // 2), side + 1, size=2)
    y, x = rng.integers(0, height - h), rng.integers(0, width - w)
    mask[y : y + h, x : x + w] = rng.random((h, w)) < 0.97
    return mask


def make_dataset(seed=0, images=8, height=128, width=160):
    """COCO data with objects of all sizes, crowds, an empty image, and a class without objects."""
    rng = np.random.default_rng(seed)
    entries, annotations = [], []
    for index in range(images):
        entries.append(
            {"id": 100 + index, "file_name": f"{index}.png", "height": height, "width": width}
        )
        for _ in range(0 if index == 1 else int(rng.integers(2, 6))):
            mask = random_mask(rng, height, width, int(rng.choice([12, 50, 110])))
            rle = _encode(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + index,
                    "category_id": int(rng.choice([3, 7])),
                    "iscrowd": int(rng.random() < 0.15),
                    "area": float(mask.sum()),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "segmentation": rle,
                }
            )
    return {"images": entries, "annotations": annotations, "categories": CATEGORIES}


def make_results(dataset, seed=1):
    """Detections near the objects, elsewhere, of the wrong class, doubled, and with tied scores."""
    rng = np.random.default_rng(seed)
    results = []
    for annotation in dataset["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        for _ in range(int(rng.integers(0, 4))):
            moved = np.roll(mask, rng.integers(-4, 5, size=2), axis=(0, 1))
            rle = _encode(moved)
            category = annotation["category_id"] if rng.random() < 0.8 else 8
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": category,
                    "segmentation": rle,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "score": round(float(rng.random()), 1),
                }
            )
    return results


@pytest.fixture
def register_dataset():
    """Register COCO dictionaries under a fresh name; the registration ends with the test."""
    names = []

    def register(path, evaluator_type="coco"):
        name = f"evaluation_test_{next(_NUMBERS)}"
        names.append(name)
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(json_file=str(path), evaluator_type=evaluator_type)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class Oracle(nn.Module):
    """Looks the detections up: ``answers[image_id] = (masks, classes, scores)``."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers
        self.backbone = nn.Conv2d(3, 1, 1)
        self.head = nn.ReLU()
        self.mask_output = "bool"
        self.asked = []

    def forward(self, batch):
        self.asked.append((self.mask_output, self.training, torch.is_grad_enabled()))
        self.head(self.backbone(torch.zeros(1, 3, 4, 4)))
        return [{"instances": self.instances(image)} for image in batch]

    def instances(self, image):
        masks, classes, scores = self.answers[image["image_id"]]
        found = Instances((image["height"], image["width"]))
        rles = [_encode(mask) for mask in masks]
        boxes = np.array([coco_mask.toBbox(rle) for rle in rles]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(torch.from_numpy(boxes).float())
        found.scores = torch.tensor(scores, dtype=torch.float32)
        found.pred_classes = torch.tensor(classes, dtype=torch.int64)
        if self.mask_output == "rle":
            found.pred_masks_rle = rles
        else:
            found.pred_masks = torch.from_numpy(np.asarray(masks, dtype=bool))
        return found


@pytest.fixture
def make():
    return SimpleNamespace(
        dataset=make_dataset, results=make_results, categories=CATEGORIES, oracle=Oracle
    )


@pytest.fixture
def dataset():
    return make_dataset()


@pytest.fixture
def perfect(dataset):
    """Answers equal to the ground truth without its crowds."""
    contiguous = {category["id"]: index for index, category in enumerate(CATEGORIES)}
    answers = {}
    for image in dataset["images"]:
        mine = [
            a for a in dataset["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]
        ]
        masks = [coco_mask.decode(a["segmentation"]).astype(bool) for a in mine]
        stack = np.array(masks).reshape(-1, image["height"], image["width"]).astype(bool)
        answers[image["id"]] = (
            stack,
            [contiguous[a["category_id"]] for a in mine],
            [0.9] * len(mine),
        )
    return answers
