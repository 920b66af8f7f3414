"""Small MultiPathNet models, heads and regions for the tests."""

import torch
from contract.cases import TINY_RCNN, TINY_RESNET
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

import instseg_ext
from instseg_ext.methods.multipathnet.roi_heads import MultiPathROIHeads

NAME = "MultiPathNet/nuclei_multipathnet_R_18_FPN"
TINY = [
    *TINY_RESNET,
    *TINY_RCNN,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.MULTIPATH.MIX_DIM", 8,
]  # fmt: skip
FROM_FILE = [
    "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals",
    "MODEL.LOAD_PROPOSALS", True,
    "MODEL.MASK_ON", False,
    "MODEL.MULTIPATH.MASK_SOURCE", "proposal",
    "INSTSEG.PROPOSAL_MASKS", True,
]  # fmt: skip
# Strides of p4, p3 and p2.
STRIDES = {"p4": 16, "p3": 8, "p2": 4}


def config(*opts):
    return instseg_ext.get_config(NAME, [*TINY, *opts])


def model_of(*opts):
    torch.manual_seed(0)
    return build_model(config(*opts))


def heads_of(*opts, channels=8):
    """Region heads alone."""
    torch.manual_seed(0)
    names = ("p2", "p3", "p4", "p5")
    shapes = {n: ShapeSpec(channels=channels, stride=4 * 2**i) for i, n in enumerate(names)}
    return MultiPathROIHeads(config("MODEL.FPN.OUT_CHANNELS", channels, *opts), shapes)


def features_of(size=(64, 64), channels=8, images=1):
    gen = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(images, channels, size[0] // s, size[1] // s, generator=gen)
        for name, s in {**STRIDES, "p5": 32}.items()
    }


def proposals_of(*boxes, size=(64, 64)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    logits = torch.linspace(1, 0, len(boxes))
    return Instances(size, proposal_boxes=Boxes(boxes), objectness_logits=logits)


def objects_of(*boxes, classes=None, size=(64, 64)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.zeros(len(boxes), dtype=torch.int64) if classes is None else classes
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.as_tensor(classes))
