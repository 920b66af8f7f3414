"""ResNet backbones whose deformable stages work on every device.

detectron2's own builders cannot make deformable stages without its compiled operators and cannot
train them on a CPU. The builders here take the same config keys and two more (which blocks of a
stage, and a bias) and give the same parameter names; without deformable stages they return what
detectron2's builders return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from detectron2.modeling.backbone.resnet import BottleneckBlock, ResNet, build_resnet_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from instseg_ext.layers.deform_conv import DeformConv, split_offset_mask

__all__ = [
    "DeformBottleneckBlock",
    "build_instseg_resnet_backbone",
    "build_instseg_resnet_fpn_backbone",
    "build_instseg_retinanet_resnet_fpn_backbone",
    "make_stages_deformable",
]


class DeformBottleneckBlock(CNNBlockBase):
    """Bottleneck block with a deformable 3x3 convolution, made from a plain one.

    Parameter names are those of detectron2's class of the same name: ``conv1``, ``conv2_offset``,
    ``conv2``, ``conv3``, ``shortcut``. The offsets start at zero.
    """

    def __init__(
        self, plain: BottleneckBlock, *, modulated: bool, deformable_groups: int, bias: bool = False
    ) -> None:
        """Take over the layers of ``plain``, which must not be used afterwards.

        Args:
            plain: its convolutions, norms, initial values and frozen state are kept.
            modulated: deformable convolution v2.
            deformable_groups: groups of channels with offsets of their own.
            bias: whether the deformable convolution has a bias beside its norm, zero at the start.
        """
        super().__init__(plain.in_channels, plain.out_channels, plain.stride)
        self.modulated = modulated
        old = plain.conv2
        self.shortcut = plain.shortcut
        self.conv1 = plain.conv1
        self.conv2_offset = Conv2d(
            old.in_channels,
            (27 if modulated else 18) * deformable_groups,
            kernel_size=3,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
        )
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)
        self.conv2 = DeformConv(
            old.in_channels,
            old.out_channels,
            3,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=old.groups,
            deformable_groups=deformable_groups,
            bias=bias,
            norm=old.norm,
        )
        self.conv2.weight = old.weight
        self.conv3 = plain.conv3
        if not old.weight.requires_grad:
            self.conv2_offset.requires_grad_(False)
            self.conv2.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C_out, H / stride, W / stride)."""
        out = F.relu_(self.conv1(x))
        out = self.conv2(out, *split_offset_mask(self.conv2_offset(out), self.modulated))
        out = self.conv3(F.relu_(out))
        out = out + (x if self.shortcut is None else self.shortcut(x))
        return F.relu_(out)


def make_stages_deformable(
    bottom_up: ResNet,
    on_per_stage: Sequence[bool],
    *,
    modulated: bool,
    deformable_groups: int,
    interval: int = 1,
    bias: bool = False,
) -> None:
    """Replace, in place, blocks of the chosen stages.

    Args:
        bottom_up: a ResNet of bottleneck blocks.
        on_per_stage: for res2, res3, res4, res5; stages the model lacks are passed over.
        modulated: deformable convolution v2.
        deformable_groups: groups of channels with offsets of their own.
        interval: of a stage's blocks, those whose index is a multiple of it are replaced.
        bias: see ``DeformBottleneckBlock``.
    """
    for name, on in zip(("res2", "res3", "res4", "res5"), on_per_stage, strict=True):
        stage = getattr(bottom_up, name, None)
        if not on or stage is None:
            continue
        for i in range(0, len(stage), interval):
            stage[i] = DeformBottleneckBlock(
                stage[i], modulated=modulated, deformable_groups=deformable_groups, bias=bias
            )


def _build(
    plain_builder: Callable[[CfgNode, ShapeSpec], Backbone], cfg: CfgNode, input_shape: ShapeSpec
) -> Backbone:
    """Let detectron2 build the plain network, then make its stages deformable."""
    node = cfg.MODEL.RESNETS
    on_per_stage = node.DEFORM_ON_PER_STAGE
    if len(on_per_stage) != 4:
        raise ValueError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE needs four values, for res2 to res5, not "
            f"{on_per_stage}"
        )
    if node.DEPTH in (18, 34) and node.RES2_OUT_CHANNELS != 64:
        raise ValueError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS must be 64 for DEPTH {node.DEPTH}, not "
            f"{node.RES2_OUT_CHANNELS}"
        )
    if node.DEFORM_INTERVAL < 1:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_INTERVAL must be at least 1, not {node.DEFORM_INTERVAL}"
        )
    if not any(on_per_stage):
        return plain_builder(cfg, input_shape)
    if node.DEPTH < 50:
        raise ValueError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE needs bottleneck blocks (DEPTH 50, 101 or 152); "
            f"DEPTH is {node.DEPTH}: set all four values to False"
        )
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    backbone = plain_builder(plain, input_shape)
    make_stages_deformable(
        getattr(backbone, "bottom_up", backbone),
        on_per_stage,
        modulated=node.DEFORM_MODULATED,
        deformable_groups=node.DEFORM_NUM_GROUPS,
        interval=node.DEFORM_INTERVAL,
        bias=node.DEFORM_BIAS,
    )
    return backbone


@BACKBONE_REGISTRY.register()
def build_instseg_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a ResNet from the keys of detectron2's ``build_resnet_backbone``."""
    return _build(build_resnet_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_instseg_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a ResNet with FPN from the keys of detectron2's ``build_resnet_fpn_backbone``."""
    return _build(build_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_instseg_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a ResNet with FPN and p6, p7 from ``build_retinanet_resnet_fpn_backbone``'s keys."""
    return _build(build_retinanet_resnet_fpn_backbone, cfg, input_shape)
