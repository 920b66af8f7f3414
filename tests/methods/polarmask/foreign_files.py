"""State dicts with the names of the PolarMask authors, written from their modules, not our map.

Everything is a shape by name until `tensors` fills it, so that full-size models cost nothing.
"""

from __future__ import annotations

from methods import foreign
from methods.foreign import SMALL, block, conv

TOWERS = ("cls", "reg", "mask")
LEVELS = 5
# Names of the predictors since 2019-11-12 and before, when those of FCOS were kept.
NEW, OLD = "polar", "fcos"
# Channels of an offset convolution with nine taps.
V1, V2 = 18, 27


def backbone(depth=50, *, fpn=256, **options):
    """A ResNet and the pyramid, which has two convolutions more than it reads stages."""
    shapes, channels = foreign.resnet(depth, early_names=True, **options)
    return shapes | foreign.fpn(channels[1:], fpn, extra=2)


def tower(name, width, channels, *, deform=False):
    """Four convolutions with group norm; deformable ones are a list of layers of all kinds."""
    shapes = {}
    for q in range(4):
        depth = width if q else channels
        if deform:
            layer = f"{name}.{3 * q}"
            shapes |= conv(layer, width, depth) | conv(f"{layer}.conv_offset_mask", V2, depth)
            shapes |= {f"{name}.{3 * q + 1}.{p}": (width,) for p in ("weight", "bias")}
        else:
            shapes |= block(f"{name}.{q}", width, depth)
    return shapes


def scales(name):
    return {f"bbox_head.{name}.{level}.scale": () for level in range(LEVELS)}


def head(names=NEW, *, deform=False, width=256, fpn=256, classes=80, rays=36):
    shapes = {}
    for kind in TOWERS:
        shapes |= tower(f"bbox_head.{kind}_convs", width, fpn, deform=deform)
    channels = {"cls": classes, "reg": 4, "mask": rays, "centerness": 1}
    for kind, out in channels.items():
        shapes |= conv(f"bbox_head.{names}_{kind}", out, width)
    return shapes | scales("scales_bbox") | scales("scales_mask")


def fcos_head(*, classes=80):
    """The head of MMDetection's FCOS: one tower and one kind of scales less."""
    shapes = {
        name: shape
        for name, shape in head(OLD, classes=classes).items()
        if "mask" not in name and "scales" not in name
    }
    return shapes | scales("scales")


def polarmask(depth=50, names=NEW, **options):
    return backbone(depth, **options) | head(names)


def polarmask_dcn(depth=50, names=NEW, offsets=V1, **options):
    """The models called dcn2: offsets of version 1 in the backbone, of version 2 in the head."""
    return backbone(depth, offsets=offsets, **options) | head(names, deform=True)


def fcos(depth=50, **options):
    return backbone(depth, **options) | fcos_head()


def small(names=NEW, *, deform=False, classes=3):
    """Shapes of a model of 0.4 million parameters; see SMALL_OPTS for its config."""
    offsets = V1 if deform else 0
    return backbone(offsets=offsets, sizes=SMALL, fpn=32) | head(
        names, deform=deform, width=32, fpn=32, classes=classes
    )


SMALL_OPTS = (
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 32),
    *("MODEL.POLARMASK.WIDTH", 32, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
)
