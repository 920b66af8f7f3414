"""What state dicts of other code bases share, written from their naming and not from our maps.

Everything is a shape by name until `tensors` fills it, so that full-size models cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Blocks of the four stages of a ResNet.
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
NORM = ("weight", "bias", "running_mean", "running_var")
COUNTER = ".num_batches_tracked"


@dataclass(frozen=True)
class Sizes:
    """Widths; those of the published models unless a test wants them small."""

    stem: int = 64
    first: int = 64
    expansion: int = 4


SMALL = Sizes(stem=8, first=4)


def tensors(shapes, device="meta"):
    """Fill shapes, on the CPU with random numbers and full counters."""
    if device == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {
        name: torch.tensor(7) if name.endswith(COUNTER) else torch.randn(shape) * 0.05
        for name, shape in shapes.items()
    }


def batch_norm(name, channels):
    return {f"{name}.{p}": (channels,) for p in NORM} | {f"{name}{COUNTER}": ()}


def conv(name, out, channels, kernel=3):
    return {f"{name}.weight": (out, channels, kernel, kernel), f"{name}.bias": (out,)}


# --- OpenMMLab -----------------------------------------------------------------------------------


def resnet(depth, *, offsets=0, groups=1, early_names=False, sizes=Sizes()):
    """The ResNet of OpenMMLab, and the channels of its stages.

    Args:
        offsets: channels of the offset convolutions, 0 for none.
        groups: 64 for ResNeXt 64x4d.
        early_names: those of the offset convolutions in early releases.
    """
    shapes = {"backbone.conv1.weight": (sizes.stem, 3, 7, 7)}
    shapes |= batch_norm("backbone.bn1", sizes.stem)
    basic = depth < 50
    expansion = 1 if basic else sizes.expansion
    channels = sizes.stem
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        out = sizes.first * expansion * 2 ** (stage - 1)
        # ResNeXt 64x4d: 64 groups of 4 channels in the first stage.
        inner = groups * 4 * 2 ** (stage - 1) if groups > 1 else out // expansion
        for number in range(blocks):
            name = f"backbone.layer{stage}.{number}"
            if basic:
                convs = [(out, channels, 3, 3), (out, out, 3, 3)]
            else:
                convs = [
                    (inner, channels, 1, 1),
                    (inner, inner // groups, 3, 3),
                    (out, inner, 1, 1),
                ]
            for i, shape in enumerate(convs, start=1):
                shapes[f"{name}.conv{i}.weight"] = shape
                shapes |= batch_norm(f"{name}.bn{i}", shape[0])
            if offsets and stage > 1:
                offset = f"{name}.conv2_offset" if early_names else f"{name}.conv2.conv_offset"
                shapes |= conv(offset, offsets, inner)
            if channels != out:
                shapes[f"{name}.downsample.0.weight"] = (out, channels, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.1", out)
            channels = out
    return shapes, [sizes.first * expansion * 2**i for i in range(4)]


def fpn(inputs, channels, extra=0):
    """The FPN of OpenMMLab; ``extra`` convolutions make coarser levels from the coarsest output."""
    shapes = {}
    for n, width in enumerate(inputs):
        shapes |= conv(f"neck.lateral_convs.{n}.conv", channels, width, kernel=1)
    for n in range(len(inputs) + extra):
        shapes |= conv(f"neck.fpn_convs.{n}.conv", channels, channels)
    return shapes


def block(name, out, channels, *, kernel=3, offsets=0, early_names=False):
    """A convolution with group norm, deformable if there are ``offsets`` (per 3x3 kernel)."""
    shapes = {f"{name}.conv.weight": (out, channels, kernel, kernel)}
    if offsets:
        offset = f"{name}.conv_offset" if early_names else f"{name}.conv.conv_offset"
        shapes |= conv(offset, offsets // 9 * kernel**2, channels, kernel)
    return shapes | {f"{name}.gn.weight": (out,), f"{name}.gn.bias": (out,)}
