"""Seeded weights under the authors' key names, and the inputs that go with them.

The golden files hold only what their code computed from these. numpy's generator makes the numbers,
because its stream is guaranteed to stay the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CLASSES, RAYS = 3, 36
# Two channels in each of the 32 groups of a norm.
TRUNK_DIMS, WIDTH, NUM_CONVS = (24, 32, 40), 64, 2
STRIDES = (8, 16, 32, 64, 128)
# Padded network input, the image in it, and the image as it was before it was stretched.
INPUT_HW, IMAGE_HW, ORIGINAL_HW = (384, 512), (370, 500), (333, 600)
NMS_PRE = 150


@dataclass(frozen=True)
class Variant:
    """PolarMask without the trunk.

    Attributes:
        deform: the towers are deformable convolutions v2.
        mask_nms: NMS compares the boxes around the polygons.
        probe: the golden file holds the raw outputs of every so many locations.
        seed: of the weights. Chosen so that rounding decides nothing: no probability, overlap or
            rank, and no coordinate of a vertex, is so close to where it is cut that the noise of
            float32 could matter.
    """

    deform: bool
    mask_nms: bool
    probe: int
    seed: int


VARIANTS = {
    "polarmask": Variant(deform=False, mask_nms=False, probe=9, seed=1),
    "polarmask_dcn": Variant(deform=True, mask_nms=True, probe=17, seed=24),
}

# What is multiplied to the weights and added to the bias of a layer, so that something is detected
# and objects are neither tiny nor larger than the image.
_LAYERS = {
    "bbox_head.polar_cls": (2.5, -6.5),
    "bbox_head.polar_reg": (0.3, 3.3),
    "bbox_head.polar_mask": (0.3, 3.3),
    "bbox_head.polar_centerness": (2.0, 0.0),
}


def shapes(variant):
    """Return shape by the authors' key, in a fixed order."""
    layers = {f"neck.lateral_convs.{n}.conv": (WIDTH, dim, 1) for n, dim in enumerate(TRUNK_DIMS)}
    layers |= {f"neck.fpn_convs.{n}.conv": (WIDTH, WIDTH, 3) for n in range(5)}
    predictors = {"cls": CLASSES, "reg": 4, "mask": RAYS, "centerness": 1}
    layers |= {f"bbox_head.polar_{k}": (dim, WIDTH, 3) for k, dim in predictors.items()}
    found = {}
    for name, (out_dim, in_dim, size) in layers.items():
        found |= {f"{name}.weight": (out_dim, in_dim, size, size), f"{name}.bias": (out_dim,)}
    for tower in ("cls", "reg", "mask"):
        for q in range(NUM_CONVS):
            found |= _block(variant, f"bbox_head.{tower}_convs", q)
    for kind in ("bbox", "mask"):
        found |= {f"bbox_head.scales_{kind}.{level}.scale": () for level in range(len(STRIDES))}
    return found


def _block(variant, tower, q):
    """Return the shapes of convolution ``q`` of a tower and of its norm."""
    kernel = (WIDTH, WIDTH, 3, 3)
    if not variant.deform:
        found, norm = {f"{tower}.{q}.conv.weight": kernel}, f"{tower}.{q}.gn"
    else:
        conv, norm = f"{tower}.{3 * q}", f"{tower}.{3 * q + 1}"
        found = {f"{conv}.weight": kernel, f"{conv}.bias": kernel[:1]}
        found[f"{conv}.conv_offset_mask.weight"] = (27, *kernel[1:])
        found[f"{conv}.conv_offset_mask.bias"] = (27,)
    return found | {f"{norm}.weight": kernel[:1], f"{norm}.bias": kernel[:1]}


def weights(variant):
    """Return seeded tensors by the authors' key."""
    generator = np.random.Generator(np.random.PCG64(variant.seed))
    found = {}
    for key, shape in shapes(variant).items():
        values = generator.standard_normal(shape)
        gain, bias = next((v for k, v in _LAYERS.items() if key.startswith(k)), (1.0, 0.0))
        if key.endswith(".scale"):
            # The coarser a level, the larger its objects.
            values = 0.8 + 0.15 * int(key.split(".")[-2]) + 0.02 * values
        elif key.endswith("bias"):
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
    for dim, stride in zip(TRUNK_DIMS, STRIDES, strict=False):
        size = (INPUT_HW[0] // stride, INPUT_HW[1] // stride)
        coarse = torch.from_numpy(generator.standard_normal((1, dim, 6, 8))).float()
        noise = torch.from_numpy(generator.standard_normal((1, dim, *size))).float()
        smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        maps.append(smooth + 0.2 * noise)
    return maps


def ground_truth(seed=13, number=12):
    """Return seeded wobbly shapes that overlap; every third has a second part.

    Returns:
        Boxes (M, 4) inclusive in pixels of the network input, not quite those around the masks as
        in annotations; classes (M,) from 0; masks (M, H, W) bool of the padded input.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    height, width = IMAGE_HW
    ys, xs = np.mgrid[: INPUT_HW[0], : INPUT_HW[1]].astype(np.float64)
    boxes, masks = [], []
    for n in range(number):
        mask = np.zeros(INPUT_HW, dtype=bool)
        for _ in range(1 + (n % 3 == 2)):
            y, x = generator.uniform(0.15, 0.85, 2) * (height, width)
            # The larger of two parts is not always the first.
            size = np.exp(generator.uniform(np.log(0.012), np.log(0.5))) * height
            angle = np.arctan2(ys - y, xs - x)
            lobes, phase = generator.integers(2, 6), generator.uniform(0, 6)
            reach = size * (1 + 0.3 * np.sin(lobes * angle + phase))
            mask |= np.hypot(ys - y, 0.8 * (xs - x)) < reach
        mask[height:], mask[:, width:] = False, False
        rows, columns = np.where(mask)
        box = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
        box = box + generator.uniform(-1, 1, 4)
        boxes.append(box.clip(0, [width - 1, height - 1] * 2))
        masks.append(mask)
    classes = torch.from_numpy(generator.integers(0, CLASSES, number))
    return torch.tensor(np.array(boxes)).float(), classes, torch.from_numpy(np.stack(masks))
