"""Seeded weights under the authors' layer names, and the photograph and objects that go with them.

The golden file holds only what their code computed from these. numpy's generator makes the numbers,
because its stream is guaranteed to stay the same.
"""

import numpy as np
import torch
import torch.nn.functional as F
from methods.mnc import mnc_files as files

# Chosen so that rounding decides nothing.
SEED = 47
CLASSES = 3
WIDTH, RPN_DIM, MASK_DIM, FC_DIM = 4, 16, 24, 32
# The original image and the network input. In training the original has that size, too, because the
# authors compare masks in pixels of the original.
ORIGINAL_HW, IMAGE_HW = (96, 128), (120, 160)
MIN_SIZE, MAX_SIZE = 120, 200
ANCHORS = [16, 32, 64]
PRE_NMS, POST_NMS, DETECTIONS = 200, 24, 15
TRAIN_POST_NMS = 80
# So many regions are asked for in training that all are drawn, and no random number counts.
ALL = 100_000
# Every so many values of what is large are in the file.
PROBE = 3

# What is multiplied to the weights and added to the bias of a layer. A row of these weights has a
# mean of 0, so that features that are all positive give outputs of both signs.
_PREDICTORS = {
    "rpn_cls_score": (0.5, 0.0),
    "rpn_bbox_pred": (0.5, 0.0),
    "mask_pred": (2.0, 0.6),
    "cls_score": (1.5, 0.0),
    "seg_cls_score": (3.0, 0.0),
    "bbox_pred": (0.15, 0.0),
}


def weights():
    """Return seeded tensors by the names under which the reader gives the authors' arrays."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    found = {}
    layers = files.layers(
        width=WIDTH, rpn=RPN_DIM, mask_dim=MASK_DIM, dim=FC_DIM, classes=CLASSES + 1
    )
    for name, shape in layers.items():
        gain, bias = _PREDICTORS.get(name, (1.6, 0.0))
        values = generator.standard_normal(shape)
        if name in _PREDICTORS:
            values -= values.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        if name == "conv1_1":
            gain /= 30
        found[f"{name}/0"] = gain * values / np.sqrt(np.prod(shape[1:]))
        found[f"{name}/1"] = 0.1 * generator.standard_normal(shape[0]) + bias
    return {name: torch.from_numpy(values).float() for name, values in found.items()}


def image():
    """Return a smooth seeded image (3, H, W), BGR between 0 and 255."""
    generator = np.random.Generator(np.random.PCG64(11))
    coarse = torch.from_numpy(generator.standard_normal((1, 3, 7, 9))).float()
    noise = torch.from_numpy(generator.standard_normal((3, *IMAGE_HW))).float()
    smooth = F.interpolate(coarse, size=IMAGE_HW, mode="bilinear", align_corners=True)[0]
    return (128 + 50 * smooth + 12 * noise).clamp(0, 255)


def objects():
    """Return bool masks (M, H, W) at the size of the network input and classes from 0."""
    y, x = np.mgrid[: IMAGE_HW[0], : IMAGE_HW[1]]
    shapes = ((40, 50, 30, 36), (70, 112, 38, 24), (92, 40, 20, 30), (28, 130, 17, 18))
    masks = [((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1 for cy, cx, ry, rx in shapes]
    # The third object has a bay.
    masks[2] = masks[2] & ~((x > 45) & (y > 88))
    return np.stack(masks), np.array([0, 2, 1, 1])
