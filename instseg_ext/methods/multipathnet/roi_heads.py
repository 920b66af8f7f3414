"""MultiPathNet's region heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from instseg_ext.methods.multipathnet.config import check_multipathnet_config
from instseg_ext.methods.multipathnet.inference import DetectionOptions, best_boxes, detect
from instseg_ext.methods.multipathnet.predictor import IntegralPredictor
from instseg_ext.methods.multipathnet.regions import FovealPooler, SkipNorm, View
from instseg_ext.methods.multipathnet.sampling import SamplingOptions, sample_regions
from instseg_ext.methods.multipathnet.towers import (
    Mixer,
    MultiPathBoxHead,
    SharedLayers,
    Tower,
)
from instseg_ext.modeling.features import check_features
from instseg_ext.modeling.poolers import build_pooler
from instseg_ext.modeling.rcnn import InstSegROIHeads, share_masks
from instseg_ext.modeling.res5_tower import build_res5_tower

__all__ = ["MultiPathROIHeads"]


@ROI_HEADS_REGISTRY.register()
class MultiPathROIHeads(InstSegROIHeads):
    """Foveal crops, skip connections and the integral loss (arXiv:1604.02135).

    Each proposal is seen in several crops, each crop pooled from several maps and read by a tower
    of its own; all towers together are classified, and one more tower gives the boxes. The mask
    head, if there is one, is that of Mask R-CNN. Detections have the field ``proposal_index``.
    """

    @configurable
    def __init__(
        self,
        *,
        sampling: SamplingOptions,
        detection: DetectionOptions,
        alternate: bool = False,
        freeze_iters: int = 0,
        regions_per_chunk: int = 500,
        rounds: int = 1,
        next_scores: bool = False,
        **kwargs: Any,
    ) -> None:
        """Keep the parts.

        Args:
            sampling: which regions are trained on.
            detection: what becomes a detection.
            alternate: the classifiers take turns, one per iteration; otherwise all learn at once.
            freeze_iters: for so many iterations no gradient goes on to the backbone.
            regions_per_chunk: how many are pooled at once in inference.
            rounds: of inference.
            next_scores: boxes get the scores of the round after theirs.
            **kwargs: the arguments of ``InstSegROIHeads``; ``box_pooler`` is a ``FovealPooler``,
                ``box_head`` a ``MultiPathBoxHead`` and ``box_predictor`` an ``IntegralPredictor``.
        """
        super().__init__(**kwargs)
        self.sampling, self.detection, self.alternate = sampling, detection, alternate
        self.freeze_iters, self.regions_per_chunk = freeze_iters, regions_per_chunk
        self.rounds, self.next_scores = rounds, next_scores

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: naming the key of ``MODEL.MULTIPATH`` whose value is not allowed.
        """
        check_multipathnet_config(cfg)
        node, heads = cfg.MODEL.MULTIPATH, cfg.MODEL.ROI_HEADS
        return {
            **super().from_config(cfg, input_shape),
            "sampling": SamplingOptions(
                num_classes=heads.NUM_CLASSES,
                batch_size=heads.BATCH_SIZE_PER_IMAGE,
                foreground_fraction=heads.POSITIVE_FRACTION,
                background_iou=node.BG_IOU_MIN,
                crowd_overlap=node.CROWD_OVERLAP,
                append_gt=heads.PROPOSAL_APPEND_GT,
            ),
            "detection": DetectionOptions(
                min_score=heads.SCORE_THRESH_TEST,
                nms_iou=heads.NMS_THRESH_TEST,
                limit=cfg.TEST.DETECTIONS_PER_IMAGE,
                vote_iou=node.BOX_VOTE_IOU if node.BOX_VOTE else None,
                vote_power=node.BOX_VOTE_POWER,
            ),
            "alternate": node.INTEGRAL_MODE == "alternate",
            "freeze_iters": node.FREEZE_TRUNK_ITERS,
            "regions_per_chunk": node.REGIONS_PER_CHUNK,
            "rounds": node.TEST_ROUNDS,
            "next_scores": node.TEST_NEXT_SCORES,
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.MULTIPATH
        names = list(node.IN_FEATURES)
        # one by one: maps of different channels are mixed by layers of their own
        channels = [
            check_features("MODEL.MULTIPATH.IN_FEATURES", names[i : i + 1], input_shape)
            for i in range(max(len(names), 1))
        ]
        views = [View(*pair) for pair in zip(node.SCALES, node.MAPS, strict=True)]
        if node.HET:
            views.append(View(node.HET_SCALE, node.HET_MAPS))
        head = _build_towers(cfg, views, channels)
        box = cfg.MODEL.ROI_BOX_HEAD
        poolers = [
            build_pooler(
                box.POOLER_TYPE,
                box.POOLER_RESOLUTION,
                [1.0 / input_shape[name].stride],
                box.POOLER_SAMPLING_RATIO,
            )
            for name in names
        ]
        norm = SkipNorm(node.SKIP_NORM, node.L2_SCALE, node.SKIP_FACTORS)
        shape = ShapeSpec(channels=head.class_dim)
        return {
            "box_in_features": names,
            "box_pooler": FovealPooler(poolers, norm, views),
            "box_head": head,
            "box_predictor": IntegralPredictor(cfg, shape, head.box_dim),
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See ``StandardROIHeads.forward``."""
        if self.training and self.freeze_iters and get_event_storage().iter < self.freeze_iters:
            features = {name: _hold_back(x) for name, x in features.items()}
        return super().forward(images, features, proposals, targets)

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """Draw regions of each image, see ``sample_regions``."""
        foreground_iou = self.box_predictor.foreground_ious[max(self._turn(), 0)]
        sampled = [
            sample_regions(proposal, share_masks(target), foreground_iou, self.sampling)
            for proposal, target in zip(proposals, targets, strict=True)
        ]
        storage, images = get_event_storage(), max(len(sampled), 1)
        foreground = sum(int((x.gt_classes < self.num_classes).sum()) for x in sampled)
        background = sum(map(len, sampled)) - foreground
        storage.put_scalar("roi_head/num_fg_samples", foreground / images)
        storage.put_scalar("roi_head/num_bg_samples", background / images)
        return sampled

    def _turn(self) -> int:
        """Return which classifier learns in this iteration, -1 for all."""
        if not self.alternate:
            return -1
        return get_event_storage().iter % len(self.box_predictor.foreground_ious)

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor] | list[Instances]:
        """Return the losses of classes and boxes in training, else the detections."""
        maps = [features[name] for name in self.box_in_features]
        if self.training:
            boxes = [x.proposal_boxes for x in proposals]
            predictions = self.box_predictor(self.box_head(self.box_pooler(maps, boxes)))
            return self.box_predictor.losses(predictions, proposals, self._turn())
        return [
            self._detect([x[i : i + 1] for x in maps], proposal)
            for i, proposal in enumerate(proposals)
        ]

    def _detect(self, maps: Sequence[Tensor], proposals: Instances) -> Instances:
        """Detect the objects of one image, whose maps are a batch of one."""
        size, regions = proposals.image_size, proposals.proposal_boxes.tensor
        probs, boxes = [], []
        for _ in range(self.rounds):
            found = self._predict(maps, regions)
            probs.append(found[0])
            boxes.append(found[1])
            moved = Boxes(best_boxes(found[1], found[0]).nan_to_num())
            moved.clip(size)
            regions = moved.tensor
        if self.next_scores:
            probs, boxes = probs[1:], boxes[:-1]
        index = torch.arange(len(proposals), device=regions.device).repeat(len(probs))
        return detect(torch.cat(boxes), torch.cat(probs), index, size, self.detection)

    def _predict(self, maps: Sequence[Tensor], regions: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities (R, K + 1) and boxes (R, 4 K) of (R, 4) regions, in chunks."""
        probs, boxes = [], []
        for part in regions.split(self.regions_per_chunk):
            pooled = self.box_pooler(maps, [Boxes(part)])
            logits, deltas = self.box_predictor(self.box_head(pooled))
            probs.append(self.box_predictor.mean_probs(logits))
            boxes.append(self.box_predictor.box2box_transform.apply_deltas(deltas.float(), part))
        return torch.cat(probs), torch.cat(boxes)


def _build_towers(cfg: CfgNode, views: Sequence[View], channels: Sequence[int]) -> MultiPathBoxHead:
    """Build the towers of ``views`` on maps of these channels, from ``MODEL.MULTIPATH``."""
    node, box = cfg.MODEL.MULTIPATH, cfg.MODEL.ROI_BOX_HEAD
    if node.TOWER == "res5":
        towers = [
            build_res5_tower(
                cfg,
                channels[0],
                tower_key="MODEL.MULTIPATH.TOWER",
                features_key="MODEL.MULTIPATH.IN_FEATURES",
            )
            for _ in views
        ]
        return MultiPathBoxHead(towers, het=node.HET)
    copied = channels[0] if node.SKIP_NORM == "constant" else 0
    size, out_dim, dropout = box.POOLER_RESOLUTION, box.FC_DIM, node.DROPOUT
    sums = [sum(channels[: view.maps]) for view in views]
    if not node.SHARE_TOWERS:
        towers = [
            Tower(total, node.MIX_DIM, copied, size=size, out_dim=out_dim, dropout=dropout)
            for total in sums
        ]
        return MultiPathBoxHead(towers, het=node.HET)
    mixers = [Mixer(total, node.MIX_DIM, copied) for total in sums]
    shared = SharedLayers(mixers[0].mixed * size**2, out_dim, dropout)
    return MultiPathBoxHead(mixers, het=node.HET, shared=shared)


def _hold_back(x: Tensor) -> Tensor:
    """Return ``x`` with a gradient of zero: for a missing one, several processes would wait."""
    if not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(torch.zeros_like)
    return x
