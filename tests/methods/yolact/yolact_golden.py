"""Seeded weights under the authors' key names, and the inputs that go with them.

The golden files hold only what their code computed from these. numpy's generator makes the numbers,
because its stream is guaranteed to stay the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CLASSES, PROTOS = 3, 8
TRUNK_DIMS, WIDTH = (24, 32, 40), 32
RATIOS = (1.0, 0.5, 2.0)
ORIGINAL_HW = (101, 147)
MASKS_TO_TRAIN = 10_000


@dataclass(frozen=True)
class Variant:
    """YOLACT or YOLACT++, without the trunk.

    Attributes:
        size: sides of the network input in pixels.
        trunk: sides of the trunk's three maps.
        scales: per level, in pixels of the network input.
        square: all anchors are squares.
        mask_iou: masks are scored.
        background: what is added to the bias of the background, so that some anchors find nothing.
        probe: the golden file holds the raw outputs of every so many anchors; no multiple of 3.
        proto_probe: likewise for rows and columns of prototypes.
        seed: of the weights. Chosen so that rounding decides nothing: no score, no overlap and no
            pixel of a mask at full size is closer than 5e-6 to its threshold, nor a score that
            close to another one where the order matters.
    """

    size: int
    trunk: tuple[int, int, int]
    scales: tuple[tuple[float, ...], ...]
    square: bool
    mask_iou: bool
    background: float
    probe: int
    proto_probe: int
    seed: int

    @property
    def anchors(self) -> int:
        """Anchors per cell."""
        return len(self.scales[0]) * len(RATIOS)


VARIANTS = {
    "yolact": Variant(
        size=138,
        trunk=(18, 9, 5),
        scales=((20.0,), (40.0,), (80.0,), (160.0,), (320.0,)),
        square=True,
        mask_iou=False,
        background=4.5,
        probe=2,
        proto_probe=1,
        seed=1,
    ),
    "yolact_plus": Variant(
        size=260,
        trunk=(33, 17, 9),
        scales=tuple(
            tuple(base * 2 ** (step / 3) for step in range(3)) for base in (12, 24, 48, 96, 192)
        ),
        square=False,
        mask_iou=True,
        background=8.0,
        probe=23,
        proto_probe=3,
        seed=6,
    ),
}

# What is multiplied to the weights and added to the bias of a layer, so that something is detected,
# masks are neither empty nor full, and predicted IoUs lie between 0 and 1.
_LAYERS = {
    # The coarser a level, the more its objects stand out: some of all sizes are found.
    "fpn.pred_layers.0": (1.8, 0.0),
    "fpn.pred_layers.1": (1.4, 0.0),
    "fpn.downsample_layers": (1.6, 0.0),
    "proto_net.10": (1.0, 0.3),
    "proto_net": (1.4, 0.0),
    "prediction_layers.0.upfeature": (1.4, 0.0),
    "prediction_layers.0.bbox_layer": (0.6, 0.0),
    "prediction_layers.0.conf_layer": (2.0, 0.0),
    "prediction_layers.0.mask_layer": (1.5, 0.0),
    "semantic_seg_conv": (1.0, -1.0),
    "maskiou_net.maskiou_net.10": (1.0, 0.3),
    "maskiou_net.maskiou_net.0": (3.0, -0.2),
    "maskiou_net": (1.4, 0.0),
}


def shapes(variant):
    """Return shape by the authors' key, in a fixed order."""
    # Their pyramid is stored from the coarsest level to the finest.
    layers = {f"fpn.lat_layers.{n}": (WIDTH, dim, 1) for n, dim in enumerate(reversed(TRUNK_DIMS))}
    layers |= {f"fpn.pred_layers.{n}": (WIDTH, WIDTH, 3) for n in range(3)}
    layers |= {f"fpn.downsample_layers.{n}": (WIDTH, WIDTH, 3) for n in range(2)}
    layers |= {f"proto_net.{n}": (WIDTH, WIDTH, 3) for n in (0, 2, 4, 8)}
    layers["proto_net.10"] = (PROTOS, WIDTH, 1)
    head = "prediction_layers.0"
    layers[f"{head}.upfeature.0"] = (WIDTH, WIDTH, 3)
    layers[f"{head}.bbox_layer"] = (variant.anchors * 4, WIDTH, 3)
    layers[f"{head}.conf_layer"] = (variant.anchors * (CLASSES + 1), WIDTH, 3)
    layers[f"{head}.mask_layer"] = (variant.anchors * PROTOS, WIDTH, 3)
    layers["semantic_seg_conv"] = (CLASSES, WIDTH, 1)
    if variant.mask_iou:
        widths = (1, 8, 16, 32, 64, 128)
        for n in range(5):
            layers[f"maskiou_net.maskiou_net.{2 * n}"] = (widths[n + 1], widths[n], 3)
        layers["maskiou_net.maskiou_net.10"] = (CLASSES, widths[-1], 1)
    found = {}
    for name, (out_dim, in_dim, size) in layers.items():
        found[f"{name}.weight"] = (out_dim, in_dim, size, size)
        found[f"{name}.bias"] = (out_dim,)
    return found


def weights(variant):
    """Return seeded tensors by the authors' key."""
    generator = np.random.Generator(np.random.PCG64(variant.seed))
    found = {}
    for key, shape in shapes(variant).items():
        values = generator.standard_normal(shape)
        gain, bias = next((v for k, v in _LAYERS.items() if key.startswith(k)), (1.0, 0.0))
        if key.endswith("bias"):
            values = 0.1 * values + bias
        else:
            values = gain * values / np.sqrt(np.prod(shape[1:]))
        if key.endswith("conf_layer.bias"):
            # Background is their first class.
            values[:: CLASSES + 1] += variant.background
        found[key] = torch.from_numpy(values).float()
    return found


def features(variant, seed=11):
    """Return smooth seeded maps of the trunk, fine to coarse, of one image."""
    generator = np.random.Generator(np.random.PCG64(seed))
    maps = []
    for dim, side in zip(TRUNK_DIMS, variant.trunk, strict=True):
        coarse = torch.from_numpy(generator.standard_normal((1, dim, 6, 6))).float()
        noise = torch.from_numpy(generator.standard_normal((1, dim, side, side))).float()
        smooth = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        maps.append(smooth + 0.2 * noise)
    return maps


def ground_truth(variant, seed=13, number=8, crowds=1):
    """Return seeded ellipses that overlap, the last of them crowds.

    Returns:
        Boxes (M, 4) XYXY in pixels of the network input, classes (M,), crowd flags (M,) bool and
        masks (M, size, size) bool.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    side = variant.size
    ys, xs = np.mgrid[:side, :side] + 0.5
    boxes, masks = [], []
    for _ in range(number + crowds):
        cy, cx = generator.uniform(0.1 * side, 0.9 * side, 2)
        ry, rx = generator.uniform(0.04 * side, 0.35 * side, 2)
        mask = ((ys - cy) / ry) ** 2 + ((xs - cx) / rx) ** 2 < 1
        rows, columns = np.where(mask)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        masks.append(mask)
    classes = torch.from_numpy(generator.integers(0, CLASSES, number + crowds))
    crowd = torch.arange(number + crowds) >= number
    return torch.tensor(boxes).float(), classes, crowd, torch.from_numpy(np.stack(masks))
