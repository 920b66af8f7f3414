"""The two last layers of a region proposal network, as the first Faster R-CNN codes order them.

There, the rows of an anchor follow those of the other anchors of its aspect ratio (all sizes of the
first ratio first), and objectness is a softmax over two classes: the rows of all backgrounds come
first, then those of all foregrounds. Here, all ratios of the first size are first, and objectness
is a sigmoid.
"""

from __future__ import annotations

from torch import Tensor

from instseg_ext.checkpoint.report import ConversionError

__all__ = ["anchors_by_size", "foreground_minus_background"]

# 0.5, 1 and 2 in all of these codes.
_RATIOS = 3


def foreground_minus_background(scores: Tensor) -> Tensor:
    """Return one logit per anchor, whose sigmoid is the foreground's share in the softmax.

    Args:
        scores: (2 A, ...) weights or bias, backgrounds first.

    Returns:
        (A, ...), in our order of anchors.

    Raises:
        ConversionError: if A is not a multiple of the number of aspect ratios.
    """
    _check_rows(scores, 2 * _RATIOS, "rpn_cls_score")
    background, foreground = scores.chunk(2)
    return _by_size(foreground - background, 1)


def anchors_by_size(deltas: Tensor) -> Tensor:
    """Return box deltas in our order of anchors.

    Args:
        deltas: (4 A, ...) weights or bias, four rows per anchor.

    Raises:
        ConversionError: if A is not a multiple of the number of aspect ratios.
    """
    _check_rows(deltas, 4 * _RATIOS, "rpn_bbox_pred")
    return _by_size(deltas, 4)


def _check_rows(rows: Tensor, multiple: int, layer: str) -> None:
    if not rows.dim() or not len(rows) or len(rows) % multiple:
        raise ConversionError(
            f"{layer} is {list(rows.shape)}: its rows must be a multiple of {multiple}, for "
            f"anchors of {_RATIOS} aspect ratios."
        )


def _by_size(rows: Tensor, per_anchor: int) -> Tensor:
    """Exchange ratio and size of rows (ratios * sizes * per_anchor, ...)."""
    by_ratio = rows.unflatten(0, (_RATIOS, -1, per_anchor))
    return by_ratio.transpose(0, 1).flatten(0, 2).contiguous()
