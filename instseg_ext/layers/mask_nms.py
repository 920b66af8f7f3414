"""Suppression of duplicates without boxes: points NMS on score maps and Matrix NMS on masks.

Shape shorthand: R candidates sorted by falling score, P pixels per mask, K classes.
"""

import torch
import torch.nn.functional as F

__all__ = ["MATRIX_NMS_KERNELS", "mask_intersections", "matrix_nms", "points_nms"]

MATRIX_NMS_KERNELS = ("gaussian", "linear")

# Float copies of masks on the CPU, at one time: more would leave the caches.
_CACHE_MB = 8

# Rows of a matrix product that are computed together.
_ROWS = 128

# Keeps the denominator of the linear kernel away from zero where two masks are equal.
_TINY = 1e-6


def points_nms(scores: torch.Tensor) -> torch.Tensor:
    """Zero every score that is not the largest of its 2x2 window.

    The window of (i, j) holds (i, j), (i-1, j), (i, j-1) and (i-1, j-1): only neighbours above and
    to the left suppress. Ties survive. A NaN zeroes the windows it is in.

    Args:
        scores: (N, K, H, W) float, each channel treated by itself.

    Returns:
        Tensor of the same shape; ``scores`` is not modified.
    """
    # Padding both sides gives H+1 x W+1 windows; the first H x W end in the cell itself.
    largest = F.max_pool2d(scores, kernel_size=2, stride=1, padding=1)[..., :-1, :-1]
    return torch.where(largest == scores, scores, torch.zeros_like(scores))


def _block_intersections(masks: torch.Tensor, budget_mb: float) -> torch.Tensor:
    """Count common pixels of all pairs of one block; see `mask_intersections`."""
    num, num_pixels = masks.shape
    if masks.device.type == "cpu":
        budget_mb = min(budget_mb, _CACHE_MB)
    step = max(1, int(budget_mb * 2**20 / 4) // max(num, 1))
    total = torch.zeros((num, num), device=masks.device)
    for start in range(0, num_pixels, step):
        floats = masks[:, start : start + step].float()
        for row in range(0, num, _ROWS):
            # The product is symmetric: each strip begins at its diagonal.
            total[row : row + _ROWS, row:].addmm_(floats[row : row + _ROWS], floats[row:].T)
    return total.triu() + total.triu(1).T


def mask_intersections(
    masks: torch.Tensor, labels: torch.Tensor, budget_mb: float = 256
) -> torch.Tensor:
    """Count the common pixels of every pair of masks of equal label.

    A float32 matrix product of zeros and ones is exact up to 2^24 pixels, in TF32 as well. On the
    CPU, where the product is what costs, it is restricted to the block of each class.

    Args:
        masks: (R, P) bool.
        labels: (R,) int64.
        budget_mb: most mebibytes the float copies of the masks may take at one time.

    Returns:
        (R, R) float32; 0 where the labels differ.
    """
    num = masks.shape[0]
    with torch.autocast(masks.device.type, enabled=False):
        if masks.device.type != "cpu":
            same = labels[:, None] == labels[None, :]
            return _block_intersections(masks, budget_mb) * same
        result = torch.zeros((num, num), device=masks.device)
        for label in labels.unique():
            block = (labels == label).nonzero().squeeze(1)
            inside = _block_intersections(masks[block], budget_mb)
            result[block[:, None], block[None, :]] = inside
    return result


def matrix_nms(
    masks: torch.Tensor,
    labels: torch.Tensor,
    scores: torch.Tensor,
    *,
    areas: torch.Tensor | None = None,
    kernel: str = "gaussian",
    sigma: float = 2.0,
    budget_mb: float = 256,
) -> torch.Tensor:
    """Decay the scores of masks that overlap a better one of their class (Matrix NMS).

    Eq. 4 and Algorithm 1 of arXiv:2003.10152: ``decay_b = min_a f(u_ab) / f(max_k<a u_ka)`` with
    the IoU u, over the candidates a before b. Nothing is removed.

    Note:
        ``sigma`` multiplies (``exp(-sigma u^2)``), as the published settings have it; the paper
        divides. In the linear kernel the denominator is kept positive, so that an exact duplicate
        ends with 0 where the plain formula gives NaN.

    Args:
        masks: (R, P) or (R, H, W) bool, sorted by falling score.
        labels: (R,) int64 classes.
        scores: (R,) float, falling.
        areas: (R,) pixel counts of ``masks``; counted here when None.
        kernel: "gaussian" or "linear".
        sigma: width of the gaussian kernel.
        budget_mb: most mebibytes of temporary float masks.

    Returns:
        (R,) float32 decayed scores, in the input's order.

    Raises:
        ValueError: if ``kernel`` is unknown.
    """
    if kernel not in MATRIX_NMS_KERNELS:
        raise ValueError(f"Matrix NMS kernel must be one of {MATRIX_NMS_KERNELS}, got {kernel!r}")
    scores = scores.float()
    if masks.shape[0] == 0:
        return scores
    masks = masks.flatten(1)
    areas = masks.sum(dim=1).float() if areas is None else areas.float()
    overlap = mask_intersections(masks, labels, budget_mb)
    union = (areas[:, None] + areas[None, :] - overlap).clamp(min=1)
    # Row a < column b: only better candidates act. Pairs of different labels overlap by 0 already.
    iou = (overlap / union).triu(diagonal=1)
    # The largest overlap of a with anything before it: how likely a is suppressed itself.
    compensation = iou.amax(dim=0)[:, None]
    if kernel == "gaussian":
        decay = torch.exp(-sigma * (iou.square() - compensation.square()))
    else:
        decay = (1 - iou) / (1 - compensation).clamp(min=_TINY)
    # Rows that do not act hold iou 0 and so ratios >= 1, and row 0 never exceeds 1: the minimum
    # over all rows equals the minimum over the rows before b.
    return scores * decay.amin(dim=0)
