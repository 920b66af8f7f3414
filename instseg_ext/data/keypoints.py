"""Keypoints of objects: their names, what a mirror does to them, and how they follow an image."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import transforms as T

__all__ = ["declared_keypoints", "lonely_sides", "mirror_pairs", "transform_keypoints"]

_SWAP = {"left": "right", "right": "left", "l": "r", "r": "l"}
# The single letters count as sides only where they stand alone, as in "l_eye" and "eye-L".
_SIDE = re.compile(r"left|right|(?<![a-z])[lr](?![a-z])")


def declared_keypoints(categories: Sequence[dict]) -> list[str]:
    """Return the names of the keypoints that COCO categories declare.

    Args:
        categories: of an annotation file. Those without ``keypoints`` do not matter.

    Returns:
        the names in order; empty if no category has any.

    Raises:
        ValueError: if two categories have different ones; a model has one list for all classes.
    """
    declared = [
        (c["name"], [str(k) for k in c["keypoints"]]) for c in categories if c.get("keypoints")
    ]
    for name, names in declared[1:]:
        if names != declared[0][1]:
            raise ValueError(
                f"Categories {declared[0][0]!r} and {name!r} have different keypoints; a model can "
                "have one list for all its classes."
            )
    return declared[0][1] if declared else []


def mirror_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pair the keypoints that change places in a mirrored image, by their names.

    Args:
        names: such as ``nose``, ``left_eye``, ``right_eye``, or ``l_hip``, ``r_hip``; capitals do
            not matter.

    Returns:
        each pair once, in order of its first member; a point without counterpart is in none.
    """
    position = {name.lower(): index for index, name in enumerate(names)}
    pairs = []
    for index, name in enumerate(names):
        other = position.get(_mirrored(name), index)
        if other > index:
            pairs.append((name, names[other]))
    return pairs


def lonely_sides(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the names that say left or right without counterpart, and what that would be."""
    known = {name.lower() for name in names}
    return [(name, _mirrored(name)) for name in names if _mirrored(name) not in known]


def _mirrored(name: str) -> str:
    """Return a name in small letters with its sides exchanged."""
    return _SIDE.sub(lambda side: _SWAP[side[0]], name.lower())


def transform_keypoints(
    keypoints: np.ndarray,
    transforms: T.TransformList,
    size_hw: tuple[int, int],
    flip_indices: Sequence[int],
) -> torch.Tensor:
    """Carry keypoints through a geometric transform.

    As in detectron2's ``transform_keypoint_annotations``, points that leave the image become
    unlabelled, and unlabelled points lie at (0, 0). Left and right change places whenever the image
    is mirrored, which detectron2 does for horizontal flips alone; upside down is a mirror, too.

    Args:
        keypoints: (M, K, 3): x and y in continuous pixels of the source image, and the visibility
            (0 unlabelled, 1 hidden, 2 visible). Not modified.
        transforms: from the source image to the result.
        size_hw: height and width of the result.
        flip_indices: for each of the K points the one that takes its place in a mirror.

    Returns:
        (M, K, 3) float32.
    """
    points = np.array(keypoints[..., :2], dtype=np.float64).reshape(-1, 2)
    visibility = keypoints[..., 2]
    moved = transforms.apply_coords(points).reshape(*visibility.shape, 2)
    inside = ((moved >= 0) & (moved <= size_hw[::-1])).all(axis=-1)
    result = np.concatenate([moved, visibility[..., None]], axis=-1)
    result[~inside | (visibility == 0)] = 0
    if _mirrors(transforms):
        result = result[:, list(flip_indices)]
    return torch.from_numpy(result.astype(np.float32))


def _mirrors(transforms: T.TransformList) -> bool:
    """Tell whether a transform turns left into right, by the orientation of a right angle."""
    corner, right, down = transforms.apply_coords(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    (a, b), (c, d) = right - corner, down - corner
    return a * d - b * c < 0
