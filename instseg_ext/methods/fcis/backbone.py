"""FCIS's ResNet: the last stages keep their resolution by dilation."""

from __future__ import annotations

import itertools

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import ResNet

from instseg_ext.modeling.dilated_resnet import UnpaddedStem, dilated_parts, learn_affine

__all__ = ["build_fcis_resnet_backbone"]


@BACKBONE_REGISTRY.register()
def build_fcis_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build a ResNet from the keys of detectron2's ``build_resnet_backbone`` and ``MODEL.FCIS``.

    Unlike there, ``MODEL.RESNETS.RES5_DILATION`` may be 4, and stages of basic blocks (``DEPTH`` 18
    and 34) can be dilated.

    Args:
        cfg: reads ``MODEL.RESNETS``, ``MODEL.BACKBONE.FREEZE_AT``, ``LEGACY_STEM`` and
            ``TRAIN_BN_AFFINE`` of ``MODEL.FCIS``.
        input_shape: of the image.

    Raises:
        ValueError: if the dilation is unknown or a stage is to be deformable.
    """
    stem, stages = dilated_parts(cfg, input_shape)
    node = cfg.MODEL.RESNETS
    if cfg.MODEL.FCIS.LEGACY_STEM:
        stem = UnpaddedStem(input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM)
    if cfg.MODEL.FCIS.TRAIN_BN_AFFINE:
        learn_affine(stem)
        for block in itertools.chain(*stages):
            learn_affine(block)
    return ResNet(
        stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
