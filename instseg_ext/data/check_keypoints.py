"""What can be wrong with keypoints in a COCO-format file; shared by the check and the repair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from instseg_ext.data.keypoints import declared_keypoints, lonely_sides, mirror_pairs

__all__ = ["Problem", "category_keypoint_problems", "keypoint_names", "keypoint_problems"]

Problem = tuple[str, str, str]  # kind, severity, message; see `instseg_ext.data.check`


def keypoint_names(categories: Sequence[object]) -> dict[object, list[str]]:
    """Return the names of each category's keypoints, by category id; none where it has no list."""
    sound = [c for c in categories if isinstance(c, dict) and "id" in c]
    return {
        c["id"]: [str(n) for n in c["keypoints"]]
        for c in sound
        if isinstance(c.get("keypoints"), list) and c["keypoints"]
    }


def category_keypoint_problems(categories: Sequence[object]) -> list[Problem]:
    """Check the lists of names: one list for all, no name twice, each side with its counterpart.

    Args:
        categories: of a file.

    Returns:
        The problems, and a note with the pairs that change places in a mirrored image.
    """
    problems: list[Problem] = []
    names = keypoint_names(categories)
    declared = [c for c in categories if isinstance(c, dict) and c.get("id") in names]
    try:
        declared_keypoints([{"name": c.get("name"), **c} for c in declared])
    except ValueError as error:
        problems.append(("mixed-keypoints", "warning", str(error)))
    for each in dict.fromkeys(tuple(n) for n in names.values()):
        for name, count in Counter(each).items():
            if count > 1:
                message = f"{count} keypoints of a category are called {name!r}"
                problems.append(("repeated-name", "warning", message))
        for name, other in lonely_sides(each):
            message = (
                f"keypoint {name!r} says a side and there is no {other!r}: it keeps its place in "
                "mirrored images; rename it, or set keypoint_flip_map in the metadata"
            )
            problems.append(("keypoint-without-mirror", "warning", message))
        pairs = ", ".join("/".join(pair) for pair in mirror_pairs(each)) or "none"
        message = f"keypoints that change places in a mirrored image: {pairs}"
        problems.append(("keypoint-pairs", "note", message))
    return problems


def keypoint_problems(
    annotation: dict, names: Sequence[str], size_hw: tuple[int, int]
) -> Iterator[Problem]:
    """Check the keypoints of one annotation.

    Args:
        annotation: COCO's entry: x and y as pixel indices, visibility 0 (unlabelled), 1 (hidden) or
            2 (visible), for each point.
        names: the keypoints of its category.
        size_hw: height and width of the image.

    Yields:
        the problems. Nothing for an annotation without ``keypoints``, which need not have any.
    """
    flat = annotation.get("keypoints")
    if not flat:
        return
    if not isinstance(flat, list) or not all(
        isinstance(v, (int, float)) and math.isfinite(v) for v in flat
    ):
        yield "bad-keypoints", "error", "keypoints are no list of finite numbers"
        return
    if not names and not any(flat[2::3]):
        return  # zeros for every class of a file where some have keypoints
    if len(flat) != 3 * len(names):
        message = f"{len(flat)} numbers for {len(names)} keypoints of its category, 3 for each"
        yield "bad-keypoints", "error", message
        return
    strange = sorted(set(flat[2::3]) - {0, 1, 2})
    if strange:
        yield "bad-visibility", "error", f"visibility {strange[0]} is not 0, 1 or 2"
    labelled = sum(v > 0 for v in flat[2::3])
    if annotation.get("num_keypoints") != labelled:
        message = f"num_keypoints is {annotation.get('num_keypoints')}, labelled are {labelled}"
        yield "wrong-num-keypoints", "error", message
    height, width = size_hw
    for name, x, y, v in zip(names, flat[0::3], flat[1::3], flat[2::3], strict=True):
        # Half a pixel around the centres, which is what training keeps.
        if v > 0 and not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            message = (
                f"{name} at ({x:g}, {y:g}) is outside the {width} x {height} image; training "
                "takes it as unlabelled"
            )
            yield "keypoint-outside-image", "warning", message
