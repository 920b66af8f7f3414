"""Which cells an instance is responsible for, and what their masks should be.

Shape shorthand: M ground-truth instances, L levels, S_l cells per side of level l, C = sum of S_l^2
cells in level-major, row-major order, P (instance, cell) pairs, K foreground classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instseg_ext.layers.mask_ops import mass_centers

__all__ = ["CellGrid", "CellTargets", "assign_cells", "downsample_masks", "make_targets"]

# Positive cells of an instance lie in the square of this side around the cell of its centre.
_REACH = 3


@dataclass(frozen=True)
class CellGrid:
    """The grids of all levels, finest first.

    Attributes:
        num_grids: cells per side.
        strides: area threshold per level, in mask-map pixels (also the stride of the head's input).
        scale_ranges: closed range of sqrt(box area), input pixels, per level.
        center_radius: side of the centre region as a fraction of the box side.
    """

    num_grids: tuple[int, ...]
    strides: tuple[int, ...]
    scale_ranges: tuple[tuple[float, float], ...]
    center_radius: float = 0.2

    def __post_init__(self) -> None:
        """Refuse lists of unequal length.

        Raises:
            ValueError: naming the keys.
        """
        if not len(self.num_grids) == len(self.strides) == len(self.scale_ranges):
            raise ValueError(
                "MODEL.SOLO.NUM_GRIDS, STRIDES and SCALE_RANGES need one entry per level, but have "
                f"{len(self.num_grids)}, {len(self.strides)} and {len(self.scale_ranges)}."
            )

    @property
    def num_cells(self) -> int:
        """Cells of all levels together (C)."""
        return sum(side * side for side in self.num_grids)

    def per_cell(self, values: Sequence[float], device: torch.device) -> Tensor:
        """Spread one value per level over the cells.

        Args:
            values: L numbers.
            device: of the result.

        Returns:
            (C,) float32.
        """
        parts = [
            torch.full((side * side,), float(value), device=device)
            for side, value in zip(self.num_grids, values, strict=True)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class CellTargets:
    """Targets of one image.

    Attributes:
        labels: (C,) int64 in [0, K]; K means background. The last instance wins a contested cell.
        cells: (P,) int64 cell of each (instance, cell) pair; contested cells appear repeatedly.
        instances: (P,) int64 row of ``masks`` for each pair.
        winners: (C,) int64 instance that owns the cell, -1 for background.
        masks: (M, h, w) uint8 by stride: ground-truth masks at the strides of the mask maps.
    """

    labels: Tensor
    cells: Tensor
    instances: Tensor
    winners: Tensor
    masks: dict[int, Tensor]

    @property
    def num_positive(self) -> Tensor:
        """Number of positive cells, each counted once: 0-d int64, on the device."""
        return (self.winners >= 0).sum()


def downsample_masks(masks: Tensor, stride: int, size_hw: tuple[int, int]) -> Tensor:
    """Shrink binary masks: a pixel is set when 2 of the 4 centre pixels of its block are.

    Equals a bilinear resize by ``1 / stride`` (``align_corners=False``, no antialias) of the mask
    padded with zeros to a multiple of the stride, thresholded at >= 0.5.

    Args:
        masks: (M, h, w) bool or uint8, unpadded.
        stride: even block side.
        size_hw: size of the result, at least ``ceil(h / stride), ceil(w / stride)``; the masks lie
            in its top-left corner.

    Returns:
        (M, *size_hw) uint8 of zeros and ones.
    """
    low, high = stride // 2 - 1, stride // 2
    count = masks.new_zeros((masks.shape[0], *size_hw), dtype=torch.uint8)
    for row in (low, high):
        for column in (low, high):
            # Blocks cut by the mask's border lack some of the slices: they count as zeros.
            part = masks[:, row::stride, column::stride]
            count[:, : part.shape[1], : part.shape[2]] += part
    return (count >= 2).to(torch.uint8)


def _cell_span(center: Tensor, half: Tensor, size: int, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Return first and last positive row (or column) per instance and level, (M, L) int64.

    ``floor(c * S / size)`` is the cell of a coordinate. The span of the centre region is clipped to
    the grid and to one cell on each side of the centre's own.
    """

    def cell(coordinate: Tensor) -> Tensor:
        return (coordinate[:, None] * sides / size).floor().long()

    middle = cell(center)
    reach = _REACH // 2
    first = torch.maximum(cell(center - half).clamp(min=0), middle - reach)
    last = torch.minimum(torch.minimum(cell(center + half), sides - 1), middle + reach)
    return first, last


def assign_cells(
    boxes: Tensor, masks: Tensor, input_hw: tuple[int, int], grid: CellGrid
) -> tuple[Tensor, Tensor]:
    """List the positive (instance, cell) pairs of one image.

    An instance belongs to every level whose range holds the square root of its box area; there,
    the cells under its centre region, at least 1 and at most 9, are positive (Sec. 3.3 of
    arXiv:1912.04488). Instances with an empty mask or of no level's size have none.

    Args:
        boxes: (M, 4) float, XYXY, input pixels.
        masks: (M, h, w) bool, unpadded.
        input_hw: size of the padded batch: the grid spans all of it.
        grid: the levels.

    Returns:
        ``(instances, cells)``: (P,) int64 each, instance-major.
    """
    device = boxes.device
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).double().unbind(dim=1)
    center_y, center_x, area = mass_centers(masks)
    scale = (widths * heights).sqrt()
    ranges = torch.tensor(grid.scale_ranges, dtype=torch.float64, device=device)
    on_level = (scale[:, None] >= ranges[:, 0]) & (scale[:, None] <= ranges[:, 1])
    on_level &= (area > 0)[:, None]

    sides = torch.tensor(grid.num_grids, device=device)
    half = 0.5 * grid.center_radius
    top, bottom = _cell_span(center_y, half * heights, input_hw[0], sides)
    left, right = _cell_span(center_x, half * widths, input_hw[1], sides)

    offsets = torch.arange(_REACH, device=device)
    rows = top[..., None] + offsets  # (M, L, 3)
    columns = left[..., None] + offsets
    inside = (rows <= bottom[..., None])[..., :, None] & (columns <= right[..., None])[..., None, :]
    inside &= on_level[..., None, None]  # (M, L, 3, 3)
    starts = (sides * sides).cumsum(0) - sides * sides
    cells = (
        starts[:, None, None] + rows[..., :, None] * sides[:, None, None] + columns[..., None, :]
    )
    instances = inside.nonzero()[:, 0]
    return instances, cells[inside]


@torch.no_grad()
def make_targets(
    boxes: Tensor,
    classes: Tensor,
    masks: Tensor,
    *,
    input_hw: tuple[int, int],
    mask_sizes: Mapping[int, tuple[int, int]],
    grid: CellGrid,
    num_classes: int,
) -> CellTargets:
    """Make the targets of one image without loops over instances or cells.

    Args:
        boxes: (M, 4) float, XYXY, input pixels.
        classes: (M,) int64 in [0, K).
        masks: (M, h, w) bool at the input's scale, unpadded.
        input_hw: size of the padded batch.
        mask_sizes: sizes of the mask maps by their stride in input pixels.
        grid: the levels.
        num_classes: K.

    Returns:
        See `CellTargets`; M may be 0.
    """
    instances, cells = assign_cells(boxes, masks, input_hw, grid)
    # The largest index is the last instance; indexed assignment leaves the order open on CUDA.
    winners = torch.full((grid.num_cells,), -1, dtype=torch.int64, device=boxes.device)
    winners.scatter_reduce_(0, cells, instances, reduce="amax")
    # A row for background lets -1 pick it, also when there is no instance at all.
    by_instance = torch.cat([classes, classes.new_full((1,), num_classes)])
    return CellTargets(
        labels=by_instance[winners],
        cells=cells,
        instances=instances,
        winners=winners,
        masks={t: downsample_masks(masks, t, size) for t, size in mask_sizes.items()},
    )
