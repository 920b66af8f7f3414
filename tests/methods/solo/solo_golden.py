"""Seeded weights under the authors' key names, and the inputs that go with them.

The golden files hold only what their code computed from these. numpy's generator makes the numbers,
because its stream is guaranteed to stay the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CLASSES = 3
IN_DIM, WIDTH, KERNEL_DIM, NUM_CONVS, MASK_WIDTH = 32, 64, 32, 2, 32
STRIDES = (8, 8, 16, 32, 32)
GRIDS = (12, 10, 8, 6, 4)
RANGES = ((1, 24), (12, 48), (24, 96), (48, 192), (96, 512))
INPUT_HW, IMAGE_HW, ORIGINAL_HW = (96, 128), (90, 120), (135, 181)
# The golden files of the first paper's heads hold the mask of every 11th cell.
PROBE_STEP = 11


@dataclass(frozen=True)
class Variant:
    """One of the family's heads.

    Attributes:
        kind: ``vanilla``, ``decoupled``, ``decoupled_light`` or ``solov2``.
        deform: ``none``, ``last`` (version 1, the last convolution of every tower) or ``all``
            (version 2, in towers and mask features).
        seed: of the weights. Chosen so that rounding decides nothing: no score and no pixel of a
            mask at stride 4 is within 8e-6 of its threshold, nor two scores of each other.
    """

    kind: str
    deform: str = "none"
    seed: int = 0


VARIANTS = {
    "solo": Variant("vanilla", seed=35),
    "decoupled": Variant("decoupled", seed=34),
    "decoupled_light": Variant("decoupled_light", seed=38),
    "decoupled_light_dcn": Variant("decoupled_light", "last", seed=15),
    "solov2": Variant("solov2", seed=23),
    "solov2_dcn": Variant("solov2", "all", seed=41),
}

# Towers in the order of the file, with the coordinates each sees.
_TOWERS = {
    "vanilla": {"ins_convs": 2, "cate_convs": 0},
    "decoupled": {"ins_convs_x": 1, "ins_convs_y": 1, "cate_convs": 0},
    "decoupled_light": {"ins_convs": 2, "cate_convs": 0},
    "solov2": {"kernel_convs": 2, "cate_convs": 0},
}
# What is multiplied to the weights and added to the bias of a predictor, so that something is
# detected and masks are neither empty nor full.
_PREDICTORS = {
    "bbox_head.solo_cate": (1.0, -2.5),
    "bbox_head.solo_kernel": (2.0, 0.0),
    "bbox_head.solo_ins_list": (3.0, -1.5),
    "bbox_head.dsolo_cate": (1.0, -2.5),
    "bbox_head.dsolo_ins_list": (3.0, 0.5),
}


def shapes(variant):
    """Return shape by the authors' key, in a fixed order."""
    found = {}
    for tower, coordinates in _TOWERS[variant.kind].items():
        for q in range(NUM_CONVS):
            deform = variant.deform == "all" or (variant.deform == "last" and q == NUM_CONVS - 1)
            in_dim = WIDTH if q else IN_DIM + coordinates
            found |= _block(variant, f"bbox_head.{tower}.{q}", in_dim, WIDTH, 3, deform)
    for name, (out_dim, size) in _predictors(variant.kind).items():
        found[f"bbox_head.{name}.weight"] = (out_dim, WIDTH, size, size)
        found[f"bbox_head.{name}.bias"] = (out_dim,)
    return found | _mask_features(variant) if variant.kind == "solov2" else found


def _block(variant, prefix, in_dim, out_dim, size, deform):
    """Return the shapes of a convolution with norm."""
    found = {f"{prefix}.conv.weight": (out_dim, in_dim, size, size)}
    if deform:
        numbers = (3 if variant.deform == "all" else 2) * size * size
        found[f"{prefix}.conv.conv_offset.weight"] = (numbers, in_dim, size, size)
        found[f"{prefix}.conv.conv_offset.bias"] = (numbers,)
    return found | {f"{prefix}.gn.weight": (out_dim,), f"{prefix}.gn.bias": (out_dim,)}


def _predictors(kind):
    """Return output channels and kernel size of the predictors."""
    if kind == "solov2":
        return {"solo_cate": (CLASSES, 3), "solo_kernel": (KERNEL_DIM, 3)}
    if kind == "vanilla":
        masks = {f"solo_ins_list.{level}": (side**2, 1) for level, side in enumerate(GRIDS)}
        return {"solo_cate": (CLASSES, 3)} | masks
    masks = {
        f"dsolo_ins_list_{axis}.{level}": (side, 3)
        for axis in "xy"
        for level, side in enumerate(GRIDS)
    }
    return {"dsolo_cate": (CLASSES, 3)} | masks


def _mask_features(variant):
    """Return the shapes of SOLOv2's mask features."""
    found, deform = {}, variant.deform == "all"
    for m in range(4):
        for q in range(max(m, 1)):
            in_dim = MASK_WIDTH if q else IN_DIM + 2 * (m == 3)
            prefix = f"mask_feat_head.convs_all_levels.{m}.conv{q}"
            found |= _block(variant, prefix, in_dim, MASK_WIDTH, 3, deform)
    return found | _block(variant, "mask_feat_head.conv_pred.0", MASK_WIDTH, KERNEL_DIM, 1, deform)


def weights(variant):
    """Return seeded tensors by the authors' key."""
    generator = np.random.Generator(np.random.PCG64(variant.seed))
    found = {}
    for key, shape in shapes(variant).items():
        values = generator.standard_normal(shape)
        gain, bias = next((v for k, v in _PREDICTORS.items() if key.startswith(k)), (1.0, 0.0))
        if key.endswith("gn.weight"):
            values = 1 + 0.1 * values
        elif key.endswith("bias"):
            values = 0.1 * values + bias
        else:
            values = gain * values / np.sqrt(np.prod(shape[1:]))
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
