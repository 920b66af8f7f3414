"""MNC's region heads: stages 2 and 3, run a second time as stages 4 and 5 (arXiv:1512.04412).

Shapes: R regions of all images, m x m mask, K classes; background is class K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from instseg_ext.layers.gradient_limit import GradientLimit
from instseg_ext.methods.mnc.bridge import chosen_classes, refine_boxes
from instseg_ext.methods.mnc.config import MNCOptions, check_mnc_config
from instseg_ext.methods.mnc.losses import box_loss, class_loss, mask_loss, row_weights
from instseg_ext.methods.mnc.sampling import (
    Sampled,
    SamplingOptions,
    label_regions,
    sample_regions,
)
from instseg_ext.methods.mnc.stages import Classified, Stages, build_stages
from instseg_ext.methods.mnc.targets import mask_level_labels, mask_targets
from instseg_ext.modeling.poolers import RegionPooler
from instseg_ext.modeling.voting_rcnn import require_voting
from instseg_ext.structures.legacy_boxes import add_last_pixel

__all__ = ["MNCROIHeads"]

# Of the pooled regions that inference has at once: some hundred regions.
_CHUNK_BYTES = 64 * 2**20


@ROI_HEADS_REGISTRY.register()
class MNCROIHeads(Stages):
    """Masks from boxes, classes from masks, boxes from classes, and once more.

    At inference each image gets candidates instead of detections, all at the scale of the network:
    ``candidate_boxes``, ``candidate_masks`` (C, m, m) and ``candidate_scores`` (C, K), those of
    stage 3 first. A mask lies in the box that it was computed from.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        transform: Box2BoxTransform,
        sampling: SamplingOptions,
        options: MNCOptions,
        **stages: Any,
    ) -> None:
        """Keep the parts.

        Args:
            in_features: names of the features that regions are pooled from.
            transform: between boxes and deltas.
            sampling: how regions are drawn in training.
            options: of the cascade.
            **stages: the arguments of ``Stages``.
        """
        super().__init__(**stages)
        self.in_features = list(in_features)
        self.transform = transform
        self.sampling, self.options = sampling, options

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the key whose value is not allowed.
        """
        require_voting(cfg, "MNCRCNN")
        check_mnc_config(cfg)
        return {
            "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "transform": Box2BoxTransform(weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS),
            "sampling": SamplingOptions.from_config(cfg),
            "options": MNCOptions.from_config(cfg),
            **build_stages(cfg, input_shape),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return candidates per image, or in training the losses, as detectron2's heads do."""
        if not self.training:
            return self.detect(features, proposals), {}
        limit = self.box_limit(len(proposals))
        losses = self.losses(features, self.sample(proposals, targets), targets, limit)
        if limit is not None:
            limit.watch(*losses.values())
        return proposals, losses

    def masks(
        self, features: dict[str, Tensor], boxes: Sequence[Tensor], pooler: RegionPooler
    ) -> tuple[Tensor, Tensor]:
        """Run stage 2 or 4.

        Args:
            features: by name.
            boxes: (R_i, 4) of each image; gradients flow to them.
            pooler: crops the regions.

        Returns:
            (R, C, P, P) pooled regions and (R, m, m) float32 mask logits, all images in order.
        """
        if self.options.legacy:
            # RoI warping of the authors' code is given the last pixel.
            boxes = [add_last_pixel(b, -1.0) for b in boxes]
        maps = [features[name] for name in self.in_features]
        regions = pooler(maps, [Boxes(b) for b in boxes])
        return regions, self.mask_head(regions).float()

    # --- training --------------------------------------------------------------------------------

    def box_limit(self, num_images: int) -> GradientLimit | None:
        """Return the bound of the gradient through the boxes of a batch; None: there is none.

        The authors bound it for each image before averaging, so the bound of the mean is smaller.
        """
        bound = self.options.box_gradient
        return GradientLimit(bound / max(num_images, 1)) if bound else None

    def sample(self, proposals: list[Instances], targets: list[Instances]) -> list[Sampled]:
        """Draw the regions that stages 2 and 3 train on; their boxes stay in the graph."""
        return sample_regions(proposals, targets, self.sampling)

    def losses(
        self,
        features: dict[str, Tensor],
        samples: list[Sampled],
        targets: list[Instances],
        limit: GradientLimit | None = None,
    ) -> dict[str, Tensor]:
        """Run the stages of training.

        Args:
            features: by name.
            samples: of ``sample``, one per image.
            targets: ground truth, one per image.
            limit: bound of the gradient through the boxes; None lets none through.

        Returns:
            Scalars ``loss_{mask,cls,seg_cls,box_reg}_s3`` and, with 5 stages, ``_s5``.
        """
        outputs, losses = self._train_pass(features, samples, targets, "s3")
        if self.options.train_stages == 3:
            return losses
        refined = self._bridge(samples, targets, outputs, limit)
        return losses | self._train_pass(features, refined, targets, "s5")[1]

    def _train_pass(
        self,
        features: dict[str, Tensor],
        samples: list[Sampled],
        targets: list[Instances],
        suffix: str,
    ) -> tuple[Classified, dict[str, Tensor]]:
        """Run two stages on samples and compare them with the ground truth."""
        regions, mask_logits = self.masks(features, [s.boxes for s in samples], self.pooler)
        probs = mask_logits.sigmoid()
        seg_labels = self._seg_labels(probs.detach(), samples, targets)
        # Where the mask found no object, classes and boxes do not teach it, as published.
        found = (seg_labels < self.num_classes)[:, None, None]
        outputs = self.classify(regions, torch.where(found, probs, probs.detach()))
        labels = torch.cat([s.labels for s in samples])
        weights = row_weights([len(s) for s in samples], labels.device)
        foreground = _foreground_rows(samples, labels.device)
        losses = {
            "mask": self.options.mask_weight
            * mask_loss(
                mask_logits[foreground],
                self._mask_targets(samples, targets),
                row_weights([s.num_foreground for s in samples], labels.device),
            ),
            "cls": class_loss(outputs.box_logits, labels, weights),
            "seg_cls": class_loss(outputs.seg_logits, seg_labels, weights),
            "box_reg": box_loss(
                outputs.deltas[foreground],
                labels[foreground],
                self._box_targets(samples, targets),
                weights[foreground],
                self.options.beta,
            ),
        }
        return outputs, {f"loss_{name}_{suffix}": value for name, value in losses.items()}

    def _seg_labels(
        self, probs: Tensor, samples: list[Sampled], targets: list[Instances]
    ) -> Tensor:
        """Return (R,) classes of masked regions: background where a mask found no object."""
        parts = zip(probs.split([len(s) for s in samples]), samples, targets, strict=True)
        labels = [
            mask_level_labels(
                part,
                sample.boxes.detach(),
                sample.matched,
                sample.labels,
                target,
                iou_threshold=self.options.seg_iou,
                mask_threshold=self.options.mask_threshold,
                num_classes=self.num_classes,
            )
            for part, sample, target in parts
        ]
        return torch.cat(labels)

    def _mask_targets(self, samples: list[Sampled], targets: list[Instances]) -> Tensor:
        size, threshold = self.mask_head.mask_size, self.options.mask_threshold
        found = [
            mask_targets(*_foreground(sample), target, size, threshold)
            for sample, target in zip(samples, targets, strict=True)
        ]
        return torch.cat(found)

    def _box_targets(self, samples: list[Sampled], targets: list[Instances]) -> Tensor:
        found = []
        for sample, target in zip(samples, targets, strict=True):
            boxes, matched = _foreground(sample)
            found.append(self.transform.get_deltas(boxes, target.gt_boxes.tensor[matched]))
        return torch.cat(found)

    def _bridge(
        self,
        samples: list[Sampled],
        targets: list[Instances],
        outputs: Classified,
        limit: GradientLimit | None,
    ) -> list[Sampled]:
        """Return the regions of stage 4: the samples where stage 3 put them, and all objects."""
        counts = [len(s) for s in samples]
        classes = chosen_classes(outputs.seg_logits.detach(), foreground_only=True)
        transform = self.transform
        if not self.options.denormalize:
            transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
        refined = []
        for sample, target, deltas, chosen in zip(
            samples, targets, outputs.deltas.split(counts), classes.split(counts), strict=True
        ):
            boxes = refine_boxes(
                sample.boxes,
                deltas,
                chosen,
                transform,
                target.image_size,
                limit=limit,
                legacy=self.options.legacy,
            )
            refined.append(label_regions(boxes, target, self.sampling))
        return refined

    # --- inference -------------------------------------------------------------------------------

    def detect(self, features: dict[str, Tensor], proposals: list[Instances]) -> list[Instances]:
        """Return the candidates of each image; see the class."""
        maps = {name: features[name] for name in self.in_features}
        return [
            self._detect_one({name: x[i : i + 1] for name, x in maps.items()}, found)
            for i, found in enumerate(proposals)
        ]

    def _detect_one(self, features: dict[str, Tensor], proposals: Instances) -> Instances:
        boxes = proposals.proposal_boxes.tensor.float()
        masks, outputs = self._infer_pass(features, boxes, self.pooler)
        found = [(boxes, masks, outputs.seg_logits)]
        if self.options.num_stages == 5:
            classes = chosen_classes(outputs.seg_logits, foreground_only=False)
            boxes = refine_boxes(
                boxes,
                outputs.deltas,
                classes,
                self.transform,
                proposals.image_size,
                legacy=self.options.legacy,
            )
            masks, outputs = self._infer_pass(features, boxes, self.second_pooler)
            found.append((boxes, masks, outputs.seg_logits))
        boxes, masks, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
        scores = logits.softmax(dim=1)[:, : self.num_classes]
        usable = scores.isfinite().all(dim=1) & masks.isfinite().flatten(1).all(dim=1)
        return Instances(
            proposals.image_size,
            candidate_boxes=Boxes(boxes[usable]),
            candidate_masks=masks[usable],
            candidate_scores=scores[usable],
        )

    def _infer_pass(
        self, features: dict[str, Tensor], boxes: Tensor, pooler: RegionPooler
    ) -> tuple[Tensor, Classified]:
        """Run two stages on one image, some regions at a time.

        Returns:
            (R, m, m) mask probabilities and the outputs of the second of them.
        """
        channels = features[self.in_features[0]].shape[1]
        height, width = pooler.output_size
        rows = max(1, _CHUNK_BYTES // (channels * height * width * 4))
        masks, logits, deltas = [], [], []
        for part in boxes.split(rows):
            regions, mask_logits = self.masks(features, [part], pooler)
            masks.append(mask_logits.sigmoid())
            outputs = self.classify(regions, masks[-1])
            logits.append(outputs.seg_logits)
            deltas.append(outputs.deltas)
        return torch.cat(masks), Classified(None, torch.cat(logits), torch.cat(deltas))


def _foreground(sample: Sampled) -> tuple[Tensor, Tensor]:
    """Return boxes without gradient, and objects, of the foreground, which comes first."""
    return sample.boxes.detach()[: sample.num_foreground], sample.matched[: sample.num_foreground]


def _foreground_rows(samples: Sequence[Sampled], device: torch.device) -> Tensor:
    """Return (F,) int64 rows of the foreground among the regions of all images."""
    rows, start = [], 0
    for sample in samples:
        rows.append(torch.arange(start, start + sample.num_foreground, device=device))
        start += len(sample)
    return torch.cat(rows)
