"""From category scores and a source of masks to the detections of one image.

The same steps serve every SOLO variant: they differ in how the mask of a cell is made, which is
handed over as a function. Shape shorthand: C cells of all levels, K classes, U cells that hold at
least one candidate, R candidates, (h, w) size of the mask map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from instseg_ext.layers.mask_nms import MATRIX_NMS_KERNELS, matrix_nms, points_nms
from instseg_ext.layers.mask_ops import above, count_pixels
from instseg_ext.methods.solo.mask_source import MaskSource

__all__ = ["Detections", "InferenceOptions", "category_scores", "detect"]


@dataclass(frozen=True)
class InferenceOptions:
    """Thresholds of inference; see the config keys of the same names.

    Attributes:
        score_thresh: category score a candidate must exceed.
        mask_thresh: probability a mask pixel must exceed.
        nms_pre: most candidates that enter Matrix NMS.
        nms_kernel: ``gaussian`` or ``linear``.
        nms_sigma: width of the gaussian kernel.
        update_thresh: least decayed score that is kept.
        max_detections: most detections per image.
    """

    score_thresh: float = 0.1
    mask_thresh: float = 0.5
    nms_pre: int = 500
    nms_kernel: str = "gaussian"
    nms_sigma: float = 2.0
    update_thresh: float = 0.05
    max_detections: int = 100

    def __post_init__(self) -> None:
        """Check the choice of kernel.

        Raises:
            ValueError: naming the key.
        """
        if self.nms_kernel not in MATRIX_NMS_KERNELS:
            raise ValueError(
                f"MODEL.SOLO.NMS_KERNEL must be one of {MATRIX_NMS_KERNELS}, "
                f"not {self.nms_kernel!r}."
            )


@dataclass(frozen=True)
class Detections:
    """Candidate record of one image, sorted by falling score.

    Attributes:
        scores: (R,) float32.
        classes: (R,) int64 in [0, K).
        cells: (R,) int64.
        probs: from a slice of the R detections to their (n, h, w) float32 mask probabilities.
    """

    scores: Tensor
    classes: Tensor
    cells: Tensor
    probs: Callable[[slice], Tensor]


def category_scores(logits: Sequence[Tensor]) -> Tensor:
    """Turn category logits into scores, keeping local peaks only (points NMS per level and class).

    Args:
        logits: per level (N, K, S_l, S_l). A value that is not finite counts as score 0.

    Returns:
        (N, C, K) float32.
    """
    levels = []
    for level in logits:
        level = level.float()
        scores = torch.where(level.isfinite(), level.sigmoid(), torch.zeros_like(level))
        levels.append(points_nms(scores).permute(0, 2, 3, 1).flatten(1, 2))
    return torch.cat(levels, dim=1)


class _CellMasks:
    """Masks of the candidate cells: measured piece by piece, kept as bool when they fit the budget.

    What is not kept is made again for the few cells that matter later.
    """

    # Maps of a piece's size that exist at once while it is made and measured, one of them spare.
    _MAPS_PER_PIECE = 4
    # Elements of a piece: larger ones leave the caches, and memory that the allocator keeps.
    _PIECE = 2**21

    def __init__(
        self, source: MaskSource, cells: Tensor, *, threshold: float, budget_mb: float
    ) -> None:
        self.source, self.cells, self.threshold = source, cells, threshold
        pixels = source.size_hw[0] * source.size_hw[1]
        half = int(budget_mb * 2**20 / 2)
        self.piece = min(half // (4 * self._MAPS_PER_PIECE), self._PIECE)
        fits = len(cells) * pixels <= half
        self.kept = cells.new_empty((len(cells), pixels), dtype=torch.bool) if fits else None
        self.areas, self.masses = self._measure()

    def _measure(self) -> tuple[Tensor, Tensor]:
        """Return pixel count and summed probability of each cell's mask, (U,) float32 each."""
        areas = torch.zeros(len(self.cells), device=self.cells.device)
        masses = torch.zeros_like(areas)
        for rows, columns, probs in self.source.pieces(self.cells, self.piece):
            binary = above(probs, self.threshold)
            if self.kept is not None:
                self.kept[rows, columns] = binary
            areas[rows] += count_pixels(binary)
            # NaN passes: a broken mask gets a NaN score and is dropped.
            masses[rows] += F.threshold_(probs, self.threshold, 0.0).sum(dim=1)
        return areas, masses

    def probs(self, rows: Tensor) -> Tensor:
        """Return the (n, h, w) probabilities of some of the U cells."""
        return self.source(self.cells[rows])

    def binary(self, rows: Tensor) -> Tensor:
        """Return the (n, h * w) bool masks of some of the U cells."""
        if self.kept is not None:
            return self.kept[rows]
        pixels = self.source.size_hw[0] * self.source.size_hw[1]
        masks = self.cells.new_empty((len(rows), pixels), dtype=torch.bool)
        for some, columns, probs in self.source.pieces(self.cells[rows], self.piece):
            masks[some, columns] = above(probs, self.threshold)
        return masks


def _best(scores: Tensor, limit: int) -> Tensor:
    """Return the indices of the ``limit`` highest scores, falling; ties in their given order."""
    return scores.sort(descending=True, stable=True).indices[:limit]


@torch.no_grad()
def detect(
    scores: Tensor,
    prepare: Callable[[Tensor], MaskSource],
    *,
    min_areas: Tensor,
    size_hw: tuple[int, int],
    options: InferenceOptions,
    budget_mb: float = 256,
) -> Detections:
    """Select the detections of one image.

    Candidates are all (cell, class) pairs above the score threshold. Their masks must cover more
    than ``min_areas`` pixels; their scores are multiplied by the mean probability inside the mask,
    the best enter Matrix NMS, and what keeps enough of its score is returned.

    Args:
        scores: (C, K) float32 category scores after points NMS.
        prepare: from the (U,) cells that hold a candidate to a source of their masks. It is called
            once, and only if there is any.
        min_areas: (C,) mask-map pixels.
        size_hw: (h, w) of the mask map.
        options: thresholds.
        budget_mb: working memory for masks, MiB.

    Returns:
        See `Detections`; possibly none.
    """
    cells, classes = (scores > options.score_thresh).nonzero(as_tuple=True)
    scores = scores[cells, classes]
    if len(cells) == 0:
        return _nothing(scores, classes, cells, size_hw)
    unique, rows = cells.unique(return_inverse=True)
    masks = _CellMasks(prepare(unique), unique, threshold=options.mask_thresh, budget_mb=budget_mb)
    maskness = masks.masses / masks.areas.clamp(min=1)
    scores = scores * maskness[rows]
    keep = (masks.areas > min_areas[unique])[rows] & scores.isfinite()
    rows, classes, scores = rows[keep], classes[keep], scores[keep]
    if len(rows) == 0:
        return _nothing(scores, classes, rows, size_hw)
    order = _best(scores, options.nms_pre)
    rows, classes, scores = rows[order], classes[order], scores[order]
    scores = matrix_nms(
        masks.binary(rows),
        classes,
        scores,
        areas=masks.areas[rows],
        kernel=options.nms_kernel,
        sigma=options.nms_sigma,
        budget_mb=budget_mb / 2,
    )
    keep = scores >= options.update_thresh
    rows, classes, scores = rows[keep], classes[keep], scores[keep]
    order = _best(scores, options.max_detections)
    rows = rows[order]
    return Detections(
        scores=scores[order],
        classes=classes[order],
        cells=unique[rows],
        probs=lambda span: masks.probs(rows[span]),
    )


def _nothing(
    scores: Tensor, classes: Tensor, cells: Tensor, size_hw: tuple[int, int]
) -> Detections:
    """Return a record of no detections."""
    empty = scores.new_zeros((0, *size_hw))
    return Detections(scores[:0], classes[:0], cells[:0], lambda span: empty[span])
