"""RPN and region heads that see boxes as the authors' code does; ``MODEL.PANET.LEGACY_D1``."""

from __future__ import annotations

import torch
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from instseg_ext.methods.panet.legacy import FramedImageList
from instseg_ext.methods.panet.roi_heads import PANetROIHeads
from instseg_ext.structures.legacy_boxes import Frame, add_last_pixel, clip_to_pixels

__all__ = ["LegacyPANetROIHeads", "LegacyRPN"]

# The authors pad images to multiples of it, and clip proposals to the padded image.
_COARSEST_STRIDE = 32


@PROPOSAL_GENERATOR_REGISTRY.register()
class LegacyRPN(RPN):
    """``RPN`` whose proposals are clipped as in Detectron: to whole pixels of the padded image.

    The padding is that of the image alone, whatever its batch adds to it.
    """

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Decode, clip and select; see ``RPN.predict_proposals``."""
        padded = [
            tuple(-(-side // _COARSEST_STRIDE) * _COARSEST_STRIDE for side in size)
            for size in image_sizes
        ]
        levels = [
            torch.stack([clip_to_pixels(*pair, 1.0) for pair in zip(level, padded, strict=True)])
            for level in self._decode_proposals(anchors, pred_anchor_deltas)
        ]
        found = find_top_rpn_proposals(
            levels,
            pred_objectness_logits,
            padded,
            self.nms_thresh,
            self.pre_nms_topk[self.training],
            self.post_nms_topk[self.training],
            self.min_box_size,
            self.training,
        )
        return [
            Instances(size, **proposals.get_fields())
            for size, proposals in zip(image_sizes, found, strict=True)
        ]


@ROI_HEADS_REGISTRY.register()
class LegacyPANetROIHeads(PANetROIHeads):
    """``PANetROIHeads`` for inference with the authors' boxes.

    Regions are pooled without their last pixel. Boxes are decoded and clipped in pixels of the
    original image, which here are ``Frame.pixel`` long.
    """

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Detect; see ``StandardROIHeads.forward``.

        Raises:
            TypeError: if the images do not know their originals.
        """
        if not isinstance(images, FramedImageList):
            raise TypeError("LegacyPANetROIHeads needs the images of PANetRCNN.")
        found = self._detect(features, proposals, images.frames)
        return self.forward_with_given_boxes(features, found), {}

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Instances], frames: tuple[Frame, ...]
    ) -> list[Instances]:
        """Return boxes, scores and classes at the scale of the network input."""
        regions = [add_last_pixel(x.proposal_boxes.tensor, -1.0) for x in proposals]
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [Boxes(boxes) for boxes in regions])
        predictions = self.box_predictor(self.box_head(pooled))
        in_frames = [
            Instances(x.image_size, proposal_boxes=Boxes(add_last_pixel(boxes, frame.pixel)))
            for x, boxes, frame in zip(proposals, regions, frames, strict=True)
        ]
        # The scaled originals before their sides were rounded.
        sizes = [tuple(side * x.pixel for side in x.original_size) for x in frames]
        boxes = [
            clip_to_pixels(boxes.unflatten(1, (-1, 4)), size, frame.pixel).flatten(1)
            for boxes, size, frame in zip(
                self.box_predictor.predict_boxes(predictions, in_frames), sizes, frames, strict=True
            )
        ]
        results, _ = fast_rcnn_inference(
            boxes,
            self.box_predictor.predict_probs(predictions, in_frames),
            sizes,
            self.box_predictor.test_score_thresh,
            self.box_predictor.test_nms_thresh,
            self.box_predictor.test_topk_per_image,
        )
        return [
            with_pixel(Instances(x.image_size, **result.get_fields()), frame)
            for x, result, frame in zip(proposals, results, frames, strict=True)
        ]

    def _forward_mask(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Add ``pred_masks`` of the boxes without their last pixel."""
        if not self.mask_on:
            return instances
        regions = [
            Instances(
                x.image_size,
                pred_boxes=Boxes(add_last_pixel(x.pred_boxes.tensor, -x.pixel)),
                pred_classes=x.pred_classes,
            )
            for x in instances
        ]
        for x, region in zip(instances, super()._forward_mask(features, regions), strict=True):
            x.pred_masks = region.pred_masks
        return instances


def with_pixel(instances: Instances, frame: Frame) -> Instances:
    """Return the instances with ``pixel``, the side of a pixel of the original of each."""
    boxes = instances.pred_boxes.tensor
    fields = {**instances.get_fields(), "pixel": boxes.new_full((len(boxes),), frame.pixel)}
    return Instances(instances.image_size, **fields)
