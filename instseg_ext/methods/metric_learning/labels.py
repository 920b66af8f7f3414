"""Ground truth in cells: which object each cell belongs to, and random cells of each object.

Shape shorthand: M objects of an image, h x w cells, N = h w, K cells drawn of each object.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

from instseg_ext.layers.mask_ops import chunk_slices, count_pixels, masks_per_chunk

__all__ = ["CellSample", "cell_labels", "draw_cells"]

# Float copies of masks at one time, MiB.
_BUDGET_MB = 64


@torch.no_grad()
def cell_labels(instances: Instances, stride: int, size_hw: tuple[int, int]) -> Tensor:
    """Give every cell of an image to an object, the background, or nobody.

    A cell belongs to the smallest object that covers half of it, or more. Cells that objects or
    crowds cover by half together but none alone, as well as cells beside the image, belong to
    nobody. Crowds (``gt_is_crowd``) are no objects.

    Args:
        instances: of one image: ``gt_masks`` (BitMasks, M x H x W), possibly ``gt_is_crowd``.
        stride: side of a cell, in pixels of the masks.
        size_hw: (h, w) of the grid, which may reach beyond the image.

    Returns:
        (h, w) int64: the row of the object in [0, M), M for the background, -1 for nobody.
    """
    masks = instances.gt_masks.tensor
    num = len(masks)
    covered = _coverage(masks, stride)
    height, width = (-(-side // stride) for side in instances.image_size)
    labels = covered.new_full((height, width), num, dtype=torch.int64)
    if num:
        enough = covered >= 0.5
        if instances.has("gt_is_crowd"):
            enough &= ~instances.gt_is_crowd[:, None, None]
        order = count_pixels(masks).sort(stable=True).indices
        # The index of the first maximum: the smallest object.
        first = enough[order].to(torch.uint8).argmax(dim=0)
        together = _coverage(masks.any(dim=0, keepdim=True), stride)[0] >= 0.5
        nobody = torch.where(together, -1, labels)
        labels = torch.where(enough.any(dim=0), order[first], nobody)
    padding = (0, size_hw[1] - width, 0, size_hw[0] - height)
    return F.pad(labels, padding, value=-1)


def _coverage(masks: Tensor, stride: int) -> Tensor:
    """Return which part of each cell masks cover, (M, h, w) float32.

    Of a cell that the border of the image cuts, the part inside counts.
    """
    height, width = masks.shape[1:]
    cells = [
        F.avg_pool2d(masks[some, None].float(), stride, ceil_mode=True)[:, 0]
        for some in chunk_slices(len(masks), masks_per_chunk(4 * height * width, _BUDGET_MB))
    ]
    if cells:
        return torch.cat(cells)
    return masks.new_zeros((0, -(-height // stride), -(-width // stride)), dtype=torch.float32)


@dataclass(frozen=True)
class CellSample:
    """Cells drawn from the objects of an image and from its background.

    Attributes:
        cells: (P,) int64 in [0, N), object by object, the background last. Those of an object
            without a cell are arbitrary.
        owners: (P,) int64 in [0, M], the object of each; M is the background.
        sizes: (M + 1,) int64, cells of each object and of the background in the image.
    """

    cells: Tensor
    owners: Tensor
    sizes: Tensor

    @property
    def valid(self) -> Tensor:
        """Tell which of the P cells really belong to their owner."""
        return self.sizes[self.owners] > 0


@torch.no_grad()
def draw_cells(labels: Tensor, num_objects: int, per_object: int, background: int) -> CellSample:
    """Draw the same number of cells from every object, without loops and without waiting.

    An object with fewer cells repeats all of them evenly.

    Args:
        labels: (h, w) int64, see ``cell_labels``.
        num_objects: M.
        per_object: K.
        background: cells drawn from the background.
    """
    labels, device = labels.flatten(), labels.device
    # A stable sort of shuffled cells: the cells of an object come in a random order.
    shuffled = torch.randperm(len(labels), device=device)
    ordered, index = labels[shuffled].sort(stable=True)
    order = shuffled[index]
    bounds = torch.searchsorted(ordered, torch.arange(num_objects + 2, device=device))
    starts, sizes = bounds[:-1], bounds.diff()
    counts = [per_object] * num_objects + [background]
    owners = torch.arange(num_objects + 1, device=device).repeat_interleave(
        torch.tensor(counts, device=device), output_size=sum(counts)
    )
    place = torch.cat([torch.arange(count, device=device) for count in counts])
    place = starts[owners] + place % sizes[owners].clamp(min=1)
    return CellSample(order[place.clamp(max=len(labels) - 1)], owners, sizes)
