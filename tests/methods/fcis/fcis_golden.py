"""Seeded weights under the authors' names, an image and its objects.

The golden file holds only what their code computed from these, and the biases of the predictors.
numpy's generator makes the numbers, because its stream is guaranteed to stay the same.
"""

import numpy as np
from methods.fcis import fcis_files as files

# Classes with the background, as the authors count.
CLASSES = 4
# Of the original width: 4 channels in the stem, 16 to 128 behind the stages.
DIVISOR = 16
# The original image, and the network input, which no stride divides.
ORIGINAL_HW, IMAGE_HW = (90, 120), (113, 151)
MAX_SIZE = 200
SIZES = (16, 32, 64)
PRE_NMS, POST_NMS, MIN_SIZE, DETECTIONS = 300, 40, 8, 100
OHEM_ROIS = 24
SEED = 1
# (x1, y1, x2, y2), the last pixels included, and the class.
OBJECTS = np.array(
    [
        (10, 12, 57, 70, 1),
        (60, 31, 139, 101, 2),
        (30, 60, 61, 99, 3),
        # With these two, less than a batch of anchors gets a label: none is drawn.
        (90, 5, 147, 40, 1),
        (66, 72, 97, 103, 2),
    ]
)
# Every so many values of what is large are in the file.
PROBE = {"res4": 5, "res5": 5, "rpn_deltas": 3, "scores": 11, "boxes": 11, "masks": 7, "grads": 5}
# Gradients in the file.
GRADIENTS = (
    "rpn_conv_3x3_weight",
    "rpn_cls_score_bias",
    "rpn_bbox_pred_bias",
    "conv_new_1_weight",
    "fcis_cls_seg_bias",
    "fcis_bbox_bias",
    "res5c_branch2b_weight",
    "bn4b22_branch2a_gamma",
    "res3a_branch1_weight",
)

# What is multiplied to the weights of a predictor, so that regions have all sizes and some are
# objects. Its input is positive: weights that add up to zero see its differences.
_PREDICTORS = {"rpn_cls_score": 0.3, "rpn_bbox_pred": 0.25, "fcis_cls_seg": 1.0, "fcis_bbox": 0.4}
# Maps of one class or coordinate, and the share of each that is its own.
_GROUPS = {"fcis_cls_seg": (98, 1.0), "fcis_bbox": (49, 0.5)}


def shapes():
    """Return shape by the authors' name."""
    width = 64 // DIVISOR
    found = files.resnet(101, width, width, 4 * width)
    sizes = {"res4": 16 * width, "res5": 32 * width, "rpn": 8 * width, "dim": 16 * width}
    found |= files.heads(CLASSES, 3 * len(SIZES), **sizes)
    return {name: shape for name, shape in found.items() if not name.endswith("_test")}


def weights(biases):
    """Return seeded arrays by the authors' name; ``biases`` replace those of the predictors."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    found = {}
    for key, shape in sorted(shapes().items()):
        name = key.partition(":")[2]
        layer, _, kind = name.rpartition("_")
        values = generator.standard_normal(shape)
        if kind == "gamma":
            values = (0.25 if layer.endswith("branch2c") else 1.0) * (1 + 0.1 * values)
        elif kind == "var":
            values = 1 + 0.1 * values.clip(-3, 3)
        elif kind != "weight":
            values = 0.1 * values
        else:
            values *= np.sqrt(2 / np.prod(shape[1:]))
            if layer == "conv1":
                values /= 60
            if layer in _GROUPS:
                number, own = _GROUPS[layer]
                shared = generator.standard_normal((shape[0] // number, 1, *shape[1:]))
                shared *= np.sqrt(2 / np.prod(shape[1:]))
                values = own * values.reshape(-1, number, *shape[1:])
                values = (values + shared).reshape(shape)
            if layer in _PREDICTORS:
                values = _PREDICTORS[layer] * (values - values.mean(axis=1, keepdims=True))
        found[key] = biases.get(name, values).astype(np.float32)
    return found


def image():
    """Return the network input (H, W, 3) uint8, BGR."""
    generator = np.random.Generator(np.random.PCG64(SEED + 1))
    height, width = IMAGE_HW
    coarse = generator.integers(30, 226, (8, 10, 3))
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 10 // width
    noise = generator.integers(-30, 30, (height, width, 3))
    return (coarse[rows][:, columns] + noise).astype(np.uint8)


def masks():
    """Return the objects' masks (M, H, W) bool: ellipses that fill their boxes."""
    y, x = np.mgrid[: IMAGE_HW[0], : IMAGE_HW[1]]
    found = []
    for x1, y1, x2, y2, _ in OBJECTS:
        across = (2 * x - x1 - x2) / (x2 - x1 + 1)
        down = (2 * y - y1 - y2) / (y2 - y1 + 1)
        found.append(across**2 + down**2 <= 1)
    return np.stack(found)
