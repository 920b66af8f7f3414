"""Full-image masks in bounded memory: the post-processing that every method shares.

A method hands over low-resolution probabilities and the list of resizes and crops that lead to the
original image. Masks come back in chunks whose working memory stays under a budget, and are stacked
as bool or encoded as COCO RLE.

Shapes: N instances, h x w low-resolution map, H0 x W0 original image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from torch import Tensor

from instseg_ext.layers.mask_ops import (
    RLEList,
    above,
    chunk_slices,
    empty_boxes,
    encode_rle,
    masks_per_chunk,
    tight_boxes,
)
from instseg_ext.layers.mask_resize import ThresholdedResize, axis_map, exact_float32_matmul
from instseg_ext.layers.polygon_fill import fill_polygons, polygons_to_rle
from instseg_ext.structures.rle import rle_boxes

__all__ = [
    "Crop",
    "Resize",
    "Step",
    "collect_masks",
    "encode_rle",
    "iter_masks",
    "masks_to_instances",
    "polygons_to_instances",
    "tight_boxes",
]


@dataclass(frozen=True)
class Resize:
    """Bilinear resize of float maps to ``size_hw`` (``align_corners=False``, no antialias)."""

    size_hw: tuple[int, int]


@dataclass(frozen=True)
class Crop:
    """Keep the top-left ``size_hw`` pixels; never larger than the map it is applied to."""

    size_hw: tuple[int, int]


Step = Resize | Crop
Probs = Tensor | Callable[[slice], Tensor]


def _apply(probs: Tensor, steps: Sequence[Step]) -> Tensor:
    """Run the steps in order on (n, h, w) float32; resizes are never fused."""
    for step in steps:
        if isinstance(step, Crop):
            probs = probs[:, : step.size_hw[0], : step.size_hw[1]]
        elif tuple(probs.shape[1:]) != tuple(step.size_hw):
            probs = F.interpolate(
                probs[:, None], size=tuple(step.size_hw), mode="bilinear", align_corners=False
            )[:, 0]
    return probs


def _output_size(low_hw: tuple[int, int], steps: Sequence[Step]) -> tuple[int, int]:
    """Return the size after all steps, checking each crop.

    Raises:
        ValueError: if a crop is larger than the map it is applied to.
    """
    size = low_hw
    for step in steps:
        if isinstance(step, Crop) and (step.size_hw[0] > size[0] or step.size_hw[1] > size[1]):
            raise ValueError(f"cannot crop {tuple(step.size_hw)} out of a map of {tuple(size)}")
        size = (int(step.size_hw[0]), int(step.size_hw[1]))
    return size


def _step_bytes(low_hw: tuple[int, int], steps: Sequence[Step]) -> int:
    """Return the peak bytes of one mask's float maps: input and output of the hungriest step."""
    size, peak = low_hw, low_hw[0] * low_hw[1] * 4
    for step in steps:
        after = (int(step.size_hw[0]), int(step.size_hw[1]))
        if isinstance(step, Resize):
            peak = max(peak, 4 * (size[0] * size[1] + after[0] * after[1]))
            size = after
        # a crop is a view: the map before it stays alive, so `size` is left as it is
    return peak


class _MaskMaker:
    """Float maps to full-image bool masks, by the fastest way."""

    def __init__(
        self,
        low_hw: tuple[int, int],
        steps: Sequence[Step],
        threshold: float,
        device: torch.device,
    ) -> None:
        self._steps, self._threshold = steps, threshold
        self._resizes = sum(isinstance(step, Resize) for step in steps)
        self._step_bytes = _step_bytes(low_hw, steps)
        self.size, self._device = _output_size(low_hw, steps), device
        height, width = self.size
        # the result, the copies that encoding and the caller make
        self._plane_bytes = 3 * height * width
        self._low_bytes = 2 * 4 * low_hw[0] * low_hw[1]
        self._fast = None
        if device.type == "cpu" and exact_float32_matmul():
            self._fast = self._build_fast(low_hw)

    def _build_fast(self, low_hw: tuple[int, int]) -> ThresholdedResize | None:
        maps = [
            axis_map(
                low_hw[axis],
                tuple(
                    ("crop" if isinstance(step, Crop) else "resize", int(step.size_hw[axis]))
                    for step in self._steps
                ),
            )
            for axis in (0, 1)
        ]
        if None in maps:
            return None
        return ThresholdedResize(*maps, num_resizes=self._resizes, threshold=self._threshold)

    def per_chunk(self, budget_mb: float) -> int:
        """Return how many masks to make at once."""
        if self._fast is None:
            return masks_per_chunk(self._step_bytes + self._plane_bytes, budget_mb)
        # Float maps exist for one mask at a time, when the values are no probabilities and it
        # is made step by step; larger chunks would not be made faster.
        spare_mb = (budget_mb - self._step_bytes / 2**20) / 4
        return masks_per_chunk(self._low_bytes + self._plane_bytes, spare_mb)

    def planes(self, num: int) -> Tensor:
        """Return (num, H0, W0) bool, not initialised."""
        return torch.empty((num, *self.size), dtype=torch.bool, device=self._device)

    @torch.no_grad()
    def __call__(self, probs: Tensor, out: Tensor) -> None:
        """Write the masks of (n, h, w) probabilities into ``out``, (n, H0, W0) bool."""
        with torch.autocast(probs.device.type, enabled=False):
            probs = probs.float()
            if self._fast is None:
                self._step_by_step(probs, out)
            elif self._fast.applicable(probs, self._resizes, self._threshold):
                self._fast(probs, out)
            else:
                for i in range(len(probs)):
                    self._step_by_step(probs[i : i + 1], out[i : i + 1])

    def _step_by_step(self, probs: Tensor, out: Tensor) -> None:
        above(_apply(probs, self._steps), self._threshold, out=out)


def iter_masks(
    probs: Probs,
    steps: Sequence[Step],
    threshold: float = 0.5,
    budget_mb: float = 256,
    *,
    num: int | None = None,
    reuse: bool = False,
    into: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield full-image masks in chunks whose working memory stays under a budget.

    Args:
        probs: (N, h, w) probabilities of any float dtype, or a function that returns such a tensor
            for a slice of the instances (then no more than one chunk of them exists at a time).
        steps: resizes and crops from h x w to the original image, applied in order to float32 maps.
        threshold: a pixel belongs to the mask when its value is strictly greater.
        budget_mb: MiB that the float maps of all steps and the masks of one chunk may take
            together. A chunk has at least one mask, whatever it needs.
        num: N; needed when ``probs`` is a function.
        reuse: each chunk overwrites the one before. Fresh planes for every chunk, freed among small
            lasting results, would tear the heap into holes that are never given back.
        into: (N, H0, W0) bool of which the chunks become slices.

    Yields:
        ``(slice, masks)`` with ``masks`` (n, H0, W0) bool on the device of the probabilities, in
        order, covering N.

    Raises:
        ValueError: if ``num`` is missing for a function, a crop exceeds its map, or ``into`` has
            another size.
    """
    if isinstance(probs, Tensor):
        num, get = len(probs), probs.__getitem__
    elif num is None:
        raise ValueError("iter_masks needs num=, the number of instances, when probs is a function")
    else:
        get = probs
    if not num:
        return
    first = get(slice(0, 1))
    low_hw = (int(first.shape[1]), int(first.shape[2]))
    make = _MaskMaker(low_hw, steps, threshold, first.device)
    del first
    if into is not None:
        _check_size(make.size, into.shape[1:])
    per_chunk = min(num, make.per_chunk(budget_mb))
    buffer = make.planes(per_chunk) if reuse and into is None else None
    for index in chunk_slices(num, per_chunk):
        size = index.stop - index.start
        if into is not None:
            out = into[index]
        else:
            out = make.planes(size) if buffer is None else buffer[:size]
        make(get(index), out)
        yield index, out


def _check_size(found: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuse masks that are not of the image's size.

    Raises:
        ValueError: naming both.
    """
    if tuple(found) != tuple(wanted):
        raise ValueError(
            f"the mask steps end at {tuple(found)} (height, width) but the image is {tuple(wanted)}"
        )


def _check_output(output: str) -> None:
    """Refuse an unknown form of masks.

    Raises:
        ValueError: naming the config key.
    """
    if output not in ("bool", "rle"):
        raise ValueError(f'INSTSEG.MASK_OUTPUT must be "bool" or "rle", got {output!r}')


def collect_masks(
    chunks: Iterator[tuple[slice, Tensor]],
    num: int,
    image_size: tuple[int, int],
    *,
    output: str = "bool",
    device: torch.device | str = "cpu",
    with_boxes: bool = False,
    stack: Tensor | None = None,
) -> tuple[Tensor | RLEList, Tensor | None]:
    """Stack or encode chunks of masks as they come.

    Args:
        chunks: what ``iter_masks`` yields; must cover ``range(num)`` in order.
        num: number of instances; 0 is fine.
        image_size: (H0, W0).
        output: "bool" for one (num, H0, W0) tensor, "rle" for a list of COCO RLE dictionaries.
        device: where the bool tensor and the boxes live.
        with_boxes: also return the tight box of each mask.
        stack: (num, H0, W0) bool of which the chunks are slices, for ``output`` "bool"; they are
            then not copied.

    Returns:
        The masks, and (num, 4) float32 boxes or None.

    Raises:
        ValueError: if ``output`` is neither "bool" nor "rle", or a mask is not of the image's size.
    """
    _check_output(output)
    rles, boxes = RLEList(), [empty_boxes(device)]
    in_place = stack is not None
    if output == "bool" and not in_place:
        stack = torch.empty((num, *image_size), dtype=torch.bool, device=device)
    for index, masks in chunks:
        _check_size(masks.shape[1:], image_size)
        if output == "rle":
            encoded = encode_rle(masks)
            rles.extend(encoded)
        elif not in_place:
            stack[index] = masks.to(device)
        if with_boxes and output == "rle":
            # reading the run lengths is far cheaper than reading the pixels again
            boxes.append(torch.from_numpy(rle_boxes(encoded)).float().to(device))
        elif with_boxes:
            boxes.append(tight_boxes(masks).to(device))
    return (rles if output == "rle" else stack), (torch.cat(boxes) if with_boxes else None)


def masks_to_instances(
    probs: Probs,
    steps: Sequence[Step],
    scores: Tensor,
    classes: Tensor,
    *,
    image_size: tuple[int, int],
    threshold: float = 0.5,
    budget_mb: float = 256,
    output: str = "bool",
    boxes: Tensor | None = None,
) -> Instances:
    """Turn low-resolution probabilities into detections at the original size.

    Args:
        probs: (N, h, w) probabilities or a function from a slice to them, see ``iter_masks``.
        steps: resizes and crops that end at ``image_size``.
        scores: (N,) float; classes: (N,) integer in [0, K).
        classes: see ``scores``.
        image_size: (H0, W0) of the original image.
        threshold: strict lower bound of a mask pixel.
        budget_mb: see ``iter_masks``.
        output: "bool" fills ``pred_masks`` ((N, H0, W0) bool), "rle" fills ``pred_masks_rle`` (list
            of COCO RLE).
        boxes: (N, 4) XYXY at the original size; None computes the tight box of each final mask
            (zeros when empty).

    Returns:
        ``Instances`` with ``pred_boxes``, ``scores`` (float32), ``pred_classes`` (int64) and the
        masks; N may be 0.
    """
    num = len(scores)
    image_size = (int(image_size[0]), int(image_size[1]))
    stack = None
    if output == "bool":
        stack = torch.empty((num, *image_size), dtype=torch.bool, device=scores.device)
    chunks = iter_masks(probs, steps, threshold, budget_mb, num=num, reuse=True, into=stack)
    masks, tight = collect_masks(
        chunks,
        num,
        image_size,
        output=output,
        device=scores.device,
        with_boxes=boxes is None,
        stack=stack,
    )
    return _instances(image_size, tight if boxes is None else boxes, scores, classes, masks)


def polygons_to_instances(
    polygons: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    image_size: tuple[int, int],
    output: str = "bool",
    nearest: bool = False,
) -> Instances:
    """Turn polygons into detections at the original size.

    Vertices become integers, and polygons are filled by the rule of ``layers.polygon_fill``.

    Args:
        polygons: (N, V, 2) float, (x, y) pixel indices of the original image; vertices beyond its
            border are moved to the border.
        boxes: (N, 4) XYXY at the original size.
        scores: (N,) float.
        classes: (N,) integer in [0, K).
        image_size: (H0, W0) of the original image.
        output: see ``masks_to_instances``. For "rle" no mask is ever drawn.
        nearest: vertices go to the nearest pixel; otherwise they are cut, towards zero.

    Returns:
        As ``masks_to_instances``, and ``pred_polygons``: the polygons, not cut to integers, as
        (N, V, 2) float32.
    """
    _check_output(output)
    height, width = image_size = (int(image_size[0]), int(image_size[1]))
    border = polygons.new_tensor([width - 1, height - 1])
    vertices = polygons + 0.5 if nearest else polygons
    vertices = torch.minimum(vertices.clamp(min=0), border).long()
    fill = fill_polygons if output == "bool" else polygons_to_rle
    result = _instances(image_size, boxes, scores, classes, fill(vertices, image_size))
    result.pred_polygons = polygons.float()
    return result


def _instances(
    image_size: tuple[int, int],
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    masks: Tensor | RLEList,
) -> Instances:
    result = Instances(image_size)
    result.pred_boxes = Boxes(boxes)
    result.scores = scores.float()
    result.pred_classes = classes.long()
    result.set("pred_masks" if isinstance(masks, Tensor) else "pred_masks_rle", masks)
    return result
