"""Parts of ResNets for score maps: dilated stages, the first stem, norms with a learned scale.

The codes of R-FCN and FCIS share them. Parameter names are those of detectron2's ResNet.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, ResNet, build_resnet_backbone
from torch import Tensor, nn

__all__ = [
    "FixedBatchNorm2d",
    "UnpaddedStem",
    "build_instseg_dilated_resnet_backbone",
    "dilate_stage",
    "dilated_parts",
    "learn_affine",
]

# MODEL.RESNETS.RES5_DILATION: dilations of the stages that lose their stride.
_DILATIONS = {1: {}, 2: {"res5": 2}, 4: {"res4": 2, "res5": 4}}


class FixedBatchNorm2d(FrozenBatchNorm2d):
    """Batch norm with fixed statistics whose scale and shift are learned.

    Starts as the identity. State dict keys are those of ``FrozenBatchNorm2d``.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        """See ``FrozenBatchNorm2d``."""
        super().__init__(num_features, eps)
        for name in ("weight", "bias"):
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, nn.Parameter(value))


def learn_affine(module: nn.Module) -> None:
    """Put a ``FixedBatchNorm2d`` in the place of every new ``FrozenBatchNorm2d``.

    Args:
        module: not loaded yet; changed in place.
    """
    for name, child in module.named_children():
        if type(child) is FrozenBatchNorm2d:
            setattr(module, name, FixedBatchNorm2d(child.num_features, child.eps))
        else:
            learn_affine(child)


class UnpaddedStem(BasicStem):
    """detectron2's stem with the max pooling of the first ResNets.

    The windows begin at the first pixel and the last one may be cut off; detectron2's begin one
    pixel before. Maps are of the same size up to one cell, but the grid is shifted.
    Images smaller than a window are padded with zeros, the least that ReLU leaves.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C_out, about H / 4, about W / 4)."""
        x = F.relu_(self.conv1(x))
        height, width = x.shape[-2:]
        if min(height, width) < 3:
            x = F.pad(x, (0, max(3 - width, 0), 0, max(3 - height, 0)))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=0, ceil_mode=True)


def dilate_stage(blocks: Iterable[CNNBlockBase], dilation: int) -> None:
    """Give the 3x3 convolutions of a stage a dilation and take away the stage's stride.

    Args:
        blocks: basic or bottleneck blocks, changed in place.
        dilation: of all of them, also the first one's.
    """
    for block in blocks:
        block.stride = 1
        for conv in block.modules():
            if isinstance(conv, Conv2d):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)


def dilated_parts(
    cfg: CfgNode, input_shape: ShapeSpec
) -> tuple[CNNBlockBase, list[list[CNNBlockBase]]]:
    """Build the stem and the stages of a ResNet whose last stages keep their resolution.

    Unlike in detectron2's ``build_resnet_backbone``, ``MODEL.RESNETS.RES5_DILATION`` may be 4, and
    stages of basic blocks (``DEPTH`` 18 and 34) can be dilated. Nothing is frozen yet.

    Args:
        cfg: reads ``MODEL.RESNETS``.
        input_shape: of the image.

    Raises:
        ValueError: if the dilation is unknown or a stage is to be deformable.
    """
    node = cfg.MODEL.RESNETS
    if node.RES5_DILATION not in _DILATIONS:
        raise ValueError(
            "MODEL.RESNETS.RES5_DILATION must be 1, 2 (res5 at stride 16) or 4 (res4 and res5 at "
            f"stride 8), not {node.RES5_DILATION}."
        )
    if any(node.DEFORM_ON_PER_STAGE):
        raise ValueError(
            f"{cfg.MODEL.BACKBONE.NAME} has no deformable stages: set "
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE to [False, False, False, False]."
        )
    plain_cfg = cfg.clone()
    plain_cfg.defrost()
    plain_cfg.MODEL.RESNETS.RES5_DILATION = 1
    plain_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    plain = build_resnet_backbone(plain_cfg, input_shape)
    for name, dilation in _DILATIONS[node.RES5_DILATION].items():
        if name in plain.stage_names:
            dilate_stage(getattr(plain, name), dilation)
    return plain.stem, [list(stage) for stage in plain.stages]


@BACKBONE_REGISTRY.register()
def build_instseg_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build a ResNet from the keys of ``build_resnet_backbone``, see ``dilated_parts``."""
    stem, stages = dilated_parts(cfg, input_shape)
    return ResNet(
        stem,
        stages,
        out_features=cfg.MODEL.RESNETS.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
