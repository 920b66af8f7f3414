"""Region proposals of an image as sets of superpixels (SDS, arXiv:1407.1808, as its code does).

Two thousand masks of one image overlap in few ways. Kept as unions of superpixels they take a few
megabytes, and areas, overlaps and boxes become small matrix products.

Shapes: (H, W) image, n superpixels with the ids 0..n-1, R regions, G objects.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from instseg_ext.structures.mcg import read_mcg
from instseg_ext.structures.rle import decode_masks, encode_crops
from instseg_ext.structures.superpixels import connected_parts, parts_of_masks

__all__ = ["RegionProposals"]

_FORMAT = "instseg_ext regions 1"
# What damaged or foreign content raises in numpy and zipfile.
_READ_ERRORS = (EOFError, KeyError, MemoryError, OSError, TypeError, ValueError)
_READ_ERRORS += (zipfile.BadZipFile, zlib.error)

# Members of regions that are floats at one time.
_FLOATS = 2**23

Masks = Tensor | np.ndarray | Sequence[dict[str, Any]]


class RegionProposals:
    """R regions of one image, each a union of the same n superpixels.

    Indexing chooses regions; the superpixels stay.

    Attributes:
        superpixels: (H, W) int32 in [0, n).
        members: (n, R) bool, the superpixels of each region.
        scores: (R,) float32.
        boxes: (R, 4) float32 tight XYXY in pixels, x2 and y2 exclusive; zeros for an empty region.
    """

    def __init__(self, superpixels: Tensor, members: Tensor, scores: Tensor) -> None:
        """Check what is given; nothing is copied.

        Args:
            superpixels: (H, W) int32.
            members: (n, R) bool.
            scores: (R,) float.

        Raises:
            ValueError: if types or shapes do not fit, or a superpixel is not in [0, n).
        """
        _check(superpixels, members, scores)
        self.superpixels = superpixels
        self.members = members
        self.scores = scores.float()
        self._boxes: Tensor | None = None

    # --- making them ---------------------------------------------------------------------------

    @classmethod
    def from_masks(
        cls, masks: Masks, scores: Tensor | None = None, size_hw: tuple[int, int] | None = None
    ) -> RegionProposals:
        """Bring any masks into this form, exactly.

        Args:
            masks: (R, H, W) bool, or R COCO run-length dictionaries of one size.
            scores: (R,); ones if None.
            size_hw: (H, W) of the image, needed where there are no run lengths to tell it.

        Raises:
            ValueError: if the masks have no or different sizes, or there are fewer or more scores.
        """
        stack = masks.cpu().numpy() if isinstance(masks, Tensor) else masks
        size_hw = _common_size(stack, size_hw)
        superpixels, members = parts_of_masks(stack, size_hw)
        scores = torch.ones(len(stack)) if scores is None else scores.cpu()
        return cls(torch.from_numpy(superpixels), torch.from_numpy(members), scores)

    @classmethod
    def from_mcg_mat(cls, path: str | os.PathLike[str], top: int = 2000) -> RegionProposals:
        """Read the candidates that MCG's MATLAB code saved for an image.

        Superpixels that the same regions have are merged where they touch.

        Args:
            path: a ``.mat`` file with ``superpixels``, ``labels`` and perhaps ``scores``, by
                themselves or in the structure ``candidates``; its order is kept.
            top: regions to read, from the first.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds something else.
            ImportError: without scipy.
        """
        superpixels, labels, scores = read_mcg(path)
        labels = labels[:top]
        members = np.zeros((int(superpixels.max(initial=0)), len(labels)), dtype=bool)
        for column, ids in enumerate(labels):
            members[ids - 1, column] = True
        if scores is None:
            scores = 1 - np.arange(len(labels)) / max(len(labels), 1)
        return cls.merged(superpixels - 1, members, scores[:top])

    @classmethod
    def merged(
        cls, superpixels: np.ndarray, members: np.ndarray, scores: np.ndarray
    ) -> RegionProposals:
        """Make the coarsest partition that still has every region.

        Args:
            superpixels: (H, W) int in [0, n), not necessarily connected.
            members: (n, R) bool.
            scores: (R,).
        """
        packed = np.packbits(members, axis=1)
        if packed.shape[1] == 0:
            signature = np.zeros(len(members), dtype=np.int64)
        else:
            rows = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1])))
            signature = np.unique(rows.ravel(), return_inverse=True)[1]
        parts, first = connected_parts(signature[superpixels])
        return cls(
            torch.from_numpy(parts),
            torch.from_numpy(members[superpixels.ravel()[first]]),
            torch.as_tensor(np.asarray(scores, dtype=np.float32)),
        )

    # --- as detectron2's containers --------------------------------------------------------------

    def __len__(self) -> int:
        return self.members.shape[1]

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> RegionProposals:
        """Choose regions by a slice, indices or (R,) bool."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.device)
            rows = rows if rows.dtype == torch.bool else rows.long()
        chosen = RegionProposals(self.superpixels, self.members[:, rows], self.scores[rows])
        chosen._boxes = None if self._boxes is None else self._boxes[rows]
        return chosen

    def __repr__(self) -> str:
        return (
            f"RegionProposals({len(self)} regions, {self.num_superpixels} superpixels, "
            f"image {self.image_size})"
        )

    @property
    def device(self) -> torch.device:
        """Where the regions live."""
        return self.members.device

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.superpixels.shape[0], self.superpixels.shape[1]

    @property
    def num_superpixels(self) -> int:
        """How many superpixels there are."""
        return self.members.shape[0]

    def to(self, device: torch.device | str) -> RegionProposals:
        """Return the regions on another device."""
        moved = RegionProposals(
            self.superpixels.to(device), self.members.to(device), self.scores.to(device)
        )
        moved._boxes = None if self._boxes is None else self._boxes.to(device)
        return moved

    # --- measuring -------------------------------------------------------------------------------

    @property
    def boxes(self) -> Tensor:
        """(R, 4) float32 tight XYXY in pixels, x2 and y2 exclusive; zeros for an empty region."""
        if self._boxes is None:
            self._boxes = self._tight_boxes()
        return self._boxes

    def _tight_boxes(self) -> Tensor:
        if self.num_superpixels == 0:
            return torch.zeros((len(self), 4), device=self.device)
        place = self.superpixels.flatten().long()
        height, width = self.image_size
        y = torch.arange(height, device=self.device)[:, None].expand(height, width).flatten()
        x = torch.arange(width, device=self.device).expand(height, width).flatten()
        sides = []
        for value, far in ((x, False), (y, False), (x, True), (y, True)):
            size = torch.full((self.num_superpixels,), -1 if far else height + width).to(x)
            size.scatter_reduce_(0, place, value + far, "amax" if far else "amin")
            sides.append(self._extreme(size, far))
        boxes = torch.stack(sides, dim=1)
        return torch.where(self.members.any(dim=0)[:, None], boxes, 0).float()

    def _extreme(self, values: Tensor, largest: bool) -> Tensor:
        """Return (R,) the largest or smallest value of each region's superpixels."""
        order = values.argsort(descending=largest)
        # The first superpixel, in the order of the values, that belongs to the region.
        first = self.members[order].to(torch.uint8).argmax(dim=0)
        return values[order][first]

    def superpixel_sizes(self) -> Tensor:
        """Return (n,) int64, the pixels of each superpixel."""
        return torch.bincount(self.superpixels.flatten(), minlength=self.num_superpixels)

    def areas(self) -> Tensor:
        """Return (R,) int64, the pixels of each region."""
        return self._sums(self.superpixel_sizes()[None])[0]

    def superpixel_counts(self, masks: Masks) -> Tensor:
        """Count the pixels of each superpixel in each mask.

        Args:
            masks: (G, H, W) bool, or G COCO run-length dictionaries.

        Returns:
            (G, n) int64.

        Raises:
            ValueError: if the masks are not of the image's size.
        """
        masks = torch.from_numpy(masks) if isinstance(masks, np.ndarray) else masks
        counts = torch.zeros((len(masks), self.num_superpixels), dtype=torch.int64)
        counts = counts.to(self.device)
        for row, mask in enumerate(masks):
            # One by one: all of them together may be gigabytes.
            image = mask if isinstance(mask, Tensor) else torch.from_numpy(decode_masks([mask])[0])
            if tuple(image.shape) != self.image_size:
                raise ValueError(
                    f"A mask of size {tuple(image.shape)} does not fit regions of an image of size "
                    f"{self.image_size}."
                )
            inside = self.superpixels[image.to(self.device, torch.bool)]
            counts[row] = torch.bincount(inside, minlength=self.num_superpixels)
        return counts

    def intersections(self, masks: Masks) -> Tensor:
        """Return (R, G) int64, the pixels that each region and each mask have in common."""
        return self._sums(self.superpixel_counts(masks)).T

    def iou(self, masks: Masks) -> Tensor:
        """Return (R, G) float32, the IoU of each region and each mask; 0 where both are empty.

        It equals the IoU counted on pixels.
        """
        counts = self.superpixel_counts(masks)
        common = self._sums(counts).T
        union = self.areas()[:, None] + counts.sum(dim=1) - common
        return (common.double() / union.clamp(min=1)).float()

    def _sums(self, values: Tensor) -> Tensor:
        """Sum (G, n) integers over the superpixels of each region: (G, R) int64, exact."""
        total = torch.zeros((len(values), len(self)), dtype=torch.int64, device=self.device)
        step = max(1, _FLOATS // max(self.num_superpixels, 1))
        for start in range(0, len(self), step):
            # Doubles hold counts of any image, and autocast leaves them alone.
            piece = values.double() @ self.members[:, start : start + step].double()
            total[:, start : start + step] = piece.long()
        return total

    # --- masks -----------------------------------------------------------------------------------

    def masks(self, rows: Tensor | slice | Sequence[int] = slice(None)) -> Tensor:
        """Return (len(rows), H, W) bool, the masks of the chosen regions; all at once."""
        members = self[rows].members.T.contiguous()
        pixels = members.index_select(1, self.superpixels.flatten())
        return pixels.view(len(members), *self.image_size)

    def rles(self, rows: Tensor | slice | Sequence[int] = slice(None)) -> list[dict[str, Any]]:
        """Return the masks of the chosen regions as COCO RLE, without making them all at once."""
        chosen = self[rows]
        superpixels = self.superpixels.cpu().numpy()
        members = chosen.members.T.contiguous().cpu().numpy()
        encoded = []
        for member, box in zip(members, chosen.boxes.long().tolist(), strict=True):
            x1, y1, x2, y2 = box
            crop = member[superpixels[y1:y2, x1:x2]]
            encoded += encode_crops(crop[None], (x1, y1), self.image_size)
        return encoded

    def intersect(self, masks: Masks) -> RegionProposals:
        """Cut the superpixels along the borders of objects and put the objects before the regions.

        So SDS prepares its training: no superpixel crosses the border of an object, and the first G
        regions are the objects themselves.

        Args:
            masks: (G, H, W) bool, or G COCO run-length dictionaries.

        Returns:
            G + R regions; the objects have the score inf.
        """
        objects = RegionProposals.from_masks(masks, size_hw=self.image_size)
        ours = self.superpixels.cpu().numpy()
        parts, first = connected_parts(objects.superpixels.numpy(), ours)
        place = torch.from_numpy(first)
        members = torch.cat(
            [
                objects.members[objects.superpixels.flatten()[place].long()],
                self.members.cpu()[torch.from_numpy(ours).flatten()[place].long()],
            ],
            dim=1,
        )
        scores = torch.cat([torch.full((len(objects),), torch.inf), self.scores.cpu()])
        return RegionProposals(torch.from_numpy(parts), members, scores).to(self.device)

    # --- files -----------------------------------------------------------------------------------

    def save(self, file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write an npz file of plain arrays, compressed; about 50 kB for a photograph."""
        members = self.members.T.cpu().numpy()
        np.savez_compressed(
            file,
            format=np.array(_FORMAT),
            superpixels=self.superpixels.cpu().numpy(),
            members=np.packbits(members, axis=1),
            num_superpixels=np.array(self.num_superpixels),
            scores=self.scores.cpu().numpy(),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RegionProposals:
        """Read what ``save`` wrote; nothing in the file is executed.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is another kind of file, or damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file of region proposals {path}.")
        try:
            with np.load(path, allow_pickle=False) as content:
                if str(content["format"]) != _FORMAT:
                    raise ValueError(f"its format is {content['format']}")
                superpixels, packed = content["superpixels"], content["members"]
                scores = content["scores"]
                num = int(content["num_superpixels"])
            if packed.ndim != 2 or packed.shape[1] != -(-num // 8):
                raise ValueError(f"its members do not fit {num} superpixels")
            members = np.unpackbits(packed, axis=1, count=num).T.astype(bool)
            return cls(*map(torch.from_numpy, (superpixels, members, scores)))
        except _READ_ERRORS as error:
            raise ValueError(
                f"{path} is no file of region proposals of ours ({error}); "
                "`instseg propose-regions` writes one for each image."
            ) from error


def _check(superpixels: Tensor, members: Tensor, scores: Tensor) -> None:
    """Raise unless the parts of an image's regions fit each other."""
    kinds = (
        ("superpixels", superpixels, torch.int32, 2),
        ("members", members, torch.bool, 2),
    )
    for name, tensor, dtype, dimensions in kinds:
        if (tensor.dtype, tensor.dim()) != (dtype, dimensions):
            raise ValueError(
                f"{name} of regions must be {dtype} of {dimensions} dimensions, not {tensor.dtype} "
                f"of shape {tuple(tensor.shape)}."
            )
    if scores.shape != members.shape[1:]:
        raise ValueError(f"{tuple(scores.shape)} scores do not fit {members.shape[1]} regions.")
    if superpixels.numel():
        low, high = map(int, superpixels.aminmax())
        if not 0 <= low <= high < len(members):
            raise ValueError(
                f"Superpixels must lie in [0, {len(members)}), but they go from {low} to {high}."
            )


def _common_size(
    masks: np.ndarray | Sequence[dict[str, Any]], size_hw: tuple[int, int] | None
) -> tuple[int, int]:
    """Return (H, W) of masks.

    Raises:
        ValueError: if they have no or different sizes.
    """
    if isinstance(masks, np.ndarray):
        sizes = {masks.shape[1:]} if masks.ndim == 3 else set()
    else:
        sizes = {tuple(rle["size"]) for rle in masks}
    sizes |= {tuple(size_hw)} if size_hw is not None else set()
    if len(sizes) != 1:
        raise ValueError(
            f"Masks of one image must have its size (H, W), but the sizes are {sorted(sizes)}."
        )
    height, width = sizes.pop()
    return int(height), int(width)
