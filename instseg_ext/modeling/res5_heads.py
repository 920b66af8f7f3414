"""ROI heads of C4 models: the last stage of the ResNet is applied to every region."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Instances

from instseg_ext.modeling.poolers import build_pooler
from instseg_ext.modeling.rcnn import share_masks
from instseg_ext.modeling.runtime import RuntimeOptions

__all__ = ["InstSegRes5ROIHeads"]


@ROI_HEADS_REGISTRY.register()
class InstSegRes5ROIHeads(Res5ROIHeads):
    """``Res5ROIHeads`` (appendix A of arXiv:1512.03385) with a pooler from ``build_pooler``.

    Parameter names are those of ``Res5ROIHeads``, so that model-zoo weights load.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Keep the parts; the arguments are those of ``Res5ROIHeads``."""
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: if the config asks for keypoints, for several levels, or for losses that
                are normalised over processes: the sampled regions are not handed out.
        """
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError("C4 models have no keypoint head; turn MODEL.KEYPOINT_ON off.")
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if len(names) != 1:
            raise ValueError(f"MODEL.ROI_HEADS.IN_FEATURES of a C4 model is one name, not {names}.")
        if RuntimeOptions.from_config(cfg).loss_normalizer != "local":
            raise ValueError("INSTSEG.LOSS_NORMALIZER of a C4 model must be 'local'.")
        node = cfg.MODEL.ROI_BOX_HEAD
        known = cfg.clone()
        known.defrost()
        known.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"  # detectron2 refuses unknown kinds
        arguments = super().from_config(known, input_shape)
        arguments["pooler"] = build_pooler(
            node.POOLER_TYPE,
            node.POOLER_RESOLUTION,
            [1.0 / input_shape[names[0]].stride],
            node.POOLER_SAMPLING_RATIO,
        )
        return arguments

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Match and sample as ``ROIHeads`` does, without copying a mask for every sample."""
        return super().label_and_sample_proposals(
            proposals, [share_masks(target) for target in targets]
        )
