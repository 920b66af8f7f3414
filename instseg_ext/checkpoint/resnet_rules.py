"""Rules and facts that families share: ResNet, FPN and convolution blocks of others."""

from __future__ import annotations

from dataclasses import dataclass

from instseg_ext.checkpoint.family import Shapes
from instseg_ext.checkpoint.keymap import Rename

__all__ = ["ResNetFacts", "block_rules", "fpn_rules", "resnet_facts", "resnet_rules"]

# Blocks of res2 to res5, and whether they are bottlenecks, to depth.
_DEPTHS = {
    (2, 2, 2, 2, False): 18,
    (3, 4, 6, 3, False): 34,
    (3, 4, 6, 3, True): 50,
    (3, 4, 23, 3, True): 101,
    (3, 8, 36, 3, True): 152,
}
# Channels of an offset convolution per 3x3 kernel with one group of offsets.
_OFFSETS = {18: "v1", 27: "v2"}


def resnet_rules(source: str = "", target: str = "") -> tuple[Rename, ...]:
    """Return the rules from torchvision's names of a ResNet, which OpenMMLab shares, to ours.

    Args:
        source: prefix in the file, such as ``backbone.``.
        target: prefix here, ``backbone.bottom_up.`` for a full model, empty for a backbone alone.
    """
    here, there = f"{target}res{{a+1}}.{{b}}.", f"{source}layer{{a}}.{{b}}."
    return (
        Rename(f"{source}conv1.weight", f"{target}stem.conv1.weight"),
        Rename(f"{source}bn1.{{p*}}", f"{target}stem.conv1.norm.{{p}}"),
        Rename(f"{there}conv{{c}}.weight", f"{here}conv{{c}}.weight"),
        Rename(f"{there}bn{{c}}.{{p*}}", f"{here}conv{{c}}.norm.{{p}}"),
        Rename(f"{there}downsample.0.weight", f"{here}shortcut.weight"),
        Rename(f"{there}downsample.1.{{p*}}", f"{here}shortcut.norm.{{p}}"),
        Rename(f"{there}conv2.conv_offset.{{p*}}", f"{here}conv2_offset.{{p}}"),
        # Deformable convolutions of early OpenMMLab releases.
        Rename(f"{there}conv2_offset.{{p*}}", f"{here}conv2_offset.{{p}}"),
    )


def fpn_rules(
    source: str = "neck.", target: str = "backbone.", first_level: int = 2
) -> tuple[Rename, ...]:
    """Return the rules for OpenMMLab's FPN of convolutions with bias and without norm.

    Args:
        source: prefix in the file.
        target: prefix here.
        first_level: pyramid level of the file's convolution 0.
    """
    level = f"{{n+{first_level}}}"
    return (
        Rename(f"{source}lateral_convs.{{n}}.conv.{{p*}}", f"{target}fpn_lateral{level}.{{p}}"),
        Rename(f"{source}fpn_convs.{{n}}.conv.{{p*}}", f"{target}fpn_output{level}.{{p}}"),
    )


def block_rules(source: str, target: str) -> tuple[Rename, ...]:
    """Return the rules for one of OpenMMLab's blocks of convolution and norm.

    The convolution may be deformable: the layer that makes its offsets lies in it, in files of
    early releases beside it.

    Args:
        source: the block in the file, with holes.
        target: the convolution here, of which the norm is a part.
    """
    return (
        Rename(f"{source}.conv.conv_offset.{{p*}}", f"{target}.offset.{{p}}"),
        Rename(f"{source}.conv_offset.{{p*}}", f"{target}.offset.{{p}}"),
        Rename(f"{source}.conv.{{p:weight|bias}}", f"{target}.{{p}}"),
        Rename(f"{source}.{{norm:bn|gn}}.{{p*}}", f"{target}.norm.{{p}}"),
    )


@dataclass(frozen=True)
class ResNetFacts:
    """What the shapes of a ResNet tell.

    Attributes:
        depth: 18, 34, 50, 101, 152; 0 if it is none of these.
        groups: of the 3x3 convolutions; more than 1 for ResNeXt.
        width_per_group: of res2.
        deform: deformable convolution in res3 to res5: ``""``, ``"v1"`` or ``"v2"``; ``"?"`` for
            anything else.
    """

    depth: int
    groups: int = 1
    width_per_group: int = 64
    deform: str = ""

    @property
    def text(self) -> str:
        """In words, such as ``"ResNeXt-101 64x4d with deformable convolution v2"``."""
        name = f"ResNet-{self.depth}" if self.depth else "an unknown ResNet"
        if self.groups > 1:
            name = f"ResNeXt-{self.depth} {self.groups}x{self.width_per_group}d"
        return f"{name} with deformable convolution {self.deform}" if self.deform else name


def resnet_facts(shapes: Shapes, prefix: str = "backbone.bottom_up.") -> ResNetFacts:
    """Read the facts of a ResNet with our names.

    Args:
        shapes: by converted name.
        prefix: of the ResNet; empty for a backbone alone.
    """

    def blocks(stage: int) -> int:
        count = 0
        while f"{prefix}res{stage}.{count}.conv1.weight" in shapes:
            count += 1
        return count

    first = f"{prefix}res2.0."
    bottleneck = f"{first}conv3.weight" in shapes
    depth = _DEPTHS.get((*(blocks(stage) for stage in range(2, 6)), bottleneck), 0)
    width, per_group = shapes.get(f"{first}conv2.weight", (64, 64))[:2]
    return ResNetFacts(
        depth, max(width // max(per_group, 1), 1), per_group, _deform(shapes, prefix)
    )


def _deform(shapes: Shapes, prefix: str) -> str:
    """Find the kind of deformable convolution in res3 to res5, in all blocks or in none."""
    stages = tuple(f"{prefix}res{stage}." for stage in (3, 4, 5))
    kinds = set()
    for name in shapes:
        if name.startswith(stages) and name.endswith(".conv2.weight"):
            offset = shapes.get(name.replace(".conv2.weight", ".conv2_offset.weight"))
            kinds.add(_OFFSETS.get(offset[0], "?") if offset else "")
    return kinds.pop() if len(kinds) == 1 else ("?" if kinds else "")
