"""Small PointRend heads, ours and detectron2's, and inputs for them."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_MASK_HEAD_REGISTRY
from detectron2.structures import BitMasks, Boxes, Instances

from instseg_ext.methods.pointrend.config import add_pointrend_config
from instseg_ext.methods.pointrend.mask_head import PointRendHead

SIZE = (160, 200)
CLASSES = 5
SHAPES = {"p2": ShapeSpec(channels=12, stride=4), "p3": ShapeSpec(channels=10, stride=8)}


def oracle():
    """detectron2's project, or skip the test."""
    return pytest.importorskip("detectron2.projects.point_rend")


def config(add=add_pointrend_config, **keys):
    """The config of a narrow head; ``POINT_HEAD__FC_DIM=8`` sets ``MODEL.POINT_HEAD.FC_DIM``."""
    cfg = get_cfg()
    add(cfg)
    cfg.merge_from_list(["INPUT.MASK_FORMAT", "bitmask"])
    values = {
        "ROI_HEADS__NUM_CLASSES": CLASSES,
        "POINT_HEAD__NUM_CLASSES": CLASSES,
        "POINT_HEAD__FC_DIM": 16,
        "ROI_MASK_HEAD__NAME": "PointRendHead",
        "ROI_MASK_HEAD__POOLER_TYPE": "",
        "ROI_MASK_HEAD__POINT_HEAD_ON": True,
        "ROI_MASK_HEAD__CONV_DIM": 12,
        "ROI_MASK_HEAD__FC_DIM": 32,
        "ROI_MASK_HEAD__POOLER_RESOLUTION": 14,
        **keys,
    }
    for key, value in values.items():
        cfg.merge_from_list([f"MODEL.{key.replace('__', '.')}", value])
    return cfg


def spread(head, std=0.2):
    """Give a head weights with which masks have both sides."""
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return head


def pair(head=PointRendHead, name="PointRendMaskHead", std=0.2, **keys):
    """Our head and detectron2's of that name with the same weights."""
    cfg = config(oracle().add_pointrend_config, **keys)
    theirs = spread(ROI_MASK_HEAD_REGISTRY.get(name)(cfg, SHAPES), std)
    ours = head(config(**keys), SHAPES)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def features(num=2, size=SIZE):
    """Random maps for images of ``size``, the same for the same arguments."""
    gen = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(
            num, shape.channels, size[0] // shape.stride, size[1] // shape.stride, generator=gen
        )
        for name, shape in SHAPES.items()
    }


def boxes(num, gen):
    """Boxes of many sizes, some across the border of the image."""
    corner = torch.rand(num, 2, generator=gen) * torch.tensor([170.0, 140.0]) - 15
    return torch.cat([corner, corner + torch.rand(num, 2, generator=gen) * 90 + 3], dim=1)


def detections(counts=(3, 4)):
    gen = torch.Generator().manual_seed(2)
    result = []
    for num in counts:
        instances = Instances(SIZE)
        instances.pred_boxes = Boxes(boxes(num, gen))
        instances.pred_classes = torch.randint(0, CLASSES, (num,), generator=gen)
        result.append(instances)
    return result


def proposals(counts=(3, 4)):
    gen = torch.Generator().manual_seed(3)
    result = []
    for num in counts:
        xyxy = boxes(num, gen)
        y, x = torch.arange(SIZE[0])[None, :, None], torch.arange(SIZE[1])[None, None]
        x0, y0, x1, y1 = (xyxy + torch.randn(num, 4, generator=gen) * 5)[:, :, None, None].unbind(1)
        instances = Instances(SIZE)
        instances.proposal_boxes = Boxes(xyxy)
        instances.gt_classes = torch.randint(0, CLASSES, (num,), generator=gen)
        instances.gt_masks = BitMasks((x >= x0) & (x < x1) & (y >= y0) & (y < y1))
        result.append(instances)
    return result
