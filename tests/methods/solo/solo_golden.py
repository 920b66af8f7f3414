"""Seeded weights under the authors' key names, the inputs that go with them, and the key map.

The golden file holds only what their code computed from these. numpy's generator makes the numbers,
because its stream is guaranteed to stay the same.
"""

import re

import numpy as np
import torch
import torch.nn.functional as F

CLASSES = 3
IN_DIM, WIDTH, KERNEL_DIM, NUM_CONVS, MASK_WIDTH = 32, 64, 32, 2, 32
GRIDS = (12, 10, 8, 6, 4)
RANGES = ((1, 24), (12, 48), (24, 96), (48, 192), (96, 512))
INPUT_HW, IMAGE_HW, ORIGINAL_HW = (96, 128), (90, 120), (135, 181)

# (their pattern, our name)
KEY_MAP = [
    (r"bbox_head\.cate_convs\.(\d+)\.conv\.weight", r"head.category_tower.\1.weight"),
    (r"bbox_head\.cate_convs\.(\d+)\.gn\.", r"head.category_tower.\1.norm."),
    (r"bbox_head\.kernel_convs\.(\d+)\.conv\.weight", r"head.kernel_tower.\1.weight"),
    (r"bbox_head\.kernel_convs\.(\d+)\.gn\.", r"head.kernel_tower.\1.norm."),
    (r"bbox_head\.solo_cate\.", r"head.category_pred."),
    (r"bbox_head\.solo_kernel\.", r"head.kernel_pred."),
    (
        r"mask_feat_head\.convs_all_levels\.(\d)\.conv(\d)\.conv\.weight",
        r"head.mask_features.levels.\1.\2.weight",
    ),
    (
        r"mask_feat_head\.convs_all_levels\.(\d)\.conv(\d)\.gn\.",
        r"head.mask_features.levels.\1.\2.norm.",
    ),
    (r"mask_feat_head\.conv_pred\.0\.conv\.weight", r"head.mask_features.pred.weight"),
    (r"mask_feat_head\.conv_pred\.0\.gn\.", r"head.mask_features.pred.norm."),
]


def to_ours(key):
    """Return our name of one of the authors' keys."""
    for pattern, name in KEY_MAP:
        if re.match(pattern, key):
            return re.sub(pattern, name, key)
    raise KeyError(key)


def shapes(
    classes=CLASSES, dim=IN_DIM, width=WIDTH, kernel=KERNEL_DIM, convs=NUM_CONVS, mask=MASK_WIDTH
):
    """Return shape by the authors' key, in a fixed order."""

    def block(prefix, in_dim, out_dim, size):
        found[f"{prefix}.conv.weight"] = (out_dim, in_dim, size, size)
        found[f"{prefix}.gn.weight"] = found[f"{prefix}.gn.bias"] = (out_dim,)

    found = {}
    for tower, first in (("kernel", dim + 2), ("cate", dim)):
        for q in range(convs):
            block(f"bbox_head.{tower}_convs.{q}", width if q else first, width, 3)
    for name, out_dim in (("cate", classes), ("kernel", kernel)):
        found[f"bbox_head.solo_{name}.weight"] = (out_dim, width, 3, 3)
        found[f"bbox_head.solo_{name}.bias"] = (out_dim,)
    for m in range(4):
        for q in range(max(m, 1)):
            first = dim + 2 * (m == 3)
            prefix = f"mask_feat_head.convs_all_levels.{m}.conv{q}"
            block(prefix, mask if q else first, mask, 3)
    block("mask_feat_head.conv_pred.0", mask, kernel, 1)
    return found


def weights(key_shapes, seed=7, category_bias=-2.5, kernel_gain=2.0):
    """Return seeded tensors by the authors' key, scaled so that something is detected."""
    generator = np.random.Generator(np.random.PCG64(seed))
    found = {}
    for key, shape in key_shapes.items():
        values = generator.standard_normal(shape)
        if key.endswith("gn.weight"):
            values = 1 + 0.1 * values
        elif key.endswith("bias"):
            values = 0.1 * values + (category_bias if "solo_cate" in key else 0)
        else:
            values = values / np.sqrt(np.prod(shape[1:]))
            values *= kernel_gain if "solo_kernel" in key else 1
        found[key] = torch.from_numpy(values).float()
    return found


def features(seed=11):
    """Return smooth seeded maps P2..P6 of one image of INPUT_HW."""
    generator = np.random.Generator(np.random.PCG64(seed))
    coarse = torch.from_numpy(generator.standard_normal((1, IN_DIM, 9, 12))).float()
    maps = []
    for level in range(4):
        size = (INPUT_HW[0] >> (level + 2), INPUT_HW[1] >> (level + 2))
        noise = torch.from_numpy(generator.standard_normal((1, IN_DIM, *size))).float()
        smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        maps.append(smooth + 0.1 * noise)
    maps.append(F.max_pool2d(maps[-1], 1, 2))
    return maps


def ground_truth(seed=13, number=8):
    """Return boxes (M, 4), classes (M,), masks (M, h, w) bool: seeded ellipses that overlap."""
    generator = np.random.Generator(np.random.PCG64(seed))
    h, w = IMAGE_HW
    ys, xs = np.mgrid[:h, :w] + 0.5
    boxes, masks = [], []
    for _ in range(number):
        cy, cx = generator.uniform(10, h - 10), generator.uniform(10, w - 10)
        ry, rx = generator.uniform(4, 40), generator.uniform(4, 50)
        mask = ((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 < 1
        rows, columns = np.where(mask)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks.append(mask)
    classes = torch.from_numpy(generator.integers(0, CLASSES, number))
    return torch.tensor(boxes).float(), classes, torch.from_numpy(np.stack(masks))
