"""Models on a toy pyramid: the published grids, few channels, no backbone to speak of."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from instseg_ext.methods.solo.arch import SOLO, SOLOv2
from instseg_ext.methods.solo.decoupled_head import DecoupledSOLOHead
from instseg_ext.methods.solo.head import SOLOv2Head
from instseg_ext.methods.solo.inference import InferenceOptions
from instseg_ext.methods.solo.location_head import VanillaSOLOHead
from instseg_ext.methods.solo.targets import CellGrid
from instseg_ext.modeling.runtime import RuntimeOptions

DIM = 32
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


class Pyramid(Backbone):
    """Strided convolutions with the sizes of FPN, P6 included (ceil of half of P5)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 4, stride=4)
        self.down = nn.ModuleList(nn.Conv2d(DIM, DIM, 2, stride=2) for _ in range(3))

    @property
    def size_divisibility(self):
        return 32

    def output_shape(self):
        return {name: ShapeSpec(channels=DIM, stride=s) for name, s in STRIDES.items()}

    def forward(self, x):
        maps = [self.stem(x)]
        for conv in self.down:
            maps.append(conv(maps[-1]))
        maps.append(nn.functional.max_pool2d(maps[-1], 1, 2))
        return dict(zip(STRIDES, maps, strict=True))


@pytest.fixture
def published_grid():
    return CellGrid(
        num_grids=(40, 36, 24, 16, 12),
        strides=(8, 8, 16, 32, 32),
        scale_ranges=((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)),
        center_radius=0.2,
    )


HEADS = {
    "solov2": (SOLOv2Head, {"num_convs": 4, "width": 512}),
    "vanilla": (VanillaSOLOHead, {"num_convs": 7, "width": 256}),
    "decoupled": (DecoupledSOLOHead, {"num_convs": 7, "width": 256}),
    "decoupled_light": (
        DecoupledSOLOHead,
        {"num_convs": 4, "width": 256, "shared_tower": True},
    ),
}


@pytest.fixture
def make_head():
    def make(num_classes=80, dim=256, grid=None, kind="solov2", **options):
        shapes = {name: ShapeSpec(channels=dim, stride=s) for name, s in STRIDES.items()}
        head, fixed = HEADS[kind]
        return head(
            shapes,
            in_features=tuple(STRIDES),
            strides=grid.strides if grid else (8, 8, 16, 32, 32),
            num_grids=grid.num_grids if grid else (40, 36, 24, 16, 12),
            num_classes=num_classes,
            **{**fixed, **options},
        )

    return make


@pytest.fixture
def make_model(make_head):
    """Build a model with grids small enough for 64-pixel images."""

    def make(num_classes=3, grid=None, runtime=None, kind="solov2", **options):
        grid = grid or CellGrid(
            num_grids=(10, 8, 6, 4, 2),
            strides=(8, 8, 16, 32, 32),
            scale_ranges=((1, 16), (8, 32), (16, 64), (32, 128), (64, 512)),
        )
        kernels = {"kernel_dim": 32, "mask_width": 32} if kind == "solov2" else {}
        head = make_head(
            num_classes=num_classes, dim=DIM, grid=grid, kind=kind, num_convs=1, width=32, **kernels
        )
        return (SOLOv2 if kind == "solov2" else SOLO)(
            backbone=Pyramid(),
            head=head,
            grid=grid,
            num_classes=num_classes,
            pixel_mean=[100.0, 100.0, 100.0],
            pixel_std=[50.0, 50.0, 50.0],
            inference_options=InferenceOptions(**options),
            runtime=runtime or RuntimeOptions(),
        )

    return make


@pytest.fixture
def make_sample():
    """Build a loader dict with one rectangle per (x0, y0, x1, y1, class)."""

    def make(height, width, rectangles=()):
        image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        masks = torch.zeros(len(rectangles), height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1, _) in zip(masks, rectangles, strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances((height, width))
        boxes = torch.tensor([r[:4] for r in rectangles], dtype=torch.float32).reshape(-1, 4)
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor([r[4] for r in rectangles], dtype=torch.int64)
        instances.gt_masks = BitMasks(masks)
        return {"image": image, "instances": instances, "height": height, "width": width}

    return make
