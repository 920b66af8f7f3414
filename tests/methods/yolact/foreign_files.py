"""State dicts with the names of YOLACT and YolactEdge, written from their naming, not from our map.

Everything is a shape by name until `tensors` fills it, so that full-size models cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.foreign import BLOCKS, batch_norm, conv

DARKNET_BLOCKS = (1, 2, 8, 8, 4)
# Expansion, channels, blocks of each stage of MobileNetV2.
MOBILENET = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
SHIFTS_AND_FACTORS = 27  # channels of an offset convolution with nine taps


@dataclass(frozen=True)
class Sizes:
    """Widths; those of the published models unless a test wants them small."""

    stem: int = 64
    first: int = 256
    width: int = 256
    prototypes: int = 32


SMALL = Sizes(stem=8, first=16, width=16, prototypes=4)


def layer(name, norm, shape):
    """A convolution without bias and the batch norm behind it."""
    return {f"{name}.weight": shape} | batch_norm(norm, shape[0])


def resnet(depth, *, interval=0, duplicates=False, sizes=Sizes()):
    """A ResNet and the channels that the pyramid reads.

    Args:
        interval: every how many blocks of the last three stages are deformable; 0 for none.
        duplicates: name the stages a second time, as version 1.0 did.
    """
    shapes = layer("backbone.conv1", "backbone.bn1", (sizes.stem, 3, 7, 7))
    channels = sizes.stem
    for stage, blocks in enumerate(BLOCKS[depth]):
        out = sizes.first * 2**stage
        inner = out // 4
        for number in range(blocks):
            here = f"backbone.layers.{stage}.{number}"
            shapes |= layer(f"{here}.conv1", f"{here}.bn1", (inner, channels, 1, 1))
            shapes |= layer(f"{here}.conv2", f"{here}.bn2", (inner, inner, 3, 3))
            if interval and stage and number % interval == 0:
                shapes[f"{here}.conv2.bias"] = (inner,)
                shapes |= conv(f"{here}.conv2.conv_offset_mask", SHIFTS_AND_FACTORS, inner)
            shapes |= layer(f"{here}.conv3", f"{here}.bn3", (out, inner, 1, 1))
            if channels != out:
                shapes |= layer(
                    f"{here}.downsample.0", f"{here}.downsample.1", (out, channels, 1, 1)
                )
            channels = out
    if duplicates:
        shapes |= {
            name.replace(f"layers.{stage}", f"layer{stage + 1}"): shape
            for stage in range(4)
            for name, shape in shapes.items()
            if name.startswith(f"backbone.layers.{stage}.")
        }
    return shapes, [sizes.first * 2**stage for stage in (1, 2, 3)]


def darknet(prefix="backbone.", stem=32):
    shapes = layer(f"{prefix}_preconv.0", f"{prefix}_preconv.1", (stem, 3, 3, 3))
    channels = stem
    for stage, blocks in enumerate(DARKNET_BLOCKS):
        here = f"{prefix}layers.{stage}"
        shapes |= layer(f"{here}.0.0", f"{here}.0.1", (2 * channels, channels, 3, 3))
        for number in range(1, blocks + 1):
            for i, shape in (
                (1, (channels, 2 * channels, 1, 1)),
                (2, (2 * channels, channels, 3, 3)),
            ):
                name = f"{here}.{number}.conv{i}"
                shapes |= layer(f"{name}.0", f"{name}.1", shape)
        channels *= 2
    return shapes, [8 * stem, 16 * stem, 32 * stem]


def mobilenet():
    shapes = layer("backbone.layers.0.0", "backbone.layers.0.1", (32, 3, 3, 3))
    channels = 32
    for stage, (expansion, out, blocks) in enumerate(MOBILENET, start=1):
        for number in range(blocks):
            here = f"backbone.layers.{stage}.{number}.conv"
            hidden, i = channels * expansion, 0
            if expansion > 1:
                shapes |= layer(f"{here}.0.0", f"{here}.0.1", (hidden, channels, 1, 1))
                i = 1
            shapes |= layer(f"{here}.{i}.0", f"{here}.{i}.1", (hidden, 1, 3, 3))
            shapes |= layer(f"{here}.{i + 1}", f"{here}.{i + 2}", (out, hidden, 1, 1))
            channels = out
    shapes |= layer("backbone.layers.8.0", "backbone.layers.8.1", (1280, channels, 1, 1))
    return shapes, [32, 64, 160]


def pyramid(inputs, *, laterals="fpn", outputs="fpn", downsample=2, sizes=Sizes()):
    """The coarsest level comes first; version 1.0 may have more than 2 ``downsample`` layers."""
    width = sizes.width
    shapes = {}
    for n, channels in enumerate(reversed(inputs)):
        shapes |= conv(f"{laterals}.lat_layers.{n}", width, channels, kernel=1)
        shapes |= conv(f"{outputs}.pred_layers.{n}", width, width)
    for n in range(downsample):
        shapes |= conv(f"{outputs}.downsample_layers.{n}", width, width)
    return shapes


def head(*, anchors=3, classes=80, mask_iou=False, sizes=Sizes()):
    width = sizes.width
    shapes = {}
    for n in (0, 2, 4, 8):
        shapes |= conv(f"proto_net.{n}", width, width)
    shapes |= conv("proto_net.10", sizes.prototypes, width, kernel=1)
    here = "prediction_layers.0"
    shapes |= conv(f"{here}.upfeature.0", width, width)
    shapes |= conv(f"{here}.bbox_layer", 4 * anchors, width)
    shapes |= conv(f"{here}.conf_layer", (classes + 1) * anchors, width)
    shapes |= conv(f"{here}.mask_layer", sizes.prototypes * anchors, width)
    if mask_iou:
        channels = 1
        for n in range(5):
            out = 8 * 2**n
            shapes |= conv(f"maskiou_net.maskiou_net.{2 * n}", out, channels)
            channels = out
        shapes |= conv("maskiou_net.maskiou_net.10", classes, channels, kernel=1)
    return shapes | conv("semantic_seg_conv", classes, width, kernel=1)


def yolact(backbone, *, downsample=2, classes=80, sizes=Sizes()):
    shapes, inputs = backbone
    shapes |= pyramid(inputs, downsample=downsample, sizes=sizes)
    return shapes | head(classes=classes, sizes=sizes)


def yolact_plus(depth, interval, *, classes=80, sizes=Sizes()):
    shapes, inputs = resnet(depth, interval=interval, sizes=sizes)
    shapes |= pyramid(inputs, sizes=sizes)
    return shapes | head(anchors=9, classes=classes, mask_iou=True, sizes=sizes)


def yolact_edge(backbone, *, classes=80, video=False):
    shapes, inputs = backbone
    shapes |= pyramid(inputs, laterals="fpn_phase_1", outputs="fpn_phase_2")
    return shapes | head(classes=classes) | (flow() if video else {})


def flow():
    """The layers of the video models: those that warp, and those that refine what was warped."""
    shapes = conv("flow_net_pre_convs.convs.0.0", 64, 256)
    channels = 128
    for n in (1, 2, 3):
        out = 64 * 2 ** (n - 1)
        shapes |= conv(f"flow_net.conv{n}.0.0", out, channels)
        shapes |= conv(f"flow_net.conv{n}.1.0", out, out)
        channels = out
    for n, channels in ((3, 256), (2, 258), (1, 130)):
        shapes[f"flow_net.pred{n}.conv.weight"] = (2, channels, 3, 3)
        shapes |= conv(f"flow_net.pred{n}.scale", 256, channels, kernel=1)
        shapes |= conv(f"flow_net.pred{n}.bias", 256, channels, kernel=1)
    for n, out, channels in ((3, 128, 256), (2, 64, 258)):
        shapes[f"flow_net.upfeat{n}.weight"] = (out, channels, 3, 3)
        shapes[f"flow_net.upflow{n}.weight"] = (2, 2, 3, 3)
    for n in (0, 1):
        shapes |= conv(f"spa.refine_convs.{n}.0", 256, 512)
    return shapes
