"""MobileNetV2 (arXiv:1801.04381) without its last 1x1 convolution and classifier."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn

from instseg_ext.modeling.staged import StagedBackbone, check_out_features, stages_up_to

__all__ = ["InvertedResidual", "MobileNetV2", "build_mobilenetv2_backbone"]

# Table 2 of the paper, per stage: expansion, channels, blocks, stride of the first block.
_SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM_CHANNELS = 32
STAGES = tuple(f"stage{i}" for i in range(1, len(_SETTINGS) + 1))


def scaled_channels(channels: int, multiplier: float) -> int:
    """Return ``channels * multiplier`` as the nearest multiple of 8, at least 8.

    Where that is more than a tenth less than the exact product, the next multiple is taken.
    """
    exact = channels * multiplier
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def _conv(
    in_channels: int,
    out_channels: int,
    *,
    norm: str,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
    relu6: bool = True,
) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU6(inplace=True) if relu6 else None,
    )
    weight_init.c2_msra_fill(conv)
    return conv


class InvertedResidual(CNNBlockBase):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1 without activation.

    Layers are named ``expand`` (absent where the expansion is 1), ``depthwise``, ``project``. The
    input is added to the output where both have one shape.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the 3x3 convolution.
        expansion: channels of the 3x3 convolution per input channel.
        norm: as detectron2's ``get_norm`` names it.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int, stride: int, expansion: int, norm: str
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        hidden = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == out_channels
        self.expand = _conv(in_channels, hidden, norm=norm) if expansion > 1 else None
        self.depthwise = _conv(
            hidden, hidden, norm=norm, kernel_size=3, stride=stride, groups=hidden
        )
        self.project = _conv(hidden, out_channels, norm=norm, relu6=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C_out, H / stride, W / stride), rounded up."""
        out = x if self.expand is None else self.expand(x)
        out = self.project(self.depthwise(out))
        return x + out if self.adds_input else out


class MobileNetV2(StagedBackbone):
    """A strided 3x3 stem and seven stages of inverted residual blocks.

    Features are named ``stage1`` to ``stage7``; their strides are 2, 4, 8, 16, 16, 32, 32 and, at
    multiplier 1, their channels 16, 24, 32, 64, 96, 160, 320. No activation follows a stage.

    Args:
        in_channels: channels of the image.
        multiplier: of all channel counts (alpha in the paper).
        norm: as detectron2's ``get_norm`` names it.
        out_features: names of the features wanted; stages after the last of them are not built.
        freeze_at: 0 trains everything, 1 keeps the stem, 2 also ``stage1``, and so on.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        multiplier: float = 1.0,
        norm: str = "FrozenBN",
        out_features: Sequence[str] = ("stage3", "stage4", "stage6"),
        freeze_at: int = 0,
    ) -> None:
        super().__init__(out_features)
        channels = scaled_channels(_STEM_CHANNELS, multiplier)
        total_stride = 2
        self.stem = nn.Sequential()
        self.stem.add_module(
            "conv1", _conv(in_channels, channels, norm=norm, kernel_size=3, stride=2)
        )
        built = stages_up_to(STAGES, out_features)
        for name, (expansion, base, blocks, stride) in zip(built, _SETTINGS, strict=False):
            stage = nn.Sequential()
            for i in range(blocks):
                block = InvertedResidual(
                    in_channels=channels,
                    out_channels=scaled_channels(base, multiplier),
                    stride=stride if i == 0 else 1,
                    expansion=expansion,
                    norm=norm,
                )
                stage.append(block)
                channels = block.out_channels
            total_stride *= stride
            self.add_stage(name, stage, channels=channels, stride=total_stride)
        self.freeze_parts(freeze_at)


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """Build MobileNetV2 from ``MODEL.MOBILENET`` and ``MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        ValueError: if ``MODEL.MOBILENET.OUT_FEATURES`` is empty or names an unknown feature.
    """
    node = cfg.MODEL.MOBILENET
    return MobileNetV2(
        in_channels=input_shape.channels,
        multiplier=node.WIDTH_MULTIPLIER,
        norm=node.NORM,
        out_features=check_out_features("MODEL.MOBILENET.OUT_FEATURES", node.OUT_FEATURES, STAGES),
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
