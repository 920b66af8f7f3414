"""The SOLO family as meta-architectures: glue between head, targets, losses and inference."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor

from instseg_ext.config import check_choice
from instseg_ext.methods.solo.decoupled_head import DecoupledSOLOHead
from instseg_ext.methods.solo.grid_head import GridHead, flatten_cells
from instseg_ext.methods.solo.head import SOLOv2Head
from instseg_ext.methods.solo.inference import Detections, InferenceOptions, category_scores, detect
from instseg_ext.methods.solo.location_head import VanillaSOLOHead
from instseg_ext.methods.solo.losses import category_loss, mask_loss
from instseg_ext.methods.solo.targets import CellGrid, CellTargets, make_targets
from instseg_ext.modeling.dense import (
    DenseInstanceSegmenter,
    dense_arguments,
    output_size,
    register_meta_architecture,
)
from instseg_ext.modeling.masks import Crop, Resize, masks_to_instances
from instseg_ext.modeling.runtime import RuntimeOptions
from instseg_ext.modeling.towers import DeformOptions

__all__ = ["SOLO", "GridSegmenter", "LossOptions", "SOLOv2"]


@dataclass(frozen=True)
class LossOptions:
    """Weights of the losses; see the config keys of the same names."""

    weight_cls: float = 1.0
    weight_mask: float = 3.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0


class GridSegmenter(DenseInstanceSegmenter):
    """Base of the family: every grid cell predicts classes and one mask of the whole image.

    Variants differ in their heads alone.

    Note:
        Grid and coordinates span the padded batch, so an image's result depends on the padding that
        its batch mates cause. Published figures are those of batches of one.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: GridHead,
        grid: CellGrid,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        loss_options: LossOptions | None = None,
        inference_options: InferenceOptions | None = None,
        stretch_size: tuple[int, int] = (0, 0),
        runtime: RuntimeOptions | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            backbone: see the base class, as ``pixel_mean``, ``pixel_std``, ``stretch_size`` and
                ``runtime``.
            head: built for the same levels as ``grid``.
            grid: cells of all levels.
            num_classes: foreground classes.
            pixel_mean: see the base class.
            pixel_std: see the base class.
            loss_options: loss weights.
            inference_options: thresholds.
            stretch_size: see the base class.
            runtime: see the base class.
        """
        super().__init__(
            backbone=backbone,
            head=head,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            stretch_size=stretch_size,
            runtime=runtime,
        )
        self.grid = grid
        self.num_classes = num_classes
        self.loss_options = loss_options or LossOptions()
        self.inference_options = inference_options or InferenceOptions()
        areas = grid.per_cell(grid.strides, self.device)
        self.register_buffer("min_areas", areas, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.SOLO``; see `configurable`."""
        node = cfg.MODEL.SOLO
        arguments = dense_arguments(cfg)
        grid = CellGrid(
            num_grids=tuple(node.NUM_GRIDS),
            strides=tuple(node.STRIDES),
            scale_ranges=tuple((float(low), float(high)) for low, high in node.SCALE_RANGES),
            center_radius=node.CENTER_RADIUS,
        )
        if len(node.IN_FEATURES) != len(grid.num_grids):
            raise ValueError(
                f"MODEL.SOLO.IN_FEATURES has {len(node.IN_FEATURES)} entries but NUM_GRIDS has "
                f"{len(grid.num_grids)}."
            )
        head = cls.build_head(
            cfg,
            arguments["backbone"].output_shape(),
            in_features=node.IN_FEATURES,
            strides=grid.strides,
            num_grids=grid.num_grids,
            num_classes=node.NUM_CLASSES,
            num_convs=node.NUM_CONVS,
            width=node.CONV_DIM,
            norm=check_choice("MODEL.SOLO.NORM", node.NORM, ("GN", "BN", "SyncBN")),
            deform=DeformOptions(
                towers=check_choice(
                    "MODEL.SOLO.DEFORM.TOWERS", node.DEFORM.TOWERS, ("none", "last", "all")
                ),
                mask_features=node.DEFORM.MASK_FEATURES,
                modulated=node.DEFORM.MODULATED,
            ),
            prior_prob=node.PRIOR_PROB,
        )
        return {
            **arguments,
            "head": head,
            "grid": grid,
            "num_classes": node.NUM_CLASSES,
            "loss_options": LossOptions(
                weight_cls=node.LOSS_WEIGHT_CLS,
                weight_mask=node.LOSS_WEIGHT_MASK,
                focal_alpha=node.FOCAL_ALPHA,
                focal_gamma=node.FOCAL_GAMMA,
            ),
            "inference_options": InferenceOptions(
                score_thresh=node.SCORE_THRESH,
                mask_thresh=node.MASK_THRESH,
                nms_pre=node.NMS_PRE,
                nms_kernel=node.NMS_KERNEL,
                nms_sigma=node.NMS_SIGMA,
                update_thresh=node.UPDATE_THRESH,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            ),
        }

    @classmethod
    @abstractmethod
    def build_head(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], **grid_options: Any
    ) -> GridHead:
        """Build the variant's head.

        Args:
            cfg: for the keys of this variant.
            input_shape: of the backbone's features.
            **grid_options: arguments that every head takes.
        """

    def targets(
        self, raw: NamedTuple, images: ImageList, gt_instances: list[Instances]
    ) -> list[CellTargets]:
        """Make the targets of a batch.

        Args:
            raw: tells the sizes of the mask maps.
            images: the padded batch; the grids span all of it.
            gt_instances: per image ``gt_boxes``, ``gt_classes`` and ``gt_masks`` (BitMasks).
        """
        return [
            make_targets(
                gt.gt_boxes.tensor,
                gt.gt_classes,
                gt.gt_masks.tensor,
                input_hw=tuple(images.tensor.shape[-2:]),
                mask_sizes=self.head.target_sizes(raw),
                grid=self.grid,
                num_classes=self.num_classes,
            )
            for gt in gt_instances
        ]

    def losses(
        self, raw: NamedTuple, images: ImageList, gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_mask``, weighted; see the base class."""
        targets = self.targets(raw, images, gt_instances)
        across = self.loss_normalizer == "global"
        options = self.loss_options
        loss_cls = category_loss(
            flatten_cells(raw.category_logits).flatten(0, 1),
            torch.cat([t.labels for t in targets]),
            alpha=options.focal_alpha,
            gamma=options.focal_gamma,
            across_processes=across,
        )
        probs, wanted = self.head.mask_pairs(raw, targets)
        loss_mask = mask_loss(
            probs,
            wanted,
            branch=self.head.branch_outputs(raw),
            level_parameters=self.head.level_parameters(),
            across_processes=across,
        )
        return {
            "loss_cls": loss_cls * options.weight_cls,
            "loss_mask": loss_mask * options.weight_mask,
        }

    @torch.no_grad()
    def inference(
        self, raw: NamedTuple, images: ImageList, batched_inputs: list[dict]
    ) -> list[Instances]:
        """Return the detections of each image at its original size; see the base class."""
        input_hw = tuple(images.tensor.shape[-2:])
        results = []
        for found, size, given in zip(
            self.detections(raw), images.image_sizes, batched_inputs, strict=True
        ):
            height, width = output_size(given, size)
            # The probabilities go to the padded input's size first: a fixed factor, also for images
            # so small that ceil(h / Hm) would be less.
            steps = [Resize(input_hw), Crop(tuple(size)), Resize((height, width))]
            results.append(
                masks_to_instances(
                    found.probs,
                    steps,
                    found.scores,
                    found.classes,
                    image_size=(height, width),
                    threshold=self.inference_options.mask_thresh,
                    budget_mb=self.mask_budget_mb,
                    output=self.mask_output,
                )
            )
        return results

    @torch.no_grad()
    def detections(self, raw: NamedTuple) -> list[Detections]:
        """Select the detections of each image, still at the resolution of the mask map.

        Outputs that are not finite give no detections.
        """
        scores = category_scores(raw.category_logits)
        usable = self.head.usable_cells(raw)
        if usable is not None:
            scores = scores * usable[..., None]
        return [
            detect(
                scores[n],
                partial(self.head.mask_source, raw, n),
                min_areas=self.min_areas,
                size_hw=self.head.map_size(raw),
                options=self.inference_options,
                budget_mb=self.mask_budget_mb,
            )
            for n in range(len(scores))
        ]


@register_meta_architecture
class SOLO(GridSegmenter):
    """SOLO (arXiv:1912.04488), vanilla or decoupled: masks are channels of each level's map."""

    @classmethod
    def build_head(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], **grid_options: Any
    ) -> GridHead:
        """Build the head that ``MODEL.SOLO.HEAD`` names; see the base class."""
        kind = check_choice(
            "MODEL.SOLO.HEAD", cfg.MODEL.SOLO.HEAD, ("vanilla", "decoupled", "decoupled_light")
        )
        odd = [stride for stride in grid_options["strides"] if stride % 4]
        if odd:
            raise ValueError(
                "MODEL.SOLO.STRIDES must be multiples of 4 for SOLO, whose masks have half of "
                f"them and are shrunk by an even number; got {odd[0]}."
            )
        if cfg.MODEL.SOLO.DEFORM.MASK_FEATURES:
            raise ValueError(
                "MODEL.SOLO.DEFORM.MASK_FEATURES must be False for SOLO, which has no mask "
                "features; MODEL.SOLO.DEFORM.TOWERS makes its towers deformable."
            )
        if kind == "vanilla":
            return VanillaSOLOHead(input_shape, **grid_options)
        return DecoupledSOLOHead(
            input_shape, shared_tower=kind == "decoupled_light", **grid_options
        )


@register_meta_architecture
class SOLOv2(GridSegmenter):
    """SOLOv2 (arXiv:2003.10152): a cell's mask is its kernel applied to one map of features."""

    @classmethod
    def build_head(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], **grid_options: Any
    ) -> GridHead:
        """Build the head from the keys that only SOLOv2 has; see the base class."""
        node = cfg.MODEL.SOLO
        return SOLOv2Head(
            input_shape,
            kernel_dim=node.KERNEL_DIM,
            mask_in_features=node.MASK_FEATURES.IN_FEATURES,
            mask_width=node.MASK_FEATURES.CONV_DIM,
            **grid_options,
        )
