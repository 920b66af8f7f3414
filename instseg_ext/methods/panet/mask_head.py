"""PANet's mask head: per-level first layer and fully connected fusion."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_MASK_HEAD_REGISTRY
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead, mask_rcnn_inference
from detectron2.structures import Instances
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from instseg_ext.config import check_choice
from instseg_ext.methods.panet.config import FUSIONS, check_region_heads
from instseg_ext.methods.panet.fusion import LevelConvs, build_conv
from instseg_ext.methods.panet.pooler import PooledRegions

__all__ = ["PANetFusionMaskHead"]


@ROI_MASK_HEAD_REGISTRY.register()
class PANetFusionMaskHead(BaseMaskRCNNHead):
    """Mask head of Sec. 3.2 and 3.3 of arXiv:1803.01534.

    Of its n convolutions (published: 4) the first is per level and fused. The last is followed by
    the 2x upsampling and the masks of the classes. Before the last one the fully connected branch
    leaves: two convolutions, ``conv<n>_fc`` and ``conv<n + 1>_fc`` with half the channels, and one
    layer that predicts a single map, which is added to the masks of all classes.

    Note:
        The ReLU behind the fully connected layer is in the authors' code but not in their paper.
        The predictor starts as theirs, with the weights of other convolutions: hundreds of times
        larger than detectron2's.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_levels: int,
        num_classes: int,
        num_conv: int,
        conv_dim: int,
        norm: str,
        fusion: str,
        fc_fusion: bool,
        fc_fusion_relu: bool,
        **kwargs: Any,
    ) -> None:
        """Create the layers.

        Args:
            input_shape: channels, height and width of a region on each level. Fixes the size of the
                fully connected layer.
            num_levels: levels that a region is pooled from.
            num_classes: foreground classes; 1 for masks without class.
            num_conv: convolutions before the upsampling, at least 2.
            conv_dim: their channels.
            norm: normalisation layer, "" for none.
            fusion: "max" or "sum".
            fc_fusion: whether there is the fully connected branch.
            fc_fusion_relu: whether a ReLU ends it.
            **kwargs: the arguments of ``BaseMaskRCNNHead``.

        Raises:
            ValueError: if ``num_conv`` is below 2.
        """
        super().__init__(**kwargs)
        if num_conv < 2:
            raise ValueError(
                "MODEL.ROI_MASK_HEAD.NUM_CONV must be at least 2 for PANetFusionMaskHead, one "
                f"before and one behind the fusion, not {num_conv}."
            )
        self.num_conv, self.fc_fusion, self.fc_fusion_relu = num_conv, fc_fusion, fc_fusion_relu
        self.conv1 = LevelConvs(num_levels, input_shape.channels, conv_dim, norm, fusion)
        for k in range(2, num_conv + 1):
            self.add_module(f"conv{k}", build_conv(conv_dim, conv_dim, norm))
        self.deconv = nn.ConvTranspose2d(conv_dim, conv_dim, 2, stride=2)
        self.predictor = nn.Conv2d(conv_dim, num_classes, 1)
        for layer in (self.deconv, self.predictor):
            c2_msra_fill(layer)
        if fc_fusion:
            half = conv_dim // 2
            self.add_module(f"conv{num_conv}_fc", build_conv(conv_dim, conv_dim, norm))
            self.add_module(f"conv{num_conv + 1}_fc", build_conv(conv_dim, half, norm))
            cells = input_shape.height * input_shape.width
            self.mask_size = (2 * input_shape.height, 2 * input_shape.width)
            self.fc = nn.Linear(half * cells, 4 * cells)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the config key, if the regions would not come from all levels or
                ``MODEL.PANET.FUSION`` is unknown.
        """
        check_region_heads(cfg, "PANetFusionMaskHead")
        if not isinstance(input_shape, ShapeSpec):
            raise ValueError(
                "MODEL.ROI_MASK_HEAD.POOLER_TYPE must name a pooler for PANetFusionMaskHead; it is "
                "empty."
            )
        node = cfg.MODEL.ROI_MASK_HEAD
        agnostic = node.CLS_AGNOSTIC_MASK
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "num_levels": len(cfg.MODEL.ROI_HEADS.IN_FEATURES),
            "num_classes": 1 if agnostic else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "num_conv": node.NUM_CONV,
            "conv_dim": node.CONV_DIM,
            "norm": node.NORM,
            "fusion": check_choice("MODEL.PANET.FUSION", cfg.MODEL.PANET.FUSION, FUSIONS),
            "fc_fusion": cfg.MODEL.PANET.FC_FUSION,
            "fc_fusion_relu": cfg.MODEL.PANET.FC_FUSION_RELU,
        }

    def forward(
        self, regions: PooledRegions, instances: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """Return the loss in training, else the instances with ``pred_masks`` added.

        Args:
            regions: of all instances, in order.
            instances: per image, as ``BaseMaskRCNNHead`` takes them.

        Returns:
            ``loss_mask``, 0 without foreground; or ``instances``, with probabilities
            (R_i, 1, 2P, 2P) of the predicted class.
        """
        if self.training:
            # Without instances, detectron2's loss is 0 times the sum of whatever the layers return.
            return super().forward(
                regions if len(regions) else regions.whole_first_image(), instances
            )
        classes = torch.cat([x.pred_classes for x in instances])
        if self.predictor.out_channels == 1:
            classes = torch.zeros_like(classes)
        # detectron2's function takes single maps as they are.
        mask_rcnn_inference(self.logits_of(regions, classes), instances)
        return instances

    def layers(self, regions: PooledRegions) -> Tensor:
        """Return the logits (R, K, 2P, 2P) of all classes."""
        features, fc_map = self._branches(regions)
        logits = self.predictor(features)
        return logits if fc_map is None else logits + fc_map

    def logits_of(self, regions: PooledRegions, classes: Tensor) -> Tensor:
        """Return the logits of one class of each region, without computing the others.

        Args:
            regions: R of them.
            classes: (R,) int64 rows of the predictor.

        Returns:
            (R, 1, 2P, 2P) float32.
        """
        features, fc_map = self._branches(regions)
        weight = self.predictor.weight[classes].flatten(1)[:, None]
        logits = torch.bmm(weight, features.flatten(2)).float()
        logits = (
            logits.unflatten(2, features.shape[2:]) + self.predictor.bias[classes, None, None, None]
        )
        return logits if fc_map is None else logits + fc_map

    def _branches(self, regions: PooledRegions) -> tuple[Tensor, Tensor | None]:
        """Return the predictor's input (R, D, 2P, 2P) and the map to add (R, 1, 2P, 2P) float32."""
        x = self.conv1(regions)
        for k in range(2, self.num_conv):
            x = self.get_submodule(f"conv{k}")(x)
        features = self.get_submodule(f"conv{self.num_conv}")(x)
        features = F.relu_(self.deconv(features))
        if not self.fc_fusion:
            return features, None
        for k in (self.num_conv, self.num_conv + 1):
            x = self.get_submodule(f"conv{k}_fc")(x)
        fc_map = self.fc(x.flatten(1)).float()
        if self.fc_fusion_relu:
            fc_map = fc_map.relu()
        return features, fc_map.unflatten(1, (1, *self.mask_size))
