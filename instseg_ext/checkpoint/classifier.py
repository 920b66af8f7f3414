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
    grid cells) and b = 1 where there is a background class, else 0. All tensors must agree on the
    file's K.

    Args:
        misfits: name to (shape in the file, shape in the model).
        num_classes: K of the model; ``None`` accepts each tensor that differs in one dimension.

    Returns:
        The mismatches that count classes, and the others.
    """
    sizes = {}
    for key, (found, wanted) in misfits.items():
        differing = [
            i for i, pair in enumerate(zip(found, wanted, strict=False)) if len({*pair}) > 1
        ]
        if len(found) == len(wanted) and len(differing) == 1:
            sizes[key] = (found[differing[0]], wanted[differing[0]])
    if num_classes is not None and sizes:
        # Every candidate class count of the file, by tensor; one must suit them all.
        candidates = {key: _file_classes(*pair, num_classes) for key, pair in sizes.items()}
        explained = [c for c in candidates.values() if c]
        common = set.intersection(*explained) if explained else set()
        sizes = {key: pair for key, pair in sizes.items() if candidates[key] & common}
    by_classes = {key: misfits[key] for key in misfits if key in sizes}
    others = {key: misfits[key] for key in misfits if key not in sizes}
    return by_classes, others


def _file_classes(found: int, wanted: int, num_classes: int) -> set[int]:
    """Return the class counts of the file that explain one pair of sizes."""
    counts = set()
    for background in (0, 1):
        multiple, rest = divmod(wanted, num_classes + background)
        if rest == 0 and multiple > 0 and found % multiple == 0 and found // multiple > background:
            counts.add(found // multiple - background)
    return counts
