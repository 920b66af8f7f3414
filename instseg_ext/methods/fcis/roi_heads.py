"""FCIS's region heads: score maps of the whole image, pooled per region without further layers.

Shapes: N images, R regions, K foreground classes, G groups per axis, P side of the pooled maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from instseg_ext.layers.ps_roi_pool import ps_roi_average_pool, ps_roi_scores
from instseg_ext.methods.fcis.config import check_fcis_config
from instseg_ext.methods.fcis.losses import hardest, image_losses, region_losses
from instseg_ext.methods.fcis.sampling import (
    Regions,
    SamplingOptions,
    label_regions,
    make_targets,
    sample,
)
from instseg_ext.modeling.clip_first_rpn import clip_boxes
from instseg_ext.modeling.features import check_features
from instseg_ext.modeling.voting_rcnn import require_voting

__all__ = ["FCISROIHeads", "ScoreMaps"]


class ScoreMaps(NamedTuple):
    """Position-sensitive maps of the images of a batch, float32.

    Attributes:
        classes: (N, (K + 1) * 2 * G * G, H, W); per class, background last, first outside, then
            inside.
        boxes: (N, 4 * G * G, H, W).
    """

    classes: Tensor
    boxes: Tensor

    def of_image(self, number: int) -> ScoreMaps:
        """Return the maps of one image of the batch, as a batch of one."""
        return ScoreMaps(*(x[number : number + 1] for x in self))


class Pooled(NamedTuple):
    """What is read out of the maps for each region, float32.

    Attributes:
        scores: (R, K + 1, 2, P, P).
        deltas: (R, 4).
    """

    scores: Tensor
    deltas: Tensor


@ROI_HEADS_REGISTRY.register()
class FCISROIHeads(nn.Module):
    """Classes, masks and boxes from inside and outside score maps (arXiv:1611.07709).

    Parameters are ``conv_new`` (1x1), ``cls_seg`` with channel ``((2 c + io) G + row) G + column``
    and ``bbox`` with channel ``(coordinate G + row) G + column``.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        stride: int,
        num_classes: int,
        box2box_transform: Box2BoxTransform,
        sampling: SamplingOptions,
        group_size: int = 7,
        pooled_size: int = 21,
        head_dim: int = 1024,
        head_lr_factor: float = 3.0,
        loss_weights: Sequence[float] = (1.0, 10.0, 1.0),
        mask_threshold: float = 0.4,
        rounds: int = 2,
        min_size: float = 2.0,
    ) -> None:
        """Build the layers.

        Args:
            in_feature: name of the feature map.
            in_channels: its channels.
            stride: image pixels per cell.
            num_classes: K.
            box2box_transform: codes boxes.
            sampling: which regions are trained.
            group_size: G.
            pooled_size: P.
            head_dim: channels before the score maps.
            head_lr_factor: multiplies the learning rate of the layer that makes them.
            loss_weights: of the class, mask and box losses.
            mask_threshold: a cell of a mask target is 1 from this share on.
            rounds: of inference.
            min_size: candidates with a shorter side, network-input pixels, are dropped.

        Raises:
            ValueError: if a number is out of its range.
        """
        super().__init__()
        _check(group_size, pooled_size, loss_weights, rounds)
        self.in_feature, self.stride, self.num_classes = in_feature, stride, num_classes
        self.box2box_transform, self.sampling = box2box_transform, sampling
        self.group_size, self.pooled_size = group_size, pooled_size
        self.loss_weights = tuple(float(weight) for weight in loss_weights)
        self.mask_threshold, self.rounds, self.min_size = mask_threshold, rounds, min_size
        groups = group_size**2
        self.conv_new = nn.Conv2d(in_channels, head_dim, 1)
        self.conv_new.lr_factor = head_lr_factor
        self.cls_seg = nn.Conv2d(head_dim, (num_classes + 1) * 2 * groups, 1)
        self.bbox = nn.Conv2d(head_dim, 4 * groups, 1)
        for layer in (self.conv_new, self.cls_seg, self.bbox):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Return the constructor arguments.

        Raises:
            ValueError: if the heads are to read several feature maps, or one that does not exist,
                or the architecture does not vote.
        """
        require_voting(cfg, "FCISRCNN")
        check_fcis_config(cfg)
        node, names = cfg.MODEL.FCIS, cfg.MODEL.ROI_HEADS.IN_FEATURES
        if len(names) != 1:
            raise ValueError(f"MODEL.ROI_HEADS.IN_FEATURES of FCIS is one name, not {names}.")
        channels = check_features("MODEL.ROI_HEADS.IN_FEATURES", names, input_shape)
        if any(std <= 0 for std in node.BBOX_STDS) or len(node.BBOX_STDS) != 4:
            raise ValueError(
                f"MODEL.FCIS.BBOX_STDS must be four positive numbers, not {node.BBOX_STDS}."
            )
        return {
            "in_feature": names[0],
            "in_channels": channels,
            "stride": input_shape[names[0]].stride,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "box2box_transform": Box2BoxTransform([1 / std for std in node.BBOX_STDS]),
            "sampling": SamplingOptions.from_config(cfg),
            "group_size": node.GROUP_SIZE,
            "pooled_size": node.POOLED_SIZE,
            "head_dim": node.HEAD_DIM,
            "head_lr_factor": node.HEAD_LR_MULT,
            "loss_weights": node.LOSS_WEIGHT,
            "mask_threshold": node.BINARY_THRESH,
            "rounds": node.ITER,
            "min_size": node.MIN_DROP_SIZE,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Return ``(proposals, losses)`` in training, else ``(candidates, {})``.

        Args:
            images: only their sizes are read.
            features: with the heads' map.
            proposals: per image, with ``proposal_boxes``.
            targets: per image, with ``gt_boxes``, ``gt_classes``, ``gt_masks``; in training only.

        Returns:
            Candidates are, per image, what ``candidates`` returns.
        """
        maps = self.score_maps(features[self.in_feature])
        with torch.autocast(maps.classes.device.type, enabled=False):
            if self.training:
                return proposals, self.losses(maps, proposals, targets)
            found = [
                self.candidates(maps.of_image(i), x.proposal_boxes.tensor, x.image_size)
                for i, x in enumerate(proposals)
            ]
        return found, {}

    def score_maps(self, features: Tensor) -> ScoreMaps:
        """Compute the maps of (N, C, H, W) features."""
        x = F.relu_(self.conv_new(features))
        return ScoreMaps(self.cls_seg(x).float(), self.bbox(x).float())

    def pool(self, maps: ScoreMaps, rois: Tensor) -> Pooled:
        """Read out the maps for (R, 5) regions: image index, then XYXY in image pixels."""
        scores = ps_roi_average_pool(maps.classes, rois, **self._pooling())
        return Pooled(scores.unflatten(1, (-1, 2)), self._deltas(maps, rois))

    def _deltas(self, maps: ScoreMaps, rois: Tensor) -> Tensor:
        """Return the (R, 4) box deltas of (R, 5) regions."""
        return ps_roi_average_pool(maps.boxes, rois, **self._pooling()).mean(dim=(2, 3))

    def _pooling(self) -> dict[str, Any]:
        """Return the options of the pooling."""
        return {
            "spatial_scale": 1 / self.stride,
            "group_size": self.group_size,
            "output_size": self.pooled_size,
        }

    def losses(
        self, maps: ScoreMaps, proposals: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Return the mean over the images of ``loss_cls``, ``loss_mask`` and ``loss_box_reg``.

        Every image has the same weight, so that ``INSTSEG.LOSS_NORMALIZER`` makes no difference.
        """
        chosen = [
            self.sample_regions(maps.of_image(i), *pair)
            for i, pair in enumerate(zip(proposals, targets, strict=True))
        ]
        _log_counts(chosen, self.num_classes)
        pooled = self.pool(maps, torch.cat([_with_index(x.boxes, i) for i, x in enumerate(chosen)]))
        sizes = [len(x) for x in chosen]
        per_image = [
            image_losses(
                region_losses(scores, deltas, regions), self.sampling.num_regions, self.loss_weights
            )
            for scores, deltas, regions in zip(
                pooled.scores.split(sizes), pooled.deltas.split(sizes), chosen, strict=True
            )
        ]
        return {
            name: torch.stack([losses[name] for losses in per_image]).mean()
            for name in per_image[0]
        }

    @torch.no_grad()
    def sample_regions(self, maps: ScoreMaps, proposals: Instances, target: Instances) -> Regions:
        """Choose the regions of one image that are trained, with their targets.

        Args:
            maps: of the image.
            proposals: with ``proposal_boxes``.
            target: the image's objects.
        """
        labelled = label_regions(proposals, target, self.sampling, self.num_classes)
        regions = make_targets(
            sample(*labelled, self.sampling, self.num_classes),
            target,
            transform=self.box2box_transform,
            size=self.pooled_size,
            threshold=self.mask_threshold,
            num_classes=self.num_classes,
        )
        if not self.sampling.hard or len(regions) <= self.sampling.num_regions:
            return regions
        losses = region_losses(*self.pool(maps, _with_index(regions.boxes)), regions)
        kept = hardest(losses.weighted(self.loss_weights), self.sampling.num_regions)
        return regions.take(kept, self.num_classes)

    @torch.no_grad()
    def candidates(self, maps: ScoreMaps, boxes: Tensor, image_size: tuple[int, int]) -> Instances:
        """Return the regions of all rounds, with one mask and the scores of all classes each.

        Args:
            maps: of one image.
            boxes: (R, 4) its proposals, network-input pixels.
            image_size: (H, W) of the network input without padding.

        Returns:
            ``candidate_boxes`` (Boxes), ``candidate_masks`` (C, P, P) of the best foreground class
            and ``candidate_scores`` (C, K), probabilities in float32; C is at most R times the
            rounds. Small boxes are left out.
        """
        rounds = [boxes.float()]
        for _ in range(self.rounds - 1):
            deltas = self._deltas(maps, _with_index(rounds[-1]))
            refined = self.box2box_transform.apply_deltas(deltas, rounds[-1])
            rounds.append(clip_boxes(refined, image_size))
        boxes = torch.cat(rounds)
        boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) >= self.min_size).all(dim=1)]
        logits, masks = ps_roi_scores(maps.classes, _with_index(boxes), **self._pooling())
        return Instances(
            image_size,
            candidate_boxes=Boxes(boxes),
            candidate_masks=masks,
            candidate_scores=logits.softmax(dim=1)[:, : self.num_classes],
        )


def _check(group_size: int, pooled_size: int, loss_weights: Sequence[float], rounds: int) -> None:
    """Refuse numbers that no model can be built with.

    Raises:
        ValueError: naming the config key.
    """
    if group_size < 1 or pooled_size < 1 or pooled_size % group_size:
        raise ValueError(
            f"MODEL.FCIS.POOLED_SIZE {pooled_size} must be a multiple of MODEL.FCIS.GROUP_SIZE "
            f"{group_size}."
        )
    if len(loss_weights) != 3:
        raise ValueError(
            "MODEL.FCIS.LOSS_WEIGHT needs three numbers, for class, mask and box, not "
            f"{list(loss_weights)}."
        )
    if rounds < 1:
        raise ValueError(f"MODEL.FCIS.ITER must be at least 1, not {rounds}.")


def _with_index(boxes: Tensor, image: int = 0) -> Tensor:
    """Return (R, 5): the index of the image before each of (R, 4) boxes."""
    return F.pad(boxes, (1, 0), value=image)


def _log_counts(chosen: list[Regions], num_classes: int) -> None:
    """Show how many regions per image are trained, by detectron2's names."""
    foreground = sum(x.foreground(num_classes).sum() for x in chosen) / len(chosen)
    storage = get_event_storage()
    storage.put_scalar("roi_head/num_fg_samples", foreground)
    storage.put_scalar(
        "roi_head/num_bg_samples", sum(len(x) for x in chosen) / len(chosen) - foreground
    )
