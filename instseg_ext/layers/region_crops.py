"""Windows around regions, warped to one size with some context, as R-CNN and SDS crop them.

Shapes: (H, W) image, R windows of S x S, n superpixels. Boxes are continuous XYXY of whole pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop_members", "crop_regions"]


class _Axis(NamedTuple):
    """What each of S samples of R windows shows along one axis of the image.

    Attributes:
        position: (R, S) float64, in pixels, the centre of the first pixel at 0.
        nearest: (R, S) int64, the pixel that a sample is taken from without interpolation.
        inside: (R, S) bool, whether the sample lies in the image.
    """

    position: Tensor
    nearest: Tensor
    inside: Tensor


def _half_away(values: Tensor) -> Tensor:
    """Round to whole numbers, halves away from zero as MATLAB does."""
    return values.sign() * (values.abs() + 0.5).floor()


def _axis(near: Tensor, far: Tensor, length: int, size: int, context: int) -> _Axis:
    """Place the samples of one axis.

    Args:
        near: (R,) first pixel of each box.
        far: (R,) one past its last pixel.
        length: pixels of the image.
        size: S.
        context: samples on each side that show what is around the box.
    """
    near, far = near.double().round(), far.double().round()
    if context:
        # From the box's first pixel, counted from 1 as MATLAB does: the rounding of halves depends
        # on the sign. Both ends are rounded and inclusive, so that 195 pixels become 228, not 227.
        half = (far - near) / 2
        centre = near + 1 + half
        reach = half * (size / (size - 2 * context))
        near, far = _half_away(centre - reach) - 1, _half_away(centre + reach)
    scale = size / (far - near).clamp(min=1)
    first, last = near.clamp(min=0), far.clamp(max=length)
    pixels = (last - first).clamp(min=0)
    blank = _half_away((first - near) * scale)
    shown = torch.minimum(_half_away(pixels * scale), size - blank)
    sample = torch.arange(size, device=near.device) - blank[:, None]
    inside = (sample >= 0) & (sample < shown[:, None])
    pixels, shown = pixels.long()[:, None], shown.clamp(min=1).long()[:, None]
    # floor((sample + 1/2) * pixels / shown) in whole numbers: exact
    odd = (2 * sample.long() + 1).clamp(min=1) * pixels
    first = first.clamp(max=max(length - 1, 0)).long()[:, None]
    limit = (pixels - 1).clamp(min=0)
    position = (odd / (2 * shown) - 0.5).clamp(min=0).minimum(limit)
    nearest = (odd // (2 * shown)).minimum(limit)
    return _Axis(first + position, first + nearest, inside)


def _axes(
    boxes: Tensor, size_hw: tuple[int, int], size: int, context: int, mirror: Tensor | None
) -> tuple[_Axis, _Axis]:
    """Return the rows and the columns of all windows."""
    if size < 1 or not 0 <= 2 * context < size:
        raise ValueError(
            f"Windows of {size} pixels cannot have {context} pixels of context on each side."
        )
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    rows = _axis(y1, y2, size_hw[0], size, context)
    columns = _axis(x1, x2, size_hw[1], size, context)
    if mirror is not None:
        turn = mirror[:, None]
        columns = _Axis(*(torch.where(turn, part.flip(1), part) for part in columns))
    return rows, columns


@torch.no_grad()
def crop_regions(
    image: Tensor,
    boxes: Tensor,
    size: int,
    context: int = 16,
    *,
    mean: Tensor | None = None,
    mirror: Tensor | None = None,
) -> Tensor:
    """Crop and warp a window around each box, all windows in one sampling (Sec. 2.1 of SDS).

    The box is enlarged so that after warping about ``context`` pixels around it show; the part of
    it that is in the image is resized, bilinearly and without antialiasing, to its share of the
    window. The rest is 0, as is the mean colour.

    Note:
        Follows the authors' MATLAB code, which makes the features of their classifiers. Their
        Caffe layer, which fine-tunes the towers, differs by less than a grey level, as it resizes
        pictures of 8 bits, and takes the pixels of masks from their near corners, not centres.

    Args:
        image: (C, H, W) float, normalised so that 0 is the mean colour, unless ``mean`` is given.
        boxes: (R, 4) XYXY of whole pixels, x2 and y2 exclusive.
        size: S.
        context: pixels of a window on each side that show the surroundings of the box; 0 warps the
            box itself.
        mean: (C, S, S), or what broadcasts to it, subtracted where a window shows the image: a
            mean image has other values in each of its places.
        mirror: (R,) bool, the windows that are flipped sideways.

    Returns:
        (R, C, S, S) of the image's type.

    Raises:
        ValueError: if the context leaves no room for the box.
    """
    channels, height, width = image.shape
    rows, columns = _axes(boxes, (height, width), size, context, mirror)
    if len(boxes) == 0 or image.numel() == 0:
        return image.new_zeros((len(boxes), channels, size, size))
    # Half a pixel from -1 to the centre of the first pixel.
    y = ((2 * rows.position + 1) / height - 1).to(image.dtype)
    x = ((2 * columns.position + 1) / width - 1).to(image.dtype)
    across = (len(boxes), size, size)
    grid = torch.stack([x[:, None, :].expand(across), y[:, :, None].expand(across)], dim=-1)
    crops = F.grid_sample(
        image.expand(len(boxes), -1, -1, -1), grid, padding_mode="border", align_corners=False
    )
    if mean is not None:
        crops = crops - mean
    return crops * (rows.inside[:, None, :, None] & columns.inside[:, None, None, :])


@torch.no_grad()
def crop_members(
    superpixels: Tensor,
    members: Tensor,
    boxes: Tensor,
    size: int,
    context: int = 16,
    *,
    mirror: Tensor | None = None,
) -> Tensor:
    """Tell which pixels of the windows of ``crop_regions`` belong to the region.

    The region's mask is resized to the nearest pixel; multiplied with the crops, the result blanks
    the background.

    Args:
        superpixels: (H, W) int32 in [0, n).
        members: (n, R) bool.
        boxes: (R, 4), as there.
        size: S.
        context: as there.
        mirror: as there.

    Returns:
        (R, S, S) bool.

    Raises:
        ValueError: as there.
    """
    height, width = superpixels.shape
    rows, columns = _axes(boxes, (height, width), size, context, mirror)
    if len(boxes) == 0 or len(members) == 0:
        return torch.zeros((len(boxes), size, size), dtype=torch.bool, device=boxes.device)
    place = rows.nearest[:, :, None] * width + columns.nearest[:, None, :]
    # index_select is many times faster than indexing
    found = superpixels.flatten().index_select(0, place.flatten()).view_as(place)
    found = found + len(members) * torch.arange(len(boxes), device=found.device)[:, None, None]
    inside = members.T.flatten().index_select(0, found.flatten()).view_as(place)
    return inside & rows.inside[:, :, None] & columns.inside[:, None, :]
