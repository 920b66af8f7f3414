"""Names of feature maps in configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.layers import ShapeSpec

__all__ = ["check_features"]


def check_features(key: str, names: Sequence[str], shapes: Mapping[str, ShapeSpec]) -> int:
    """Make sure that a part of a model can read its feature maps.

    Args:
        key: config key that names them.
        names: of the maps.
        shapes: of all maps of the backbone.

    Returns:
        The number of channels, which all maps must share: the same layers read them.

    Raises:
        ValueError: if no map is named, one does not exist, or their channels differ.
    """
    known = ", ".join(shapes)
    if not names:
        raise ValueError(f"{key} is empty; the backbone has {known}.")
    for name in names:
        if name not in shapes:
            raise ValueError(f"{key} names {name!r}; the backbone has {known}.")
    channels = [shapes[name].channels for name in names]
    if len(set(channels)) > 1:
        raise ValueError(
            f"{key} must name maps of equally many channels, but those of {', '.join(names)} are "
            f"{', '.join(map(str, channels))}."
        )
    return channels[0]
