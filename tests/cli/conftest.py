"""A model without weights to learn: bright blobs are objects, their brightness is the score."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils import logger
from torch import nn

from instseg_ext import data
from instseg_ext.cli import common
from instseg_ext.config import add_shared_config
from instseg_ext.method import Method
from instseg_ext.structures.rle import encode_masks

KEY = "MODEL.RETINANET.SCORE_THRESH_TEST"


class BlobModel(nn.Module):
    """Connected bright regions; class 1 where they are wide, else class 0."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Conv2d(3, 2, 3, padding=1)
        self.head = nn.Conv2d(2, 2, 1)
        self.threshold = cfg.MODEL.RETINANET.SCORE_THRESH_TEST
        self.mask_output = "bool"

    def forward(self, batch):
        return [{"instances": self._blobs(image)} for image in batch]

    def _blobs(self, image):
        self.head(self.backbone(image["image"][None].float()))
        grey = image["image"].float().mean(dim=0).numpy()
        size = (image["width"], image["height"])
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_NEAREST)
        count, labels = cv2.connectedComponents((grey > 60).astype(np.uint8))
        masks = np.array([labels == i for i in range(1, count)]).reshape(-1, size[1], size[0])
        scores = torch.tensor([float(grey[m].mean()) / 255 for m in masks])
        boxes = [cv2.boundingRect(m.astype(np.uint8)) for m in masks]
        found = Instances((size[1], size[0]))
        found.pred_boxes = Boxes(
            torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes]).reshape(-1, 4).float()
        )
        found.scores = scores
        found.pred_classes = torch.tensor([int(w > h) for _, _, w, h in boxes], dtype=torch.int64)
        keep = (found.scores > self.threshold).nonzero()[:, 0]
        masks = masks[keep.numpy()]
        found = found[keep]
        if self.mask_output == "rle":
            found.pred_masks_rle = encode_masks(masks)
        else:
            found.pred_masks = torch.from_numpy(masks.astype(bool))
        return found


if "TestBlobModel" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY._do_register("TestBlobModel", BlobModel)


@pytest.fixture
def blob_method():
    return Method(name="blobs", add_config=lambda cfg: None, score_threshold_keys=(KEY,))


@pytest.fixture
def blob_cfg(tmp_path):
    cfg = get_cfg()
    add_shared_config(cfg)
    data.add_data_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "TestBlobModel"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.5
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.INSTSEG.CLASS_NAMES = ["tall", "wide"]
    cfg.DATASETS.TEST = ()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    weights = tmp_path / "blob.pth"
    torch.save({"model": BlobModel(cfg).state_dict()}, weights)
    cfg.MODEL.WEIGHTS = str(weights)
    return cfg


@pytest.fixture
def use_blobs(monkeypatch, blob_cfg, blob_method):
    """Every command gets the blob model, whatever config it asks for."""
    monkeypatch.setattr(common, "config_from_args", lambda args: (blob_cfg, blob_method))
    # detectron2's set-up cuts the logger off from its parents, and so from caplog, for good.
    monkeypatch.setattr(logger, "setup_logger", lambda **kwargs: None)
    return blob_cfg


@pytest.fixture
def picture():
    """Draw a picture with one wide blob of score 0.9 and one tall one of score about 0.4."""

    def draw(height=60, width=90, shift=0):
        image = np.zeros((height, width, 3), dtype=np.uint8)
        image[10:20, 5 + shift : 45 + shift] = 230
        image[25:55, 60:70] = 102
        return image

    return draw
