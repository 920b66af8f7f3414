"""Ground-truth masks of sampled regions, without a copy of the image-sized mask for each region.

Shapes: M objects, P regions, H x W padded or unpadded network input.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.structures import BitMasks
from torch import Tensor

__all__ = ["MatchedBitMasks", "as_matched_masks"]


class MatchedBitMasks:
    """Masks of M objects, looked at through the index of the object that each of P entries matches.

    Behaves as ``BitMasks`` where heads train: indexing, ``len``, ``to``, ``crop_and_resize``.
    Indexing costs P integers; ``BitMasks`` would copy P image-sized masks (half a gigabyte for 512
    regions at 800 x 1333).
    """

    def __init__(self, masks: BitMasks | Tensor, index: Tensor | None = None) -> None:
        """Look at all objects, or at those of ``index``.

        Args:
            masks: (M, H, W) bool.
            index: (P,) int64 in [0, M); None for all M in order.
        """
        self.masks = masks.tensor if isinstance(masks, BitMasks) else masks
        self.index = (
            torch.arange(len(self.masks), device=self.masks.device) if index is None else index
        )

    @property
    def device(self) -> torch.device:
        """Where the masks live."""
        return self.masks.device

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.masks.shape[1], self.masks.shape[2]

    @property
    def tensor(self) -> Tensor:
        """The (P, H, W) masks, copied."""
        return self.masks[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: Any) -> MatchedBitMasks:
        index = self.index[item]
        return MatchedBitMasks(self.masks, index[None] if index.dim() == 0 else index)

    def to(self, device: torch.device | str) -> MatchedBitMasks:
        """Return the masks on another device."""
        return MatchedBitMasks(self.masks.to(device), self.index.to(device))

    def nonempty(self) -> Tensor:
        """Return (P,) bool: which masks have a pixel."""
        return self.masks.flatten(1).any(dim=1)[self.index]

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Crop each mask by its box and resize it, as ``BitMasks.crop_and_resize`` does.

        Args:
            boxes: (P, 4) XYXY, network-input pixels.
            mask_size: side of the result.

        Returns:
            (P, mask_size, mask_size) bool.

        Raises:
            ValueError: if there is not one box for each entry.
        """
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes for {len(self)} masks")
        with torch.autocast(self.device.type, enabled=False):
            boxes = boxes.to(device=self.device, dtype=torch.float32)
            # only masks that some box asks for are turned into floats
            used, entry = self.index.unique(return_inverse=True)
            rois = torch.cat([entry[:, None].to(boxes.dtype), boxes], dim=1)
            maps = self.masks[used].to(torch.float32)[:, None]
            cropped = ROIAlign((mask_size, mask_size), 1.0, 0, aligned=True)(maps, rois)
        return cropped.squeeze(1) >= 0.5


def as_matched_masks(masks: object) -> MatchedBitMasks:
    """Return ground-truth masks as ``MatchedBitMasks``.

    Args:
        masks: ``gt_masks`` of the objects of an image or of its sampled regions.

    Raises:
        ValueError: if they are not bit masks.
    """
    if isinstance(masks, MatchedBitMasks):
        return masks
    if isinstance(masks, BitMasks):
        return MatchedBitMasks(masks)
    raise ValueError(
        f"Labels are read from bit masks, not {type(masks).__name__}: with detectron2's mapper set "
        "INPUT.MASK_FORMAT to bitmask."
    )
