"""``evaluate`` in two processes: the numbers and files of one."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = '''
import json, sys
import torch
from detectron2.utils import comm
from torch import nn
import instseg_ext
from instseg_ext import data, engine, evaluation
from instseg_ext.method import Method
from instseg_ext.structures.rle import encode_masks
from detectron2.structures import Boxes, Instances


class Noise(nn.Module):
    """Detections drawn from the image's content, with many equal scores."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 1, 1)
        self.head = nn.ReLU()
        self.mask_output = "bool"

    def forward(self, batch):
        self.head(self.backbone(batch[0]["image"][None].float()))
        return [{"instances": self.find(image)} for image in batch]

    def find(self, image):
        generator = torch.Generator().manual_seed(int(image["image"].sum()))
        size = (image["height"], image["width"])
        xy = torch.rand(60, 2, generator=generator) * torch.tensor([size[1], size[0]]) * 0.7
        boxes = torch.cat([xy, xy + 28], dim=1).floor()
        masks = torch.zeros(60, *size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
            mask[y0:y1, x0:x1] = True
        found = Instances(size, pred_boxes=Boxes(boxes), scores=(xy[:, 0] // 20) / 20)
        found.pred_classes = torch.arange(60) % 3
        found.pred_masks_rle = encode_masks(masks)
        return found


def work(folder):
    cfg = instseg_ext.get_config("MaskRCNN/nuclei_mask_rcnn_R_18_FPN", ["MODEL.DEVICE", "cpu"])
    cfg.DATASETS.TEST = ("shapes_val",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = folder
    cfg.INSTSEG.MAP_R = cfg.INSTSEG.PROPOSAL_RECALL = True
    method = Method(name="noise", add_config=lambda cfg: None)
    results = evaluation.evaluate(cfg, Noise(), method, iteration=comm.get_world_size())
    assert bool(results["shapes_val"]) == comm.is_main_process()


if __name__ == "__main__":
    engine.launch(work, num_gpus=int(sys.argv[1]), args=(sys.argv[2],))
'''


def evaluate(tmp_path, processes):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder = tmp_path / str(processes)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(processes), str(folder)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "INSTSEG_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    detections = folder / "inference" / "shapes_val" / "coco_instances_results.json"
    return json.loads((folder / "results.json").read_text()), detections.read_text()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    alone, detections = evaluate(tmp_path, 1)
    together, gathered = evaluate(tmp_path, 2)
    assert (alone["iteration"], together["iteration"]) == (1, 2)
    assert alone["datasets"] == together["datasets"]
    assert alone["datasets"]["shapes_val"]["bbox"]["AP50"] > 0
    assert alone["datasets"]["shapes_val"]["map_r"]["sds_mAPvol"] > 0
    assert alone["datasets"]["shapes_val"]["proposals"]["segm_AR@100"] > 0
    assert detections == gathered
    assert not (tmp_path / "2" / "results").exists()  # written once
