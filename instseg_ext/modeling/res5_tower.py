"""The last stage of a ResNet as the layers of a region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet
from torch import Tensor, nn

__all__ = ["Res5Tower", "build_res5_tower"]

# Blocks in the last stage of a ResNet of this depth.
_BLOCKS = {18: 2, 34: 3, 50: 3, 101: 3, 152: 3}


class Res5Tower(nn.Module):
    """The last stage of a ResNet, averaged over the region."""

    def __init__(self, blocks: Sequence[nn.Module], out_dim: int) -> None:
        """Keep the blocks, the first of which halves the region, and their number of channels."""
        super().__init__()
        # Not named res5: every tower would ask for the one last stage of an ImageNet model.
        self.blocks, self.out_dim = nn.Sequential(*blocks), out_dim

    def forward(self, regions: Tensor) -> Tensor:
        """Map (R, C, P, P) to (R, out_dim)."""
        return self.blocks(regions).mean(dim=(2, 3))


def build_res5_tower(
    cfg: CfgNode, channels: int, *, tower_key: str, features_key: str
) -> Res5Tower:
    """Build a tower of the last stage of the ResNet in ``MODEL.RESNETS``.

    Args:
        cfg: the config.
        channels: C.
        tower_key: key that asks for it, for messages.
        features_key: key that names the map it reads, for messages.

    Raises:
        ValueError: if the map is not that of the stage before.
    """
    nets = cfg.MODEL.RESNETS
    out_dim = nets.RES2_OUT_CHANNELS * 8
    if nets.DEPTH not in _BLOCKS or channels * 2 != out_dim:
        raise ValueError(
            f"{tower_key} res5 reads res4 of a ResNet: set {features_key} to ['res4'] of such a "
            f"backbone, or {tower_key} to fc."
        )
    blocks = _BLOCKS[nets.DEPTH]
    options: dict[str, Any] = {
        "stride_per_block": [2] + [1] * (blocks - 1),
        "in_channels": channels,
        "out_channels": out_dim,
        "norm": nets.NORM,
    }
    if nets.DEPTH < 50:
        return Res5Tower(ResNet.make_stage(BasicBlock, blocks, **options), out_dim)
    options |= {
        "bottleneck_channels": nets.NUM_GROUPS * nets.WIDTH_PER_GROUP * 8,
        "num_groups": nets.NUM_GROUPS,
        "stride_in_1x1": nets.STRIDE_IN_1X1,
    }
    return Res5Tower(ResNet.make_stage(BottleneckBlock, blocks, **options), out_dim)
