"""DarkNet-53, the trunk of YOLOv3 (arXiv:1804.02767), without its classifier."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

from instseg_ext.modeling.staged import StagedBackbone, check_out_features, stages_up_to

__all__ = ["DarkNet", "DarkNetBlock", "build_darknet53_backbone"]

# Residual blocks of each stage.
_BLOCKS = (1, 2, 8, 8, 4)
STAGES = tuple(f"stage{i}" for i in range(1, len(_BLOCKS) + 1))


def _conv(
    in_channels: int, out_channels: int, *, norm: str, kernel_size: int = 3, stride: int = 1
) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.LeakyReLU(0.1, inplace=True),
    )
    weight_init.c2_msra_fill(conv)
    return conv


class DarkNetBlock(CNNBlockBase):
    """Halve the channels by 1x1 (``conv1``), restore them by 3x3 (``conv2``), add the input.

    No activation follows the addition.
    """

    def __init__(self, channels: int, *, norm: str) -> None:
        """Create the layers.

        Args:
            channels: of input and output.
            norm: as detectron2's ``get_norm`` names it.
        """
        super().__init__(channels, channels, 1)
        self.conv1 = _conv(channels, channels // 2, norm=norm, kernel_size=1)
        self.conv2 = _conv(channels // 2, channels, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return self.conv2(self.conv1(x)) + x


class DarkNet(StagedBackbone):
    """A 3x3 stem and five stages: a strided 3x3 convolution (``0``), then residual blocks.

    Features are named ``stage1`` to ``stage5``; their strides are 2, 4, 8, 16, 32 and their
    channels 2, 4, 8, 16, 32 times the stem's.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        blocks_per_stage: Sequence[int] = _BLOCKS,
        width: int = 32,
        norm: str = "BN",
        out_features: Sequence[str] = ("stage3", "stage4", "stage5"),
        freeze_at: int = 0,
    ) -> None:
        """Create the layers.

        Args:
            in_channels: channels of the image.
            blocks_per_stage: residual blocks of each stage; the default is DarkNet-53.
            width: channels of the stem, even.
            norm: as detectron2's ``get_norm`` names it.
            out_features: names of the features wanted; stages after the last of them are not
                built.
            freeze_at: 0 trains everything, 1 keeps the stem, 2 also ``stage1``, and so on.
        """
        super().__init__(out_features)
        self.stem = _conv(in_channels, width, norm=norm)
        stride = 1
        built = stages_up_to(STAGES, out_features)
        for name, blocks in zip(built, blocks_per_stage, strict=False):
            stride *= 2
            channels = width * stride
            stage = nn.Sequential(
                _conv(channels // 2, channels, norm=norm, stride=2),
                *(DarkNetBlock(channels, norm=norm) for _ in range(blocks)),
            )
            self.add_stage(name, stage, channels=channels, stride=stride)
        self.freeze_parts(freeze_at)


@BACKBONE_REGISTRY.register()
def build_darknet53_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DarkNet:
    """Build DarkNet-53 from ``MODEL.DARKNET`` and ``MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        ValueError: if ``MODEL.DARKNET.OUT_FEATURES`` is empty or names an unknown feature.
    """
    node = cfg.MODEL.DARKNET
    return DarkNet(
        in_channels=input_shape.channels,
        width=node.WIDTH,
        norm=node.NORM,
        out_features=check_out_features("MODEL.DARKNET.OUT_FEATURES", node.OUT_FEATURES, STAGES),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
