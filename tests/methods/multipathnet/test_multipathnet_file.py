"""From the file of proposals to losses and to masks at the size of the image."""

import itertools

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from methods.multipathnet.multipathnet_toys import TINY

import instseg_ext
from instseg_ext import data
from instseg_ext.methods.multipathnet import METHOD
from instseg_ext.structures.rle import decode_masks, rle_boxes, segmentation_rle

NAME = "MultiPathNet/nuclei_multipathnet_file_R_18_FPN"
LIMIT = 2


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Whose files hold the objects themselves as proposals."""
    folder = tmp_path_factory.mktemp("proposals")
    files = {split: str(folder / f"{split}.pth") for split in ("train", "val")}
    opts = [
        *TINY,
        "DATASETS.PROPOSAL_FILES_TRAIN", (files["train"],),
        "DATASETS.PROPOSAL_FILES_TEST", (files["val"],),
        "DATALOADER.NUM_WORKERS", 0,
        "SOLVER.IMS_PER_BATCH", 2,
        "MODEL.DEVICE", "cpu",
    ]  # fmt: skip
    cfg = instseg_ext.get_config(NAME, opts)
    for split, file in files.items():
        data.write_proposals(file, map(_perfect, DatasetCatalog.get(f"nuclei_{split}")[:LIMIT]))
    return cfg


def _perfect(record):
    size = record["height"], record["width"]
    kept = [a for a in record["annotations"] if not a.get("iscrowd")]
    rles = [segmentation_rle(a["segmentation"], *size) for a in kept]
    boxes = torch.from_numpy(rle_boxes(rles)).float().reshape(-1, 4)
    return record["image_id"], boxes, torch.linspace(3, -3, len(boxes)), rles


def test_masks_of_detections_come_from_the_file(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    loader = data.build_test_loader(cfg, "nuclei_val", METHOD.build_mapper(cfg, False), LIMIT)
    stored = data.ProposalFile(cfg.DATASETS.PROPOSAL_FILES_TEST[0])
    for batch in loader:
        with torch.no_grad():
            found = model(batch)[0]["instances"]
        size = batch[0]["height"], batch[0]["width"]
        assert found.image_size == size
        # the network sees another size
        assert batch[0]["image"].shape[1] == 64 != size[0]
        masks = decode_masks(stored.masks(batch[0]["image_id"]), size)
        assert 0 < len(found) <= len(masks)
        assert np.array_equal(found.pred_masks.numpy(), masks[found.proposal_index.numpy()])


def test_a_training_step(cfg):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    loader = data.build_train_loader(cfg, METHOD.build_mapper(cfg, True), seed=0, limit=LIMIT)
    for batch in itertools.islice(loader, 2):
        losses = model(batch)
        assert all(value.isfinite() for value in losses.values())
        assert float(losses["loss_cls"].detach()) > 0
