"""One builder for everything that turns regions into features of a fixed size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from instseg_ext.layers.roi_align import RowROIAlign
from instseg_ext.layers.roi_pool_v2 import ROIPoolV2
from instseg_ext.layers.roi_warp import ROIWarp

__all__ = ["POOLER_KINDS", "RegionPooler", "build_pooler"]

POOLER_KINDS = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIPoolV2", "ROIWarp")
_HALF = (torch.float16, torch.bfloat16)


class RegionPooler(ROIPooler):
    """detectron2's ``ROIPooler`` (one level per box, Eq. 1 of arXiv:1612.03144) with more kinds.

    Operators without half-precision kernels (all of them on the CPU) run in float32, also under
    autocast; the result has the dtype of the features.
    """

    def __init__(
        self,
        kind: str,
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        sampling_ratio: int,
        *,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
        quantize: bool = True,
        warp_mode: str = "single",
    ) -> None:
        """See ``build_pooler``."""
        super().__init__(
            output_size,
            tuple(scales),
            sampling_ratio,
            "ROIAlignV2" if kind in ("ROIWarp", "ROIPoolV2") else kind,
            canonical_box_size=canonical_box_size,
            canonical_level=canonical_level,
        )
        if kind in ("ROIAlign", "ROIAlignV2"):
            self.level_poolers = nn.ModuleList(
                RowROIAlign(self.output_size, scale, sampling_ratio, aligned=kind == "ROIAlignV2")
                for scale in scales
            )
        if kind == "ROIPoolV2":
            self.level_poolers = nn.ModuleList(
                ROIPoolV2(self.output_size, scale) for scale in scales
            )
        if kind == "ROIWarp":
            self.level_poolers = nn.ModuleList(
                ROIWarp(self.output_size, scale, sampling_ratio or 2, quantize, warp_mode)
                for scale in scales
            )

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pool regions.

        Args:
            x: one (N, C, H_l, W_l) map per scale.
            box_lists: one ``Boxes`` per image, image pixels.

        Returns:
            (M, C, P_h, P_w), the boxes of all images in order.
        """
        dtype = x[0].dtype
        with torch.autocast(x[0].device.type, enabled=False):
            if dtype in _HALF:
                x = [level.float() for level in x]
            return super().forward(x, box_lists).to(dtype)


def build_pooler(
    kind: str,
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int,
    *,
    canonical_box_size: int = 224,
    canonical_level: int = 4,
    quantize: bool = True,
    warp_mode: str = "single",
) -> RegionPooler:
    """Build the pooler that a ``POOLER_TYPE`` key names.

    Args:
        kind: ROIAlign (corners at pixel centres, the first version), ROIAlignV2 (half a pixel
            shifted), ROIPool (max over whole pixels), ROIPoolV2 (the same with bins that share no
            pixel) or ROIWarp (differentiable in the box).
        output_size: side, or (height, width), of the pooled features. With several scales height
            and width must be equal.
        scales: feature pixels per image pixel of each level, powers of two, each half the one
            before.
        sampling_ratio: samples along each side of a bin: averaged by ROIAlign (0 = as many as the
            bin has feature pixels), maximised by ROIWarp (0 = 2); both ROIPools ignore it.
        canonical_box_size: side in image pixels of the box that goes to ``canonical_level``.
        canonical_level: see there; the level of stride 16 is 4.
        quantize: ROIWarp only: round boxes to whole feature pixels.
        warp_mode: ROIWarp only: "single" or "maxsample", where the region decides how many samples
            a bin has, see there.

    Raises:
        ValueError: if ``kind`` or ``warp_mode`` is unknown.
    """
    if kind not in POOLER_KINDS:
        raise ValueError(
            f"POOLER_TYPE must be one of {', '.join(POOLER_KINDS)}, not {kind!r}; set it in "
            "MODEL.ROI_BOX_HEAD, ROI_MASK_HEAD or ROI_KEYPOINT_HEAD"
        )
    return RegionPooler(
        kind,
        output_size,
        scales,
        sampling_ratio,
        canonical_box_size=canonical_box_size,
        canonical_level=canonical_level,
        quantize=quantize,
        warp_mode=warp_mode,
    )
