"""From raw outputs to the detections of one image.

Shape shorthand: h x w cells of an image, N = h w, D numbers of an embedding, T similarities, C
classes, R detections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from instseg_ext.layers.mask_ops import chunk_slices, masks_per_chunk
from instseg_ext.methods.metric_learning.masks import MaskOptions, SeedMasks, choose_masks
from instseg_ext.methods.metric_learning.seeds import SeedRule, seediness, select_seeds
from instseg_ext.modeling.masks import Crop, Resize, collect_masks, masks_to_instances

__all__ = ["Detections", "InferenceOptions", "detect", "to_instances"]


@dataclass(frozen=True)
class InferenceOptions:
    """Settings of inference; see the config keys of the same names.

    Attributes:
        seeds: how they are chosen.
        masks: what becomes of their masks.
        seed_min: lowest score of a seed.
        max_detections: most detections of an image.
    """

    seeds: SeedRule = field(default_factory=SeedRule)
    masks: MaskOptions = field(default_factory=MaskOptions)
    seed_min: float = 0.05
    max_detections: int = 100


@dataclass(frozen=True)
class Detections:
    """Detections of one image in cells, by falling score.

    Attributes:
        scores: (R,) float32 in [0, 1].
        classes: (R,) int64 in [0, C).
        seeds: (R,) int64 in [0, N).
        maps: from a slice of the R detections to (n, h, w) float32; a mask is where they are above
            one half.
    """

    scores: Tensor
    classes: Tensor
    seeds: Tensor
    maps: Callable[[slice], Tensor]


@torch.no_grad()
def detect(
    embeddings: Tensor,
    logits: Tensor,
    *,
    radii: Tensor,
    options: InferenceOptions,
    budget_mb: float = 256,
) -> Detections:
    """Choose seeds, grow a mask of each, drop duplicates.

    Args:
        embeddings: (D, h, w) float32 of the image alone, without padding.
        logits: (T, C + 1, h, w) float32, likewise.
        radii: (T,) squared distances up to which cells belong to the mask of a seed.
        options: settings.
        budget_mb: MiB of working memory.

    Returns:
        See ``Detections``; possibly none. Cells with outputs that are not finite are no seeds.
    """
    size_hw = (embeddings.shape[1], embeddings.shape[2])
    points = embeddings.permute(1, 2, 0).flatten(0, 1)
    good = seediness(logits.flatten(2))
    usable = (good.scores >= options.seed_min) & points.isfinite().all(dim=1)
    cells = usable.nonzero()[:, 0]
    seeds = cells[select_seeds(points[cells], good.scores[cells], options.seeds)]
    scores, classes = good.scores[seeds], good.classes[seeds]
    masks = SeedMasks(points, seeds, radii[good.taus[seeds]], size_hw, budget_mb)
    found = choose_masks(
        masks,
        seeds,
        scores,
        classes,
        size_hw=size_hw,
        options=options.masks,
        limit=options.max_detections,
        budget_mb=budget_mb,
    )
    rows = found.rows
    return Detections(scores[rows], classes[rows], seeds[rows], found.maps)


def to_instances(
    found: Detections,
    *,
    stride: int,
    size_hw: tuple[int, int],
    input_hw: tuple[int, int],
    output_hw: tuple[int, int],
    nearest: bool,
    budget_mb: float,
    output: str,
) -> Instances:
    """Bring detections to the size of the image.

    Args:
        found: in cells.
        stride: side of a cell in pixels of the network input.
        size_hw: (h, w).
        input_hw: size of the network input, without padding.
        output_hw: size of the result.
        nearest: masks in cells are resized; else similarities, bilinearly.
        budget_mb: see ``masks_to_instances``.
        output: see ``masks_to_instances``.
    """
    if not nearest:
        steps = [
            Resize((size_hw[0] * stride, size_hw[1] * stride)),
            Crop(input_hw),
            Resize(output_hw),
        ]
        return masks_to_instances(
            found.maps,
            steps,
            found.scores,
            found.classes,
            image_size=output_hw,
            budget_mb=budget_mb,
            output=output,
        )
    chunks = _nearest(found, stride, input_hw, output_hw, budget_mb)
    masks, boxes = collect_masks(
        chunks,
        len(found.scores),
        output_hw,
        output=output,
        device=found.scores.device,
        with_boxes=True,
    )
    result = Instances(output_hw)
    result.pred_boxes = Boxes(boxes)
    result.scores, result.pred_classes = found.scores, found.classes
    result.set("pred_masks" if isinstance(masks, Tensor) else "pred_masks_rle", masks)
    return result


def _nearest(
    found: Detections,
    stride: int,
    input_hw: Sequence[int],
    output_hw: Sequence[int],
    budget_mb: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield full-image masks whose pixels are those of the cells that they lie in."""
    device = found.scores.device
    rows, columns = (
        ((torch.arange(new, device=device) + 0.5) * (old / new)).long().clamp(max=old - 1) // stride
        for old, new in zip(input_hw, output_hw, strict=True)
    )
    pixels = output_hw[0] * output_hw[1]
    for some in chunk_slices(len(found.scores), masks_per_chunk(4 * pixels, budget_mb)):
        yield some, (found.maps(some) > 0.5)[:, rows][:, :, columns]
