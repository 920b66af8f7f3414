"""DeepMask as a meta-architecture: glue between trunk, heads, losses and inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, move_device_like
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from instseg_ext.layers.window_paste import iter_window_masks
from instseg_ext.methods.deepmask.config import check_deepmask_config
from instseg_ext.methods.deepmask.heads import DeepMaskHead, WindowMaps
from instseg_ext.methods.deepmask.inference import (
    Windows,
    choose_windows,
    drop_proposals,
    gather_windows,
    legacy_cells,
    place_windows,
    resize_and_pad,
)
from instseg_ext.methods.deepmask.losses import enlarge, mean_loss
from instseg_ext.methods.deepmask.options import InferenceOptions, LossOptions
from instseg_ext.modeling.dense import (
    DenseInstanceSegmenter,
    dense_arguments,
    output_size,
    register_meta_architecture,
)
from instseg_ext.modeling.masks import collect_masks
from instseg_ext.modeling.runtime import RuntimeOptions

__all__ = ["DeepMask", "PatchOutputs"]


class PatchOutputs(NamedTuple):
    """What a model says of N patches.

    Attributes:
        mask_logits: (N, m, m) float32, of DeepMask's mask head.
        score_logits: (N,) float32.
        refined_logits: (N, 16 cells, 16 cells) float32 of SharpMask's refinement, else None.
    """

    mask_logits: Tensor
    score_logits: Tensor
    refined_logits: Tensor | None


@register_meta_architecture
class DeepMask(DenseInstanceSegmenter):
    """DeepMask (arXiv:1506.06204; the trunk and heads of arXiv:1603.08695).

    Training sees patches, see ``methods.deepmask.mapper``; inference slides the same layers over an
    image pyramid. An image's result does not depend on its batch.
    """

    head: DeepMaskHead

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: DeepMaskHead,
        window_size: int,
        context: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        loss_options: LossOptions | None = None,
        inference_options: InferenceOptions | None = None,
        runtime: RuntimeOptions | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            backbone: see the base class, as ``pixel_mean``, ``pixel_std`` and ``runtime``.
            head: for windows of ``window_size``.
            window_size: side of a window, pixels of the scaled image.
            context: what a training patch has more than a window, on each side.
            pixel_mean: see the base class.
            pixel_std: see the base class.
            loss_options: targets and weights.
            inference_options: scales and thresholds.
            runtime: see the base class.
        """
        super().__init__(
            backbone=backbone,
            head=head,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            runtime=runtime,
        )
        self.window_size, self.context = window_size, context
        self.loss_options = loss_options or LossOptions()
        self.inference_options = inference_options or InferenceOptions()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.DEEPMASK``; see `configurable`."""
        check_deepmask_config(cfg)
        node = cfg.MODEL.DEEPMASK
        arguments = dense_arguments(cfg)
        if any(arguments.pop("stretch_size")):
            raise ValueError("INSTSEG.STRETCH must be [0, 0]: DeepMask has a pyramid of its own.")
        backbone = arguments["backbone"]
        return {
            **arguments,
            "head": cls.build_head(
                cfg,
                backbone.output_shape(),
                in_feature=list(backbone.output_shape())[-1],
                window_size=node.INPUT_SIZE,
                reduce_dim=node.REDUCE_DIM,
                code_dim=node.CODE_DIM,
                out_size=node.OUT_SIZE,
                score_dim=node.SCORE_DIM,
                score_dropout=node.SCORE_DROPOUT,
                separate=node.HEADS == "separate",
            ),
            "window_size": node.INPUT_SIZE,
            "context": node.CONTEXT,
            "loss_options": LossOptions.from_config(cfg),
            "inference_options": InferenceOptions.from_config(cfg),
        }

    @classmethod
    def build_head(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], **options: Any
    ) -> DeepMaskHead:
        """Build the head.

        Args:
            cfg: for the keys of this variant.
            input_shape: of the trunk's features.
            **options: arguments that every head takes.
        """
        return DeepMaskHead(input_shape, **options)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Return the losses in training, else proposals at the original sizes.

        Args:
            batched_inputs: in training patches, see ``losses``; in inference dicts with ``image``,
                (C, H, W) of values 0 to 255, and ``height`` and ``width``, the output size.

        Returns:
            In inference per image ``instances``: ``pred_boxes``, ``scores``, ``pred_classes`` (all
            0), ``pred_masks`` or ``pred_masks_rle``; and ``proposals``, the same rows with
            ``proposal_boxes`` and ``objectness_logits``.

        Raises:
            ValueError: if a training patch is not what the model needs.
        """
        if self.training:
            images, maps = self.patch_maps(batched_inputs)
            return self.losses(maps, images, batched_inputs)
        # One image after the other: the maps of a pyramid are large.
        return [self._propose(given) for given in batched_inputs]

    def _propose(self, given: dict) -> dict[str, Instances]:
        image = move_device_like(given["image"], self.pixel_mean)
        images = ImageList(image[None], [(int(image.shape[1]), int(image.shape[2]))])
        (instances,) = self.inference([self.pyramid_maps(image)], images, [given])
        proposals = Instances(instances.image_size)
        proposals.proposal_boxes = instances.pred_boxes
        proposals.objectness_logits = instances.objectness_logits
        instances.remove("objectness_logits")
        return {"instances": instances, "proposals": proposals}

    # --- patches ---------------------------------------------------------------------------------

    def patch_maps(self, batched_inputs: list[dict]) -> tuple[ImageList, WindowMaps]:
        """Run the network on patches, each of which is one window with its context.

        Args:
            batched_inputs: dicts with ``image``, (C, P, P) of values 0 to 255.

        Returns:
            The normalised patches, and the raw outputs of N x 1 x 1 windows.

        Raises:
            ValueError: if a patch has another size.
        """
        side = self.window_size + 2 * self.context
        for x in batched_inputs:
            if tuple(x["image"].shape[1:]) != (side, side):
                name = x.get("file_name", x.get("image_id", "an image"))
                raise ValueError(
                    f"{type(self).__name__} trains on patches of {side} x {side} pixels, but "
                    f"{name} gives {tuple(x['image'].shape[1:])} (height, width)."
                )
        images = self.preprocess_image(batched_inputs)
        with self.precision():
            features = self.backbone(images.tensor)
            shapes = self.backbone.output_shape()
            for name, feature in features.items():
                lines = self.context // shapes[name].stride
                features[name] = feature[
                    :, :, lines : feature.shape[2] - lines, lines : feature.shape[3] - lines
                ]
            return images, self.head(features)

    def patch_outputs(self, batched_inputs: list[dict]) -> PatchOutputs:
        """Return masks and scores of patches, without their losses; see ``patch_maps``."""
        _, maps = self.patch_maps(batched_inputs)
        with self.precision():
            masks = self.head.mask(maps.codes.flatten(1))
        refined = self.refined_masks(maps)
        return PatchOutputs(
            masks.float(),
            maps.scores.flatten().float(),
            None if refined is None else refined.float(),
        )

    def refined_masks(self, maps: WindowMaps) -> Tensor | None:
        """Return (N, 16 cells, 16 cells) logits of N patches, None where nothing refines them."""
        return None

    def losses(
        self, raw: WindowMaps, images: ImageList, gt_instances: list[dict]
    ) -> dict[str, Tensor]:
        """Return ``loss_mask`` and ``loss_score``, weighted.

        Args:
            raw: of the patches.
            images: not used.
            gt_instances: the patches themselves: dicts with ``is_mask`` and, where it is True,
                ``target``, (GT_SIZE, GT_SIZE) bool, else ``label``, 1.0 or -1.0.

        Returns:
            With ``ALTERNATE`` only the loss that the patches have, so that no optimiser touches the
            other head.
        """
        masks = [i for i, patch in enumerate(gt_instances) if patch["is_mask"]]
        scores = [i for i, patch in enumerate(gt_instances) if not patch["is_mask"]]
        losses = {}
        if masks or not self.loss_options.alternate:
            targets = [gt_instances[i]["target"].to(self.device) for i in masks]
            losses |= self.mask_losses(raw, masks, torch.stack(targets) if targets else None)
        if scores or not self.loss_options.alternate:
            labels = torch.tensor([gt_instances[i]["label"] > 0 for i in scores], dtype=torch.bool)
            logits = raw.scores.flatten()
            losses["loss_score"] = self.loss_options.score_weight * mean_loss(
                logits[scores] if scores else logits, labels.to(self.device) if scores else None
            )
        return losses

    def mask_losses(
        self, raw: WindowMaps, rows: list[int], targets: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the losses of masks, weighted.

        Args:
            raw: of all patches.
            rows: those that have a mask.
            targets: theirs, (n, GT_SIZE, GT_SIZE) bool; None if n is 0.
        """
        codes = raw.codes.flatten(1)
        with self.precision():
            logits = self.head.mask(codes[rows] if rows else codes)
        logits = enlarge(logits.float(), self.loss_options.gt_size)
        return {"loss_mask": self.loss_options.mask_weight * mean_loss(logits, targets)}

    # --- images ----------------------------------------------------------------------------------

    def pyramid_maps(self, image: Tensor) -> list[WindowMaps]:
        """Run the network on an image at every scale.

        Args:
            image: (C, H, W) of values 0 to 255, on the model's device.

        Returns:
            Per scale the raw outputs of 1 x (ceil(h / 16) + 1) x (ceil(w / 16) + 1) windows of the
            scaled h x w image.
        """
        maps = []
        for scale in self.inference_options.scales:
            with self.precision():
                maps.append(self.head(self.backbone(self._scaled(image, scale))))
        return maps

    def network_inputs(self, batched_inputs: list[dict]) -> list[Tensor]:
        """Return what the trunk is given in inference, (1, C, H, W) for each image and scale."""
        images = [move_device_like(x["image"], self.pixel_mean) for x in batched_inputs]
        return [self._scaled(image, s) for image in images for s in self.inference_options.scales]

    def _scaled(self, image: Tensor, scale: float) -> Tensor:
        scaled = resize_and_pad(image.float(), scale, self.window_size // 2)
        return self.to_memory_format(((scaled - self.pixel_mean) / self.pixel_std)[None])

    @torch.no_grad()
    def inference(
        self, raw: list[list[WindowMaps]], images: ImageList, batched_inputs: list[dict]
    ) -> list[Instances]:
        """Return the proposals of each image at its original size, best first.

        Args:
            raw: of each image, by scale.
            images: only the sizes count.
            batched_inputs: the loader dicts, for ``height`` and ``width``.

        Returns:
            See ``forward``; here with ``objectness_logits``, too. Windows without a mask are no
            proposals.
        """
        options = self.inference_options
        results = []
        for maps, size, given in zip(raw, images.image_sizes, batched_inputs, strict=True):
            scores = [part.scores[0] for part in maps]
            windows = choose_windows(scores, options.max_proposals)
            if options.legacy_indexing:
                windows = legacy_cells(windows, scores)
            results.append(self._paste(maps, windows, size, output_size(given, size)))
        return results

    def _paste(
        self,
        maps: list[WindowMaps],
        windows: Windows,
        input_size: tuple[int, int],
        out_size: tuple[int, int],
    ) -> Instances:
        options = self.inference_options
        if options.legacy_paste and tuple(input_size) != tuple(out_size):
            raise ValueError(
                "MODEL.DEEPMASK.LEGACY_PASTE knows the original size of images alone, but the "
                f"model got {tuple(input_size)} for an image of {tuple(out_size)} (height, width)."
            )
        logits, cells, at_once = self.window_masks(maps, windows)
        rows, cols = place_windows(
            windows,
            options.scales,
            self.window_size,
            cells,
            input_size,
            out_size,
            legacy=options.legacy_paste,
        )
        probability = options.mask_thresh
        chunks = iter_window_masks(
            logits,
            rows,
            cols,
            out_size,
            math.log(probability / (1 - probability)),
            self.mask_budget_mb,
            largest_chunk=at_once,
        )
        masks, boxes = collect_masks(
            chunks,
            len(windows),
            out_size,
            output=self.mask_output,
            device=self.device,
            with_boxes=True,
        )
        found = Instances(out_size)
        found.pred_boxes = Boxes(boxes)
        found.scores = windows.logits.sigmoid()
        found.pred_classes = torch.zeros_like(windows.scale)
        found.set("pred_masks" if isinstance(masks, Tensor) else "pred_masks_rle", masks)
        found.objectness_logits = windows.logits
        return drop_proposals(found, options.nms_thresh)

    def window_masks(
        self, maps: list[WindowMaps], windows: Windows
    ) -> tuple[Callable[[slice], Tensor], int, int]:
        """Return what gives the mask logits of windows.

        Args:
            maps: of an image, by scale.
            windows: N of them.

        Returns:
            A function from a slice of the windows to (n, m, m) float32 logits; m; and the largest n
            that it should be called with.
        """
        codes = gather_windows([part.codes for part in maps], windows, 1).flatten(1)

        def logits(index: slice) -> Tensor:
            with self.precision():
                return self.head.mask(codes[index]).float()

        return logits, self.head.mask.out_size, 128
