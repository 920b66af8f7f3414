"""Seeded weights under the authors' key names, and the features that go with them.

The golden files hold only what their code computed from these. numpy's generator makes the numbers,
because its stream is guaranteed to stay the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from methods.panet import panet_files as files

CLASSES = 6
# Two channels in each of the 32 groups of a norm, one where the mask head's branch halves them.
WIDTH, FIRST, FC_DIM = 64, 16, 48
TRUNK_DIMS = (16, 32, 64, 128)
# The original image, the network input before and after padding. The shorter side tells the scale:
# 119 * 120 / 89 = 160.4.
ORIGINAL_HW, IMAGE_HW, INPUT_HW = (89, 119), (120, 160), (128, 160)
MIN_SIZE, MAX_SIZE = 120, 200
PRE_NMS, POST_NMS, DETECTIONS = 40, 50, 20
# Every so many values of what is large are in the file.
PROBE = {"maps": 7, "rpn": 3, "mask_logits": 5}


@dataclass(frozen=True)
class Variant:
    """PANet without the trunk.

    Attributes:
        two_fc: the box head has two fully connected layers, no convolutions.
        masks: there is the mask head, with its fully connected branch.
        seed: of the weights. Chosen so that rounding decides nothing.
    """

    two_fc: bool
    masks: bool
    seed: int


VARIANTS = {
    "panet_mask": Variant(two_fc=False, masks=True, seed=1),
    "panet_2fc": Variant(two_fc=True, masks=False, seed=10),
}

# What is multiplied to the weights and added to the bias of a layer, so that regions have all
# sizes and some are objects.
_LAYERS = {
    "RPN.FPN_RPN_conv": (1.5, 0.0),
    "RPN.FPN_RPN_cls_score": (2.0, -1.0),
    "RPN.FPN_RPN_bbox_pred": (0.5, 0.0),
    "Box_Outs.cls_score": (1.2, 0.0),
    "Box_Outs.bbox_pred": (2.0, 0.0),
    "Mask_Outs.classify": (2.0, 0.0),
    "Mask_Head.mask_fc": (1.5, 0.0),
}


def shapes(variant):
    """Return shape by the authors' key, in a fixed order."""
    found = files.body(first=FIRST, width=WIDTH)
    found = {n: s for n, s in found.items() if not n.startswith("Conv_Body.conv_body")}
    head = files.box_head_2fc if variant.two_fc else files.box_head
    found |= head(CLASSES, width=WIDTH, fc=FC_DIM if not variant.two_fc else WIDTH)
    return found | (files.mask_head(CLASSES, width=WIDTH) if variant.masks else {})


def weights(variant):
    """Return seeded tensors by the authors' key."""
    generator = np.random.Generator(np.random.PCG64(variant.seed))
    found = {}
    for key, shape in shapes(variant).items():
        values = generator.standard_normal(shape)
        gain, bias = next((v for k, v in _LAYERS.items() if key.startswith(k)), (1.0, 0.0))
        if key.endswith("bias"):
            values = 0.1 * values + bias
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            values = gain * values / np.sqrt(np.prod(shape[1:]))
        found[key] = torch.from_numpy(np.asarray(values)).float()
    return found


def features(seed=11):
    """Return smooth seeded maps of the trunk, fine to coarse, of one image."""
    generator = np.random.Generator(np.random.PCG64(seed))
    maps = []
    for level, dim in enumerate(TRUNK_DIMS):
        size = tuple(side // (4 * 2**level) for side in INPUT_HW)
        coarse = torch.from_numpy(generator.standard_normal((1, dim, 4, 5))).float()
        noise = torch.from_numpy(generator.standard_normal((1, dim, *size))).float()
        smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        maps.append((smooth + 0.2 * noise).relu())
    return maps
