"""The trunk: a ResNet up to stride 16 whose 3x3 and 7x7 convolutions pad with mirror images.

A mirror keeps the border of a patch like its inside. Parameter names are those of detectron2's
ResNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet
from fvcore.nn import weight_init
from torch import Tensor, nn

from instseg_ext.layers.symmetric_pad import mirror_pad
from instseg_ext.modeling.staged import check_out_features
from instseg_ext.modeling.vgg import VGG

__all__ = [
    "STAGES",
    "MirrorBasicBlock",
    "MirrorBottleneckBlock",
    "MirrorResNet",
    "MirrorStem",
    "build_deepmask_resnet_backbone",
    "build_deepmask_vgg_backbone",
]

STAGES = ("stem", "res2", "res3", "res4")
_BLOCKS = {18: (2, 2, 2), 34: (3, 4, 6), 50: (3, 4, 6), 101: (3, 4, 23), 152: (3, 8, 36)}


class MirrorStem(CNNBlockBase):
    """The first convolution, norm and ReLU of a ResNet, without the pooling behind them."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str, pad_mode: str) -> None:
        """Build the convolution.

        Args:
            in_channels: of the image.
            out_channels: of the feature.
            norm: as detectron2's ``get_norm`` names it.
            pad_mode: see ``mirror_pad``; "reflect" holds for the 3x3 convolutions alone.
        """
        super().__init__(in_channels, out_channels, 2)
        self.pad_mode = "symmetric" if pad_mode == "reflect" else pad_mode
        self.conv1 = Conv2d(
            in_channels,
            out_channels,
            kernel_size=7,
            stride=2,
            bias=False,
            norm=get_norm(norm, out_channels),
        )
        weight_init.c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C_out, H / 2, W / 2), rounded up."""
        return F.relu_(self.conv1(mirror_pad(x, 3, self.pad_mode)))


class MirrorBasicBlock(BasicBlock):
    """detectron2's basic block with mirrored borders."""

    def __init__(self, in_channels: int, out_channels: int, *, pad_mode: str, **options: Any):
        """See ``BasicBlock``; ``pad_mode`` as in ``mirror_pad``."""
        super().__init__(in_channels, out_channels, **options)
        self.pad_mode = pad_mode
        self.conv1.padding = self.conv2.padding = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C_out, H / stride, W / stride), rounded up."""
        out = F.relu_(self.conv1(mirror_pad(x, 1, self.pad_mode)))
        out = self.conv2(mirror_pad(out, 1, self.pad_mode))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class MirrorBottleneckBlock(BottleneckBlock):
    """detectron2's bottleneck with mirrored borders."""

    def __init__(self, in_channels: int, out_channels: int, *, pad_mode: str, **options: Any):
        """See ``BottleneckBlock``; ``pad_mode`` as in ``mirror_pad``."""
        super().__init__(in_channels, out_channels, **options)
        self.pad_mode = pad_mode
        self.conv2.padding = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C_out, H / stride, W / stride), rounded up."""
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(mirror_pad(out, 1, self.pad_mode)))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class MirrorResNet(Backbone):
    """Stem, res2, res3 and res4, at strides 2, 4, 8 and 16."""

    def __init__(
        self,
        stem: MirrorStem,
        stages: Sequence[Sequence[CNNBlockBase]],
        *,
        out_features: Sequence[str],
        freeze_at: int = 0,
    ) -> None:
        """Keep the parts.

        Args:
            stem: the first layer.
            stages: blocks of res2, res3 and res4.
            out_features: names of the features wanted, out of ``STAGES``.
            freeze_at: 1 keeps the stem as it is, 2 also res2, and so on.
        """
        super().__init__()
        self.stem = stem
        for name, blocks in zip(STAGES[1:], stages, strict=True):
            self.add_module(name, nn.Sequential(*blocks))
        for parts in ([stem], *stages)[:freeze_at]:
            for part in parts:
                part.freeze()
        channels = (stem.out_channels, *(blocks[-1].out_channels for blocks in stages))
        self._out_features = [name for name in STAGES if name in out_features]
        self._out_feature_channels = dict(zip(STAGES, channels, strict=True))
        self._out_feature_strides = {name: 2 << i for i, name in enumerate(STAGES)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features of an image batch.

        Args:
            x: (N, C, H, W).

        Returns:
            The wanted features by name, each (N, channels, H / stride, W / stride), rounded up;
            "stem" is the map before the pooling.
        """
        features = {"stem": self.stem(x)}
        x = F.max_pool2d(features["stem"], kernel_size=3, stride=2, padding=1)
        for name in STAGES[1:]:
            x = features[name] = self.get_submodule(name)(x)
        return {name: features[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_deepmask_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MirrorResNet:
    """Build the trunk from ``MODEL.RESNETS``, ``MODEL.BACKBONE`` and ``MODEL.DEEPMASK.PAD_MODE``.

    Raises:
        ValueError: if a key of ``MODEL.RESNETS`` has a value that the trunk does not know.
    """
    node, pad_mode = cfg.MODEL.RESNETS, cfg.MODEL.DEEPMASK.PAD_MODE
    if node.DEPTH not in _BLOCKS:
        raise ValueError(
            f"MODEL.RESNETS.DEPTH must be one of {', '.join(map(str, _BLOCKS))}, not {node.DEPTH}."
        )
    if any(node.DEFORM_ON_PER_STAGE):
        raise ValueError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE must be all False: DeepMask's trunk has no "
            "deformable stages."
        )
    stages, in_channels, width = [], node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS
    for i, count in enumerate(_BLOCKS[node.DEPTH]):
        options: dict[str, Any] = {"norm": node.NORM, "pad_mode": pad_mode}
        block = MirrorBasicBlock
        if node.DEPTH >= 50:
            block = MirrorBottleneckBlock
            options |= {
                "bottleneck_channels": node.NUM_GROUPS * node.WIDTH_PER_GROUP << i,
                "num_groups": node.NUM_GROUPS,
                "stride_in_1x1": node.STRIDE_IN_1X1,
            }
        stages.append(
            ResNet.make_stage(
                block,
                count,
                stride_per_block=[1 if i == 0 else 2] + [1] * (count - 1),
                in_channels=in_channels,
                out_channels=width << i,
                **options,
            )
        )
        in_channels = width << i
    return MirrorResNet(
        MirrorStem(input_shape.channels, node.STEM_OUT_CHANNELS, norm=node.NORM, pad_mode=pad_mode),
        stages,
        out_features=check_out_features("MODEL.RESNETS.OUT_FEATURES", node.OUT_FEATURES, STAGES),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_deepmask_vgg_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> VGG:
    """Build VGG-A up to its fifth stage, the trunk of the first paper.

    From ``MODEL.VGG`` and ``MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        ValueError: if ``MODEL.DEEPMASK.PAD_MODE`` is not "zeros", VGG's padding, or
            ``MODEL.VGG.CEIL_MODE`` is False: the last windows of an image need the rest of it.
    """
    node = cfg.MODEL.VGG
    if cfg.MODEL.DEEPMASK.PAD_MODE != "zeros":
        raise ValueError(
            "MODEL.DEEPMASK.PAD_MODE must be zeros with MODEL.BACKBONE.NAME "
            f"build_deepmask_vgg_backbone, not {cfg.MODEL.DEEPMASK.PAD_MODE!r}."
        )
    if not node.CEIL_MODE:
        raise ValueError("MODEL.VGG.CEIL_MODE must be True for DeepMask.")
    return VGG(
        in_channels=input_shape.channels,
        convs_per_stage=(1, 1, 2, 2, 2),
        width=node.WIDTH,
        norm=node.NORM,
        ceil_mode=True,
        out_features=check_out_features(
            "MODEL.VGG.OUT_FEATURES",
            node.OUT_FEATURES,
            ("conv1", "conv2", "conv3", "conv4", "conv5"),
        ),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
