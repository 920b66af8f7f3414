"""MultiPathNet's frame: crowds are no objects to train on, proposals may bring their masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor

from instseg_ext.layers.mask_ops import RLEList
from instseg_ext.methods.multipathnet.roi_heads import MultiPathROIHeads
from instseg_ext.methods.multipathnet.sampling import crowd_shares
from instseg_ext.modeling.rcnn import InstSegRCNN
from instseg_ext.structures.rle import decode_masks

__all__ = ["MultiPathRCNN", "split_crowds"]


@META_ARCH_REGISTRY.register()
class MultiPathRCNN(InstSegRCNN):
    """``InstSegRCNN`` with ``MultiPathROIHeads``, of RPN's or loaded proposals."""

    @configurable
    def __init__(self, *, proposal_masks: bool = False, **kwargs: Any) -> None:
        """Keep the parts.

        Args:
            proposal_masks: a detection gets the mask of the proposal that it comes from.
            **kwargs: the arguments of ``InstSegRCNN``.
        """
        super().__init__(**kwargs)
        self.proposal_masks = proposal_masks
        self.register_load_state_dict_pre_hook(_take_imagenet_layers)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: if the region heads are not MultiPathNet's, or masks would have to be added
                to boxes that have none.
        """
        arguments = super().from_config(cfg)
        if not isinstance(arguments["roi_heads"], MultiPathROIHeads):
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME {cfg.MODEL.ROI_HEADS.NAME} does not fit "
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}: set it to "
                "MultiPathROIHeads."
            )
        source = cfg.MODEL.MULTIPATH.MASK_SOURCE
        if cfg.TEST.AUG.ENABLED and source == "proposal":
            raise ValueError(
                "TEST.AUG.ENABLED is not for MODEL.MULTIPATH.MASK_SOURCE proposal: merged boxes "
                "come from no proposal."
            )
        return {**arguments, "proposal_masks": source == "proposal"}

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Return the losses in training, else ``[{"instances": Instances}, ...]``.

        Args:
            batched_inputs: as ``InstSegRCNN`` takes them; instances may be marked as crowds by
                ``gt_is_crowd``, and there may be ``proposal_rles`` beside ``proposals``.

        Returns:
            As ``InstSegRCNN``; detections also have ``proposal_index`` (int64).
        """
        if not self.training:
            return self.inference(batched_inputs)
        self._require_proposals(batched_inputs)
        with self.precision():
            images = self.preprocess_image(batched_inputs)
            given = [split_crowds(x["instances"].to(self.device)) for x in batched_inputs]
            objects = [instances for instances, _ in given]
            features = self.backbone(images.tensor)
            losses: dict[str, Tensor] = {}
            if self.proposal_generator is None:
                proposals = [x["proposals"].to(self.device) for x in batched_inputs]
            else:
                proposals, losses = self.proposal_generator(images, features, objects)
            for proposal, (_, crowds) in zip(proposals, given, strict=True):
                proposal.crowd_share = crowd_shares(proposal.proposal_boxes, crowds)
            _, of_regions = self.roi_heads(images, features, proposals, objects)
            if self.proposal_generator is None:
                # Several processes wait for the gradients of all layers, also of maps not read.
                of_regions["loss_cls"] = of_regions["loss_cls"] + 0.0 * sum(
                    x.sum() for x in features.values()
                )
        return {name: value.float() for name, value in {**losses, **of_regions}.items()}

    def postprocess(
        self, results: Sequence[Instances], batched_inputs: list[dict]
    ) -> list[dict[str, Instances]]:
        """Bring results to the original image sizes; the arguments are left as they are.

        Raises:
            ValueError: if masks come from proposals and there are none in the inputs.
        """
        outputs = super().postprocess(results, batched_inputs)
        if self.proposal_masks:
            for output, item in zip(outputs, batched_inputs, strict=True):
                self._add_masks(output["instances"], item)
        return outputs

    def _add_masks(self, instances: Instances, item: dict) -> None:
        """Give each detection of an image the mask of its proposal."""
        if "proposal_rles" not in item:
            raise ValueError(
                "Inputs carry no masks of proposals, from which MODEL.MULTIPATH.MASK_SOURCE "
                "proposal takes those of detections: set INSTSEG.PROPOSAL_MASKS True, and name a "
                "file of proposals with masks in DATASETS.PROPOSAL_FILES_TEST."
            )
        rles = RLEList(item["proposal_rles"])[instances.proposal_index]
        for rle in rles[:1]:
            if tuple(rle["size"]) != instances.image_size:
                raise ValueError(
                    f"Masks of proposals have {rle['size']} pixels (height, width), the image "
                    f"{item.get('file_name', '')} {list(instances.image_size)}."
                )
        if self.mask_output == "rle":
            instances.pred_masks_rle = rles
        else:
            masks = torch.from_numpy(decode_masks(rles, instances.image_size))
            instances.pred_masks = masks.to(self.device)


def split_crowds(instances: Instances) -> tuple[Instances, Boxes]:
    """Split the ground truth of an image into objects and the boxes of crowds.

    Args:
        instances: with ``gt_boxes`` and, where crowds are kept, ``gt_is_crowd`` (M,) bool.
    """
    if not instances.has("gt_is_crowd"):
        return instances, Boxes(instances.gt_boxes.tensor[:0])
    crowd = instances.gt_is_crowd
    objects = instances[~crowd]
    objects.remove("gt_is_crowd")
    return objects, instances.gt_boxes[crowd]


def _take_imagenet_layers(
    model: MultiPathRCNN, weights: dict[str, Any], prefix: str, *_: Any
) -> None:
    model.roi_heads.box_head.take_imagenet_layers(weights, f"{prefix}roi_heads.box_head.")
