"""The layers of stages 2 and 3 of MNC (arXiv:1512.04412), which 4 and 5 run again.

Shapes: R regions, C channels, P x P pooled map (14 as published), m x m mask (21), K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn

from instseg_ext.modeling.features import check_features
from instseg_ext.modeling.poolers import RegionPooler, build_pooler
from instseg_ext.modeling.res5_tower import Res5Tower, build_res5_tower

__all__ = [
    "Classified",
    "FCTower",
    "MaskHead",
    "Res5Tower",
    "Stages",
    "build_stages",
    "resize_masks",
]


# First parts of the names in towers, and what ImageNet models call these layers.
_IMAGENET_NAMES = {"fc1": "fc6", "fc2": "fc7", "blocks": "res5"}


def resize_masks(masks: Tensor, size: int) -> Tensor:
    """Resize masks to the side of the features that they weight.

    Output i reads position i * m / size: the first cells lie upon each other, as published.

    Args:
        masks: (R, m, m).
        size: side of the result.

    Returns:
        (R, size, size), bilinear; differentiable.
    """
    side = masks.shape[-1]
    position = torch.arange(size, device=masks.device, dtype=masks.dtype) * (side / size)
    low = position.floor().long()
    high = (low + 1).clamp(max=side - 1)
    share = position - low
    masks = masks[:, low] * (1 - share)[:, None] + masks[:, high] * share[:, None]
    return masks[:, :, low] * (1 - share) + masks[:, :, high] * share


class MaskHead(nn.Module):
    """Stage 2: one mask per region, whatever its class, by two fully connected layers."""

    def __init__(
        self,
        channels: int,
        *,
        pool_size: int,
        mask_size: int,
        fc_dim: int,
        conv_dim: int = 0,
        init_std: float = 0.001,
    ) -> None:
        """Create the layers.

        Args:
            channels: C.
            pool_size: P.
            mask_size: m.
            fc_dim: outputs of the first layer.
            conv_dim: channels of a 1x1 convolution before it; 0 for none.
            init_std: standard deviation of initial weights; 0.0: by the number of inputs.
        """
        super().__init__()
        self.mask_size = mask_size
        self.conv = None
        if conv_dim:
            self.conv = Conv2d(channels, conv_dim, kernel_size=1, activation=F.relu_)
            c2_msra_fill(self.conv)
        self.fc1 = nn.Linear((conv_dim or channels) * pool_size**2, fc_dim)
        self.predictor = nn.Linear(fc_dim, mask_size**2)
        for layer in (self.fc1, self.predictor):
            nn.init.normal_(layer.weight, std=init_std or layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """Map (R, C, P, P) to mask logits (R, m, m)."""
        if self.conv is not None:
            regions = self.conv(regions)
        logits = self.predictor(self.fc1(regions.flatten(1)).relu())
        return logits.view(-1, self.mask_size, self.mask_size)


def _halve(regions: Tensor) -> Tensor:
    """Return the largest of each 2 x 2 cells of (R, C, P, P).

    Without gradients by comparing rows and columns, several times as fast on a CPU.
    """
    if regions.requires_grad and torch.is_grad_enabled():
        return F.max_pool2d(regions, 2)
    rows = torch.maximum(regions[:, :, ::2], regions[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


class FCTower(nn.Module):
    """Max pooling and two fully connected layers, VGG's ``fc6`` and ``fc7``."""

    def __init__(self, channels: int, pool_size: int, fc_dim: int) -> None:
        """Create the layers; ``channels`` and ``pool_size`` are C and P."""
        super().__init__()
        self.out_dim = fc_dim
        self.fc1 = nn.Linear(channels * (pool_size // 2) ** 2, fc_dim)
        self.fc2 = nn.Linear(fc_dim, fc_dim)
        for layer in (self.fc1, self.fc2):
            c2_xavier_fill(layer)

    def forward(self, regions: Tensor) -> Tensor:
        """Map (R, C, P, P) to (R, fc_dim)."""
        x = _halve(regions).flatten(1)
        return self.fc2(self.fc1(x).relu_()).relu_()


def build_tower(cfg: CfgNode, channels: int) -> FCTower | Res5Tower:
    """Build one of the two towers from ``MODEL.MNC.TOWER``.

    Args:
        cfg: the config.
        channels: C.

    Raises:
        ValueError: if the last stage of a ResNet is asked for on features that do not fit it.
    """
    node = cfg.MODEL.MNC
    if node.TOWER == "fc":
        return FCTower(channels, node.POOL_SIZE, cfg.MODEL.ROI_BOX_HEAD.FC_DIM)
    return build_res5_tower(
        cfg,
        channels,
        tower_key="MODEL.MNC.TOWER",
        features_key="MODEL.ROI_HEADS.IN_FEATURES",
    )


class Classified(NamedTuple):
    """Outputs of stage 3, float32.

    Attributes:
        box_logits: (R, K + 1) scores of the plain boxes; None at inference, which does not use
            them.
        seg_logits: (R, K + 1) scores of the masked regions.
        deltas: (R, (K + 1) * 4).
    """

    box_logits: Tensor | None
    seg_logits: Tensor
    deltas: Tensor


class Stages(nn.Module):
    """The layers of all stages but the first, which are the same for 2 and 4 and for 3 and 5."""

    def __init__(
        self,
        *,
        num_classes: int,
        pooler: RegionPooler,
        second_pooler: RegionPooler,
        mask_head: MaskHead,
        box_tower: FCTower | Res5Tower,
        mask_tower: FCTower | Res5Tower,
    ) -> None:
        """Keep the parts and create the last layers.

        Args:
            num_classes: K.
            pooler: crops regions for stages 2 and 3, and in training for 4 and 5.
            second_pooler: for stages 4 and 5 at inference.
            mask_head: stage 2.
            box_tower: of stage 3, on regions.
            mask_tower: of stage 3, on regions times their masks.
        """
        super().__init__()
        self.num_classes = num_classes
        self.pooler, self.second_pooler = pooler, second_pooler
        self.mask_head = mask_head
        self.box_tower, self.mask_tower = box_tower, mask_tower
        joined = mask_tower.out_dim + box_tower.out_dim
        self.cls_score = nn.Linear(joined, num_classes + 1)
        self.seg_cls_score = nn.Linear(joined, num_classes + 1)
        self.bbox_pred = nn.Linear(joined, (num_classes + 1) * 4)
        for layer in (self.cls_score, self.seg_cls_score, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.001 if layer is self.bbox_pred else 0.01)
            nn.init.zeros_(layer.bias)
        self.register_load_state_dict_pre_hook(_fill_mask_tower)

    def take_imagenet_layers(self, weights: dict[str, Any], prefix: str) -> None:
        """Rename the last layers of an ImageNet model, which a file has beside the backbone's.

        Args:
            weights: by name; changed in place. ``fc6`` and ``fc7`` of a VGG or ``res5`` of a ResNet
                become the box tower, ``fc6_mask`` and ``fc7_mask`` the mask tower.
            prefix: of the new names.
        """
        for tower, suffix in (("box_tower", ""), ("mask_tower", "_mask")):
            for name, own in self.get_submodule(tower).state_dict().items():
                first, _, rest = name.partition(".")
                old = f"{_IMAGENET_NAMES[first]}{suffix}.{rest}"
                if old in weights and weights[old].shape == own.shape:
                    weights[f"{prefix}{tower}.{name}"] = weights.pop(old)

    def classify(self, regions: Tensor, masks: Tensor) -> Classified:
        """Run stage 3 or 5.

        Args:
            regions: (R, C, P, P).
            masks: (R, m, m) probabilities.
        """
        joined = self.join(regions, masks)
        return Classified(
            box_logits=self.cls_score(joined).float() if self.training else None,
            seg_logits=self.seg_cls_score(joined).float(),
            deltas=self.bbox_pred(joined).float(),
        )

    def join(self, regions: Tensor, masks: Tensor) -> Tensor:
        """Return what the mask tower and the box tower, in this order, make of each region.

        The mask is a weight between 0 and 1; regions of background have one, too.
        """
        weights = resize_masks(masks, regions.shape[-1]).to(regions.dtype)
        masked = self.mask_tower(regions * weights[:, None])
        return torch.cat([masked, self.box_tower(regions)], dim=1)


def build_stages(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
    """Return the constructor arguments of ``Stages``.

    Raises:
        ValueError: naming the config key, if the layers do not fit the features.
    """
    node, heads = cfg.MODEL.MNC, cfg.MODEL.ROI_HEADS
    channels = check_features("MODEL.ROI_HEADS.IN_FEATURES", heads.IN_FEATURES, input_shape)
    strides = [input_shape[name].stride for name in heads.IN_FEATURES]
    samples = node.WARP_SIZE // node.POOL_SIZE
    pooler = _build_pooler(cfg, strides, samples)
    return {
        "num_classes": heads.NUM_CLASSES,
        "pooler": pooler,
        "second_pooler": pooler if node.EXT_WARP == "same" else _build_pooler(cfg, strides, 1),
        "mask_head": MaskHead(
            channels,
            pool_size=node.POOL_SIZE,
            mask_size=node.MASK_SIZE,
            fc_dim=node.MASK_FC_DIM,
            conv_dim=node.MASK_CONV_DIM,
            init_std=node.MASK_INIT_STD,
        ),
        "box_tower": build_tower(cfg, channels),
        "mask_tower": build_tower(cfg, channels),
    }


def _build_pooler(cfg: CfgNode, strides: Sequence[int], samples: int) -> RegionPooler:
    node = cfg.MODEL.MNC
    return build_pooler(
        "ROIWarp",
        node.POOL_SIZE,
        [1.0 / stride for stride in strides],
        samples,
        quantize=node.WARP_QUANTIZE,
        warp_mode=node.WARP_MODE,
    )


def _fill_mask_tower(module: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give the mask tower the box tower's weights where a file has only these.

    ImageNet models have one last stage, and both towers start from it, as published for VGG's
    ``fc6`` and ``fc7``.
    """
    box, mask = f"{prefix}box_tower.", f"{prefix}mask_tower."
    if any(name.startswith(mask) for name in weights):
        return
    for name in [name for name in weights if name.startswith(box)]:
        weights[mask + name.removeprefix(box)] = weights[name]
