"""Refinement of regions: a coarse mask from features, carried to superpixels (Sec. 2.6 of SDS).

Shapes: R regions, n superpixels, S x S cells of the coarse mask, D features, K classes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instseg_ext.structures.region_proposals import RegionProposals

__all__ = ["Refiner", "enlarge", "mask_cells", "superpixel_means"]


def enlarge(boxes: Tensor, part: float) -> Tensor:
    """Add ``part`` of its width or height to each side of (R, 4) XYXY boxes; float64."""
    # The edges of pixels and cells often meet: rounding would decide.
    boxes = boxes.double()
    margin = (boxes[:, 2:] - boxes[:, :2]) * part
    return torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], dim=1)


def _whole(boxes: Tensor) -> list[list[int]]:
    """Return boxes of whole pixels; rounds as MATLAB does, from the first pixel counted as 1."""
    ends = torch.cat([boxes[:, :2] + 1, boxes[:, 2:]], dim=1)
    ends = ends.sign() * (ends.abs() + 0.5).floor()
    ends[:, :2] -= 1
    return ends.long().tolist()


@lru_cache(maxsize=4096)
def _resize_weights(length: int, size: int) -> Tensor:
    """Return (size, length) float32 weights of bicubic resizing with antialiasing.

    As in MATLAB, the line goes on beyond its ends as its own mirror image.
    """
    scale = size / length
    # Narrow kernels when enlarging, wide ones when averaging.
    unit = min(scale, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = torch.arange(math.ceil(4 / unit) + 2)
    place = (centre - 2 / unit).floor().long()[:, None] + taps
    distance = (unit * (centre[:, None] - place)).abs()
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = torch.where(distance <= 1, near, torch.where(distance <= 2, far, 0.0))
    weights /= weights.sum(dim=1, keepdim=True)
    place = place.remainder(2 * length)
    place = torch.where(place < length, place, 2 * length - 1 - place)
    matrix = torch.zeros((size, length), dtype=torch.float64)
    return matrix.scatter_add_(1, place, weights).float()


def mask_cells(regions: RegionProposals, boxes: Tensor, size: int) -> Tensor:
    """Resize what the boxes show of the regions' masks to a few cells, as MATLAB's ``imresize``.

    Args:
        regions: R regions.
        boxes: (R, 4) XYXY float64, one a region; a part beyond the image shows no region.
        size: S.

    Returns:
        (R, S * S) float32, row by row; bicubic values may lie beyond 0 and 1.
    """
    height, width = regions.image_size
    cells = torch.zeros((len(regions), size, size), device=regions.device)
    for row, (x1, y1, x2, y2) in enumerate(_whole(boxes)):
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if left >= right or top >= bottom:
            continue
        inside = regions.members[:, row][regions.superpixels[top:bottom, left:right].long()]
        shown = F.pad(inside.float(), (left - x1, x2 - right, top - y1, y2 - bottom))
        down, across = (_resize_weights(side, size).to(shown.device) for side in shown.shape)
        cells[row] = down @ shown @ across.T
    return cells.flatten(1)


def _cell_of(near: float, far: float, length: int, size: int, legacy: bool) -> tuple[int, Tensor]:
    """Return the first pixel between two ends, and the cell of each from there on."""
    # The authors' code asks for the cell of a pixel's right edge.
    place = torch.arange(length, dtype=torch.float64) + (1.0 if legacy else 0.5)
    edges = near + torch.arange(size + 1, dtype=torch.float64) * (far - near) / size
    cell = torch.bucketize(place, edges, right=True) - 1
    inside = (place > near) & (place <= far)
    first = int(inside.to(torch.uint8).argmax()) if bool(inside.any()) else length
    return first, cell[inside].clamp(0, size - 1)


def superpixel_means(
    coarse: Tensor, boxes: Tensor, superpixels: Tensor, num: int, *, legacy: bool = False
) -> Tensor:
    """Average coarse masks over superpixels.

    A pixel in a box has the value of its cell, one beside it has 0.

    Args:
        coarse: (R, S * S) float, row by row.
        boxes: (R, 4) XYXY that the cells divide evenly.
        superpixels: (H, W) int32 in [0, n).
        num: n.
        legacy: a pixel belongs to the cell of its right and lower edge, as in the authors' code,
            instead of that of its centre.

    Returns:
        (R, n) float32.
    """
    size = round(coarse.shape[1] ** 0.5)
    height, width = superpixels.shape
    pixels = torch.bincount(superpixels.flatten(), minlength=num).clamp(min=1)
    sums = torch.zeros((len(coarse), num), dtype=torch.float64, device=coarse.device)
    for row, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        left, columns = _cell_of(x1, x2, width, size, legacy)
        top, rows = _cell_of(y1, y2, height, size, legacy)
        grid = coarse[row].double().view(size, size)
        values = grid[rows.to(grid.device)][:, columns.to(grid.device)]
        found = superpixels[top : top + len(rows), left : left + len(columns)].long()
        sums[row].index_add_(0, found.flatten(), values.flatten())
    return (sums / pixels).float()


class Refiner(nn.Module):
    """Linear models of each class, fitted after the training of the network.

    Before that, every region stays as it is.

    Attributes:
        coarse_weight: (K, S * S, D + S * S), of the features and of the region's own cells.
        coarse_bias: (K, S * S).
        superpixel_weight: (K, 2), of the mean coarse value and of membership in the region.
        superpixel_bias: (K,).
    """

    def __init__(
        self, num_classes: int, num_features: int, size: int, margin: float, legacy_cells: bool
    ) -> None:
        """Make a refiner that changes nothing.

        Args:
            num_classes: K.
            num_features: D.
            size: S.
            margin: boxes are enlarged by this part of their size on each side.
            legacy_cells: see ``superpixel_means``.
        """
        super().__init__()
        self.size, self.margin, self.legacy_cells = size, margin, legacy_cells
        cells = size * size
        self.register_buffer("coarse_weight", torch.zeros(num_classes, cells, num_features + cells))
        self.register_buffer("coarse_bias", torch.zeros(num_classes, cells))
        self.register_buffer("superpixel_weight", torch.tensor([[0.0, 10.0]] * num_classes))
        self.register_buffer("superpixel_bias", torch.full((num_classes,), -5.0))

    def cell_inputs(self, regions: RegionProposals, features: Tensor) -> Tensor:
        """Return (R, D + S * S), what the coarse mask is predicted from."""
        boxes = enlarge(regions.boxes, self.margin)
        return torch.cat([features.float(), mask_cells(regions, boxes, self.size)], dim=1)

    def project(self, coarse: Tensor, regions: RegionProposals) -> Tensor:
        """Return (R, n), the means of (R, S * S) coarse values over superpixels."""
        return superpixel_means(
            coarse,
            enlarge(regions.boxes, self.margin),
            regions.superpixels,
            regions.num_superpixels,
            legacy=self.legacy_cells,
        )

    @torch.no_grad()
    def forward(self, regions: RegionProposals, features: Tensor, classes: Tensor) -> Tensor:
        """Refine regions.

        Args:
            regions: R regions.
            features: (R, D), not scaled.
            classes: (R,) int64.

        Returns:
            (n, R) bool, the superpixels of the refined regions, which may be none.
        """
        inputs = self.cell_inputs(regions, features)
        coarse = inputs.new_zeros((len(inputs), self.size * self.size))
        for label in classes.unique().tolist():
            rows = classes == label
            logits = inputs[rows] @ self.coarse_weight[label].T + self.coarse_bias[label]
            coarse[rows] = logits.sigmoid()
        means = self.project(coarse, regions)
        weight = self.superpixel_weight[classes]
        score = weight[:, :1] * means + weight[:, 1:] * regions.members.T.float()
        # Logits of at least 0 are probabilities of at least a half.
        return (score + self.superpixel_bias[classes][:, None] >= 0).T
