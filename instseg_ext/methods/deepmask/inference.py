"""From window maps of an image pyramid to the best windows.

Shapes: S scales; h x w windows of one of them; N chosen windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from detectron2.layers import nms
from detectron2.structures import Instances
from torch import Tensor

from instseg_ext.layers.window_paste import WindowAxis, aligned_axis, centred_axis
from instseg_ext.methods.deepmask.config import TRUNK_STRIDE

__all__ = [
    "PAD_VALUE",
    "Windows",
    "choose_windows",
    "drop_proposals",
    "gather_windows",
    "legacy_cells",
    "place_windows",
    "resize_and_pad",
    "scaled_size",
]

# Grey around an image, on the scale of 0 to 255.
PAD_VALUE = 127.5


@dataclass(frozen=True)
class Windows:
    """Chosen windows, best first.

    Attributes:
        scale: (N,) int64, index into the scales.
        row: (N,) int64; the window's centre is at 16 row in the scaled image.
        col: (N,) int64, likewise.
        logits: (N,) float32, their scores.
    """

    scale: Tensor
    row: Tensor
    col: Tensor
    logits: Tensor

    def __len__(self) -> int:
        """Return N."""
        return len(self.logits)

    def __getitem__(self, keep: slice | Tensor) -> Windows:
        """Return some of the windows."""
        return Windows(self.scale[keep], self.row[keep], self.col[keep], self.logits[keep])


def scaled_size(size_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return the size of an image at ``scale``, to the nearest pixel, halves up; at least 1."""
    height, width = (max(1, math.floor(side * scale + 0.5)) for side in size_hw)
    return height, width


def resize_and_pad(image: Tensor, scale: float, border: int) -> Tensor:
    """Resize an image and surround it with grey.

    Args:
        image: (3, H, W) float.
        scale: factor of both sides.
        border: pixels of grey on each side.

    Returns:
        (3, h + 2 border, w + 2 border), bilinear with the corners in place and, as the authors do
        it, without smoothing when shrinking: smoothed images give other scores.
    """
    size = scaled_size(tuple(image.shape[1:]), scale)
    if size != tuple(image.shape[1:]):
        image = F.interpolate(image[None], size=size, mode="bilinear", align_corners=True)[0]
    return F.pad(image, (border,) * 4, value=PAD_VALUE)


def choose_windows(scores: Sequence[Tensor], limit: int) -> Windows:
    """Return the ``limit`` windows with the highest scores, fewer if there are not as many.

    Of equal scores the earlier scale, then the earlier row, then the earlier column comes first.
    Scores that are not finite are never chosen.

    Args:
        scores: of each scale, (h, w) logits.
        limit: windows at most.
    """
    flat = torch.cat([part.flatten() for part in scores]).float()
    usable = flat.isfinite().nonzero().squeeze(1)
    logits, order = flat[usable].sort(descending=True, stable=True)
    chosen = usable[order[:limit]]
    sizes = torch.tensor([part.numel() for part in scores], device=flat.device)
    widths = torch.tensor([part.shape[1] for part in scores], device=flat.device)
    ends = sizes.cumsum(0)
    scale = torch.searchsorted(ends, chosen, right=True)
    cell = chosen - (ends - sizes)[scale]
    return Windows(scale, cell // widths[scale], cell % widths[scale], logits[:limit])


def legacy_cells(windows: Windows, scores: Sequence[Tensor]) -> Windows:
    """Move windows to where the authors' code takes mask and place from, and keep their scores.

    That is the cell above and to the right; at the right border, the first cell of the same row.

    Args:
        windows: as scored.
        scores: of each scale, (h, w); only the shapes count.
    """
    widths = torch.tensor([part.shape[1] for part in scores], device=windows.col.device)
    last = windows.col + 1 == widths[windows.scale]
    row = torch.where(last, windows.row, (windows.row - 1).clamp(min=0))
    col = torch.where(last, 0, windows.col + 1)
    return Windows(windows.scale, row, col, windows.logits)


def gather_windows(maps: Sequence[Tensor], windows: Windows, size: int, step: int = 1) -> Tensor:
    """Cut the squares of windows out of the maps of their scales.

    Args:
        maps: of each scale, (1, C, H, W).
        windows: N of them.
        size: side of a square.
        step: lines of the maps per row and column of windows.

    Returns:
        (N, C, size, size); zero beyond a map's last line and column, as in the authors' code.
    """
    shape = (len(windows), maps[0].shape[1], size, size)
    found = maps[0].new_zeros(shape).contiguous(memory_format=torch.channels_last)
    offset = torch.arange(size, device=found.device)
    for scale, part in enumerate(maps):
        which = (windows.scale == scale).nonzero().squeeze(1)
        height, width = part.shape[2:]
        y = step * windows.row[which, None] + offset
        x = step * windows.col[which, None] + offset
        place = y.clamp(max=height - 1)[:, :, None] * width + x.clamp(max=width - 1)[:, None, :]
        # One row per place, so that the channels of a place are read together.
        cut = part[0].permute(1, 2, 0).reshape(height * width, -1)[place]
        cut *= ((y < height)[:, :, None] & (x < width)[:, None, :])[..., None]
        found[which] = cut.permute(0, 3, 1, 2)
    return found


def place_windows(
    windows: Windows,
    scales: Sequence[float],
    window_size: int,
    cells: int,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    legacy: bool = False,
) -> tuple[list[WindowAxis], list[WindowAxis]]:
    """Lay the windows on the output image.

    Args:
        windows: N of them.
        scales: of the pyramid.
        window_size: side of a window in the scaled image, pixels.
        cells: side of the masks, m.
        input_size: (H, W) of the image whose pyramid it was.
        output_size: (H0, W0) of the original image.
        legacy: on whole pixels and with the corners aligned, as in the authors' code; for equal
            sizes of input and output.

    Returns:
        Per window its rows and its columns.
    """

    def axis(scale: int, index: int, dim: int) -> WindowAxis:
        length = output_size[dim]
        factor = length / (scales[scale] * input_size[dim])
        start = (TRUNK_STRIDE * index - window_size / 2) * factor
        if legacy:
            placed = aligned_axis(start, int(window_size * factor), cells, length)
        else:
            placed = centred_axis(start, start + window_size * factor, cells, length)
        return placed.to(windows.logits.device)

    # The windows of an image share their rows and columns.
    shared = lru_cache(maxsize=None)(axis)
    scale = windows.scale.tolist()
    rows, cols = (
        [shared(s, i, dim) for s, i in zip(scale, index.tolist(), strict=True)]
        for dim, index in enumerate((windows.row, windows.col))
    )
    return rows, cols


def drop_proposals(found: Instances, nms_thresh: float) -> Instances:
    """Drop the proposals without a mask, and those that a better one suppresses.

    Args:
        found: ``pred_boxes`` tight around the masks, ``scores``, and more.
        nms_thresh: IoU of boxes above which the lower one is dropped; 1 keeps all.
    """
    boxes = found.pred_boxes.tensor
    found = found[boxes[:, 2] > boxes[:, 0]]
    if nms_thresh < 1:
        found = found[nms(found.pred_boxes.tensor, found.scores, nms_thresh)]
    return found
