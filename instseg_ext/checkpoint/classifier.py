"""Tell tensors whose size follows the class count from those of another architecture."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["split_class_mismatch"]

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def split_class_mismatch(
    misfits: Mapping[str, Shapes], num_classes: int | None = None
) -> tuple[dict[str, Shapes], dict[str, Shapes]]:
    """Split shape mismatches into those that one other class count explains, and the rest.

    A size counts classes if it is m * (K + b) with an integer m >= 1 (anchors, box coordinates,
    grid cells) and b = 1 where there is a background class, else 0. A size n + K, of a layer that
    reads the logits of all classes beside n other values, counts them if another tensor does
    outright. Of a tensor's several differing sizes at most one counts outright. All tensors must
    agree on the file's K.

    Args:
        misfits: name to (shape in the file, shape in the model).
        num_classes: K of the model; ``None`` accepts each tensor that differs in one dimension.

    Returns:
        The mismatches that count classes, and the others.
    """
    sizes = {
        key: [(a, b) for a, b in zip(found, wanted, strict=True) if a != b]
        for key, (found, wanted) in misfits.items()
        if len(found) == len(wanted)
    }
    if num_classes is None:
        counting = {key for key, pairs in sizes.items() if len(pairs) == 1}
    else:
        counting = _counting(sizes, num_classes)
    by_classes = {key: misfits[key] for key in misfits if key in counting}
    others = {key: misfits[key] for key in misfits if key not in counting}
    return by_classes, others


def _counting(sizes: Mapping[str, list[tuple[int, int]]], num_classes: int) -> set[str]:
    """Return the tensors whose differing sizes one class count of the file explains."""
    # Class counts of the file that explain a tensor outright, and all that may explain it.
    outright = {
        key: _file_classes(*pairs[0], num_classes)
        for key, pairs in sizes.items()
        if len(pairs) == 1
    }
    possible = {key: _possible(pairs, num_classes) for key, pairs in sizes.items() if pairs}
    explained = [key for key, counts in outright.items() if counts]
    if not explained:
        return set()
    common = set.intersection(*(possible[key] for key in explained))
    common &= set.union(*(outright[key] for key in explained))
    return {key for key, counts in possible.items() if counts & common}


def _possible(pairs: list[tuple[int, int]], num_classes: int) -> set[int]:
    """Return the class counts of the file that may explain the differing sizes of one tensor.

    Of several sizes one may count classes outright; the others stand for a layer that reads all
    logits beside other values. Two multiples would let another width of the network pass.
    """
    beside = [_beside(*pair, num_classes) for pair in pairs]
    if len(pairs) == 1:
        return _file_classes(*pairs[0], num_classes) | beside[0]
    counts = set()
    for index, pair in enumerate(pairs):
        rest = beside[:index] + beside[index + 1 :]
        counts |= _file_classes(*pair, num_classes).intersection(*rest)
    return counts


def _beside(found: int, wanted: int, num_classes: int) -> set[int]:
    """Return the class count of the file if classes stand beside as many other values."""
    others = wanted - num_classes
    return {found - others} if 0 < others < found else set()


def _file_classes(found: int, wanted: int, num_classes: int) -> set[int]:
    """Return the class counts of the file that explain one pair of sizes."""
    counts = set()
    for background in (0, 1):
        multiple, rest = divmod(wanted, num_classes + background)
        if rest == 0 and multiple > 0 and found % multiple == 0 and found // multiple > background:
            counts.add(found // multiple - background)
    return counts
