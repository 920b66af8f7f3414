"""SharpMask as a meta-architecture: DeepMask and the refinement of its masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from torch import Tensor, nn

from instseg_ext.methods.deepmask.arch import DeepMask
from instseg_ext.methods.deepmask.config import check_sharpmask_config
from instseg_ext.methods.deepmask.heads import WindowMaps
from instseg_ext.methods.deepmask.inference import Windows, gather_windows
from instseg_ext.methods.deepmask.losses import mean_loss
from instseg_ext.methods.deepmask.refine import SharpMaskHead
from instseg_ext.modeling.dense import register_meta_architecture

__all__ = ["SharpMask"]


@register_meta_architecture
class SharpMask(DeepMask):
    """SharpMask (arXiv:1603.08695): DeepMask whose masks are refined by the trunk's features.

    DeepMask's mask head is part of the model.
    """

    head: SharpMaskHead

    @configurable
    def __init__(
        self, *, freeze_trunk: bool, chunk: int = 128, use_deepmask_head: bool = False, **parts: Any
    ) -> None:
        """Keep the parts.

        Args:
            freeze_trunk: train the refinement alone.
            chunk: windows to refine at a time.
            use_deepmask_head: predict with DeepMask's masks.
            **parts: see ``DeepMask``.
        """
        super().__init__(**parts)
        self.freeze_trunk, self.chunk = freeze_trunk, chunk
        self.use_deepmask_head = use_deepmask_head
        if freeze_trunk:
            for part in self._frozen_parts():
                part.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read ``MODEL.DEEPMASK`` and ``MODEL.SHARPMASK``; see `configurable`."""
        check_sharpmask_config(cfg)
        node = cfg.MODEL.SHARPMASK
        return {
            **super().from_config(cfg),
            "freeze_trunk": node.FREEZE_TRUNK,
            "chunk": node.CHUNK,
            "use_deepmask_head": node.USE_DEEPMASK_HEAD,
        }

    @classmethod
    def build_head(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec], **options: Any
    ) -> SharpMaskHead:
        """Build the head; see the base class."""
        return SharpMaskHead(
            input_shape,
            mask_dim=cfg.MODEL.SHARPMASK.DIM,
            pad_mode=cfg.MODEL.DEEPMASK.PAD_MODE,
            **options,
        )

    def _frozen_parts(self) -> list[nn.Module]:
        return [
            self.backbone,
            *(part for name, part in self.head.named_children() if name != "refine"),
        ]

    def train(self, mode: bool = True) -> SharpMask:
        """Set the mode; parts that are not trained stay in evaluation mode."""
        super().train(mode)
        if self.freeze_trunk:
            for part in self._frozen_parts():
                part.eval()
        return self

    def refined_masks(self, maps: WindowMaps) -> Tensor:
        """Return the refined masks of patches, see the base class."""
        with self.precision():
            return self.head.refine(maps.codes.flatten(1), maps.laterals)

    def losses(
        self, raw: WindowMaps, images: ImageList, gt_instances: list[dict]
    ) -> dict[str, Tensor]:
        """Return ``loss_mask``, and if everything is trained ``loss_coarse`` and ``loss_score``."""
        losses = super().losses(raw, images, gt_instances)
        if self.freeze_trunk:
            losses.pop("loss_score", None)
        return losses

    def mask_losses(
        self, raw: WindowMaps, rows: list[int], targets: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the losses of refined masks and, if it is trained, of DeepMask's head."""
        losses = {} if self.freeze_trunk else super().mask_losses(raw, rows, targets)
        if losses:
            losses["loss_coarse"] = losses.pop("loss_mask")
        if rows:
            raw = WindowMaps(
                raw.codes[rows], raw.scores, tuple(lateral[rows] for lateral in raw.laterals)
            )
        refined = self.refined_masks(raw).float()
        losses["loss_mask"] = self.loss_options.mask_weight * mean_loss(refined, targets)
        return losses

    def window_masks(
        self, maps: list[WindowMaps], windows: Windows
    ) -> tuple[Callable[[slice], Tensor], int, int]:
        """Return what gives the mask logits of windows, see the base class."""
        if self.use_deepmask_head:
            return super().window_masks(maps, windows)
        codes = gather_windows([part.codes for part in maps], windows, 1).flatten(1)
        stages = list(zip(*(part.laterals for part in maps), strict=True))
        cells = self.head.cells

        def logits(index: slice) -> Tensor:
            laterals = [
                gather_windows(stage, windows[index], cells << i, 1 << i)
                for i, stage in enumerate(stages)
            ]
            with self.precision():
                return self.head.refine(codes[index], laterals).float()

        return logits, cells << 4, self.chunk
