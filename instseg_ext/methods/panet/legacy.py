"""The geometry of the authors' code, a descendant of Detectron, for weights trained with it.

There, a box ends in its last pixel, see ``structures.legacy_boxes``; and regions are pooled without
that one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from instseg_ext.layers.mask_paste import iter_pasted_masks
from instseg_ext.modeling.masks import collect_masks
from instseg_ext.structures.legacy_boxes import Frame, add_last_pixel

__all__ = ["FramedImageList", "legacy_config", "paste_legacy_instances"]


class FramedImageList(ImageList):
    """A batch of images that know their frames."""

    def __init__(
        self, tensor: Tensor, image_sizes: list[tuple[int, int]], frames: Sequence[Frame]
    ) -> None:
        """Keep the frames, one per image, beside detectron2's fields."""
        super().__init__(tensor, image_sizes)
        self.frames = tuple(frames)


def legacy_config(cfg: CfgNode) -> CfgNode:
    """Return a copy of the config that names the legacy parts.

    Raises:
        ValueError: if the config stretches images, has keypoints, or other region heads than
            PANet's.
    """
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError(
            "MODEL.PANET.LEGACY_D1 is for boxes and masks, which the authors' weights have: set "
            "MODEL.KEYPOINT_ON to False."
        )
    if any(cfg.INSTSEG.STRETCH):
        raise ValueError(
            "MODEL.PANET.LEGACY_D1 needs images scaled by one factor: set INSTSEG.STRETCH to "
            "(0, 0)."
        )
    if cfg.MODEL.ROI_HEADS.NAME != "PANetROIHeads":
        raise ValueError(
            "MODEL.PANET.LEGACY_D1 needs MODEL.ROI_HEADS.NAME PANetROIHeads, not "
            f"{cfg.MODEL.ROI_HEADS.NAME}."
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "LegacyAnchorGenerator"
    cfg.MODEL.ROI_HEADS.NAME = "LegacyPANetROIHeads"
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN":
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "LegacyRPN"
    for head in (cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD):
        head.POOLER_TYPE = "ROIAlign"
    return cfg


def _mask_boxes(boxes: Tensor) -> Tensor:
    """Return whole pixels (N, 4), continuous, that 30x30 cells fill: 28 and a border of zeros.

    Args:
        boxes: (N, 4) continuous boxes, pixels of the original image.
    """
    inclusive = add_last_pixel(boxes, -1.0)
    first, last = inclusive[:, :2], inclusive[:, 2:]
    centre, half = (first + last) / 2, (last - first) / 2 * (30 / 28)
    whole = torch.cat([centre - half, centre + half], dim=1).trunc()
    whole[:, 2:] = torch.maximum(whole[:, 2:], whole[:, :2])
    return add_last_pixel(whole, 1.0)


def paste_legacy_instances(
    results: Instances, frame: Frame, *, budget_mb: float = 256, output: str = "bool"
) -> Instances:
    """Bring detections to the original image and paste masks as the authors do.

    Args:
        results: at the scale of the network input, with ``pred_boxes`` that are inside the image;
            optionally ``pred_masks`` (N, 1, m, m), probabilities.
        frame: of the image.
        budget_mb: MiB of working memory of the pasting.
        output: "bool" (``pred_masks``) or "rle" (``pred_masks_rle``).

    Returns:
        The detections with continuous boxes.
    """
    fields = dict(results.get_fields())
    boxes = fields.pop("pred_boxes").tensor.float() / frame.pixel
    masks = fields.pop("pred_masks", None)
    found = Instances(frame.original_size, pred_boxes=Boxes(boxes), **fields)
    found.remove("pixel")
    if masks is not None:
        padded = F.pad(masks[:, 0], (1, 1, 1, 1))
        chunks = iter_pasted_masks(
            padded, _mask_boxes(boxes), frame.original_size, 0.5, budget_mb, reuse=True
        )
        pasted, _ = collect_masks(
            chunks, len(found), frame.original_size, output=output, device=boxes.device
        )
        found.set("pred_masks" if output == "bool" else "pred_masks_rle", pasted)
    return found
