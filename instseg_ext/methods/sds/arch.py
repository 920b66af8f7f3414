"""SDS as a meta-architecture: windows around regions, towers, classes, masks of superpixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import build_backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from instseg_ext.layers.mask_ops import RLEList
from instseg_ext.layers.reduce import mean_over_processes
from instseg_ext.layers.region_crops import crop_members, crop_regions
from instseg_ext.layers.region_nms import region_nms
from instseg_ext.methods.sds.config import check_settings
from instseg_ext.methods.sds.head import SDSHead
from instseg_ext.methods.sds.refine import Refiner
from instseg_ext.methods.sds.segmentation import propose_regions
from instseg_ext.methods.sds.targets import WindowOptions, draw_windows, window_labels
from instseg_ext.methods.sds.towers import CaffeNet, PooledBackbone, TwoPathway
from instseg_ext.modeling.dense import output_size, register_meta_architecture
from instseg_ext.modeling.runtime import RuntimeMixin, RuntimeOptions
from instseg_ext.structures.region_proposals import RegionProposals

__all__ = ["SDS", "CropOptions"]


@dataclass(frozen=True)
class CropOptions:
    """How windows are cut out; see the config keys of the same names."""

    size: int = 227
    context: int = 16
    chunk: int = 128
    mirror: bool = True


@register_meta_architecture
class SDS(RuntimeMixin, nn.Module):
    """Simultaneous detection and segmentation (arXiv:1407.1808).

    Training fine-tunes the networks with a softmax over windows. Inference classifies region
    proposals by linear models, fitted afterwards, and refines the masks of those that are left.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: TwoPathway,
        head: SDSHead,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        image_format: str = "BGR",
        crops: CropOptions | None = None,
        windows: WindowOptions | None = None,
        max_regions: int = 2000,
        refine: bool = True,
        score_thresh: float = 0.25,
        max_detections: int = 100,
        runtime: RuntimeOptions | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            backbone: the two networks.
            head: classes and masks.
            num_classes: K.
            pixel_mean: per channel, in the channel order of the input.
            pixel_std: likewise.
            image_format: ``BGR`` or ``RGB``, the channel order of the input.
            crops: of the windows.
            windows: which of them are drawn in training.
            max_regions: regions of an image that are looked at, from the first.
            refine: whether masks are refined.
            score_thresh: strict lower bound of scores.
            max_detections: of an image, the best.
            runtime: precision, memory format, mask options; default options if None.
        """
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.num_classes = num_classes
        self.image_format = image_format
        self.crops = crops or CropOptions()
        self.windows = windows or WindowOptions()
        self.max_regions = max_regions
        self.refine = refine
        self.score_thresh = score_thresh
        self.max_detections = max_detections
        mean, std = torch.tensor(pixel_mean), torch.tensor(pixel_std)
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)
        self.init_runtime(runtime or RuntimeOptions())

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.SDS``; see `configurable`.

        Raises:
            ValueError: if a setting is impossible.
        """
        node = cfg.MODEL.SDS
        check_settings(node)
        backbone = TwoPathway(_tower(cfg), _tower(cfg))
        refiner = Refiner(
            node.NUM_CLASSES,
            backbone.num_features,
            node.REFINE.SIZE,
            # So much of a box as its context is of the window without it.
            node.CONTEXT / (node.WINDOW - 2 * node.CONTEXT),
            node.REFINE.LEGACY_CELLS,
        )
        head = SDSHead(backbone.num_features, node.NUM_CLASSES, refiner)
        head.classifier.lr_factor = node.CLASSIFIER_LR_MULT
        return {
            "backbone": backbone,
            "head": head,
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "image_format": cfg.INPUT.FORMAT,
            "crops": CropOptions(node.WINDOW, node.CONTEXT, node.CHUNK, node.MIRROR),
            "windows": WindowOptions(node.FOREGROUND, node.BACKGROUND, node.FG_IOU),
            "max_regions": node.MAX_REGIONS,
            "refine": node.REFINE.ENABLED,
            "score_thresh": node.SCORE_THRESH,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "runtime": RuntimeOptions.from_config(cfg),
        }

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Return the loss in training, else ``[{"instances": ...}, ...]`` at the original sizes.

        Args:
            batched_inputs: dicts with ``image``, and ``instances`` in training, ``height`` and
                ``width`` (the output size) in inference. ``region_proposals`` are those of the
                image as it is given; where they are missing, the image is segmented.

        Raises:
            ValueError: if an image has no ``instances`` in training, or regions of another size.
        """
        if self.training:
            return self.losses(batched_inputs)
        with torch.no_grad():
            return [{"instances": self.inference(x)} for x in batched_inputs]

    # --- parts -----------------------------------------------------------------------------------

    def regions_of(self, batched_input: dict) -> RegionProposals:
        """Return the regions of an image, on the model's device.

        Raises:
            ValueError: if those given are of an image of another size.
        """
        image, regions = batched_input["image"], batched_input.get("region_proposals")
        if regions is None:
            picture = image.clamp(0, 255).round().to("cpu", torch.uint8).permute(1, 2, 0)
            picture = picture.flip(2) if self.image_format == "BGR" else picture
            regions = propose_regions(picture.contiguous().numpy(), self.max_regions)
        if regions.image_size != tuple(image.shape[1:]):
            name = batched_input.get("file_name", "an image")
            raise ValueError(
                f"{name}: its regions are of an image of size {regions.image_size}, but it has "
                f"{tuple(image.shape[1:])} (height, width)."
            )
        return regions[: self.max_regions].to(self.device)

    def cut_windows(
        self,
        batched_input: dict,
        regions: RegionProposals,
        rows: Tensor | slice,
        mirror: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cut windows around regions of an image.

        Args:
            batched_input: with ``image``.
            regions: of the image.
            rows: W of the regions.
            mirror: (W,) bool, windows that are flipped sideways.

        Returns:
            (W, C, S, S) windows, 0 = the mean colour; and (W, S, S) bool, the regions in them.
        """
        image = (batched_input["image"].to(self.device).float() - self.pixel_mean) / self.pixel_std
        size, context = self.crops.size, self.crops.context
        boxes, members = regions.boxes[rows], regions.members[:, rows]
        windows = crop_regions(image, boxes, size, context, mirror=mirror)
        inside = crop_members(regions.superpixels, members, boxes, size, context, mirror=mirror)
        return windows, inside

    def features(self, batched_input: dict, regions: RegionProposals) -> Tensor:
        """Return (R, D) float32 features of all regions of an image, a chunk at a time."""
        parts = [self.pixel_mean.new_zeros((0, self.backbone.num_features))]
        for start in range(0, len(regions), self.crops.chunk):
            rows = slice(start, start + self.crops.chunk)
            windows, inside = self.cut_windows(batched_input, regions, rows)
            with self.precision():
                parts.append(self.backbone(self.to_memory_format(windows), inside).float())
        return torch.cat(parts)

    # --- training --------------------------------------------------------------------------------

    def losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Return ``loss_cls``, the mean cross entropy of the windows drawn; see ``forward``."""
        drawn = [self._training_windows(x) for x in batched_inputs]
        windows, inside, labels = (torch.cat(part) for part in zip(*drawn, strict=True))
        with self.precision():
            logits = self.head(self.backbone(self.to_memory_format(windows), inside))
        count = windows.new_tensor(float(len(labels)))
        if self.loss_normalizer == "global":
            count = mean_over_processes(count)
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        return {"loss_cls": total / count.clamp(min=1)}

    @torch.no_grad()
    def _training_windows(self, batched_input: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the windows of an image.

        Returns:
            (W, C, S, S) windows, (W, S, S) bool regions in them, (W,) labels.
        """
        if "instances" not in batched_input:
            name = batched_input.get("file_name", "an image")
            raise ValueError(f"Training needs 'instances' for every image, but {name} has none.")
        objects = batched_input["instances"].to(self.device)
        masks = objects.gt_masks.tensor
        regions = self.regions_of(batched_input).intersect(masks)
        labels = window_labels(
            regions.iou(masks), objects.gt_classes, self.num_classes, self.windows.min_iou
        )
        rows = draw_windows(labels, self.num_classes, self.windows)
        mirror = torch.rand(len(rows), device=self.device) < 0.5 * self.crops.mirror
        return *self.cut_windows(batched_input, regions, rows, mirror), labels[rows]

    # --- inference -------------------------------------------------------------------------------

    def inference(self, batched_input: dict) -> Instances:
        """Return the detections of an image at its original size."""
        regions = self.regions_of(batched_input)
        features = self.features(batched_input, regions)
        scores = self.head.scores(features)
        if not bool(features.isfinite().all()):
            # Weights have gone astray: what is still finite means nothing.
            scores = torch.full_like(scores, torch.nan)
        rows, classes = region_nms(regions.members, scores, self.score_thresh)
        best = scores[rows, classes].argsort(descending=True, stable=True)[: self.max_detections]
        rows, classes = rows[best], classes[best]
        scores, chosen = scores[rows, classes], regions[rows]
        members = chosen.members
        if self.refine:
            members = self.head.refiner(chosen, features[rows], classes)
        superpixels = _resized(regions.superpixels, output_size(batched_input, regions.image_size))
        refined = RegionProposals(superpixels, members, scores)
        # Nothing of some regions is left by the refinement, or by a smaller output.
        found = (refined.boxes[:, 2] > 0).nonzero().flatten()
        return self._instances(refined[found], scores[found], classes[found])

    def _instances(self, regions: RegionProposals, scores: Tensor, classes: Tensor) -> Instances:
        result = Instances(regions.image_size)
        result.pred_boxes = Boxes(regions.boxes)
        result.scores = scores
        result.pred_classes = classes
        if self.mask_output == "rle":
            result.pred_masks_rle = RLEList(regions.rles())
        else:
            result.pred_masks = regions.masks()
        return result


def _resized(superpixels: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Resize a map of superpixels to the nearest pixel."""
    if tuple(superpixels.shape) == tuple(size_hw):
        return superpixels
    places = [
        ((2 * torch.arange(new, device=superpixels.device) + 1) * old // (2 * new))
        for old, new in zip(superpixels.shape, size_hw, strict=True)
    ]
    return superpixels[places[0]][:, places[1]].contiguous()


def _tower(cfg: CfgNode) -> nn.Module:
    if cfg.MODEL.SDS.TOWER == "caffenet":
        return CaffeNet(cfg.MODEL.SDS.WINDOW)
    return PooledBackbone(build_backbone(cfg))
