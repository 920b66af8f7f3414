"""FCIS's ResNet: the last stages keep their resolution by dilation."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone

from instseg_ext.modeling.dilated_resnet import UnpaddedStem, dilate_stage, learn_affine

__all__ = ["build_fcis_resnet_backbone"]

# MODEL.RESNETS.RES5_DILATION: dilations of the stages that lose their stride.
_DILATIONS = {1: {}, 2: {"res5": 2}, 4: {"res4": 2, "res5": 4}}


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
    node = cfg.MODEL.RESNETS
    if node.RES5_DILATION not in _DILATIONS:
        raise ValueError(
            "MODEL.RESNETS.RES5_DILATION must be 1, 2 (res5 at stride 16) or 4 (res4 and res5 at "
            f"stride 8), not {node.RES5_DILATION}."
        )
    if any(node.DEFORM_ON_PER_STAGE):
        raise ValueError(
            "FCIS's backbone has no deformable stages: set MODEL.RESNETS.DEFORM_ON_PER_STAGE to "
            "[False, False, False, False]."
        )
    plain_cfg = cfg.clone()
    plain_cfg.defrost()
    plain_cfg.MODEL.RESNETS.RES5_DILATION = 1
    plain_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    plain = build_resnet_backbone(plain_cfg, input_shape)
    stem = plain.stem
    if cfg.MODEL.FCIS.LEGACY_STEM:
        stem = UnpaddedStem(input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM)
    for name, dilation in _DILATIONS[node.RES5_DILATION].items():
        if name in plain.stage_names:
            dilate_stage(getattr(plain, name), dilation)
    stages = [list(stage) for stage in plain.stages]
    if cfg.MODEL.FCIS.TRAIN_BN_AFFINE:
        learn_affine(stem)
        for stage in plain.stages:
            learn_affine(stage)
    return ResNet(
        stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
