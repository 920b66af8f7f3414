"""Backbones alone, for which no config is needed: are all of their tensors in the file?"""

from __future__ import annotations

from instseg_ext.checkpoint.family import Shapes
from instseg_ext.checkpoint.report import ConversionError, listing

__all__ = ["check_whole"]


def check_whole(text: str, shapes: Shapes, expected: Shapes) -> None:
    """Refuse a file that lacks a tensor, has one too many or one of another shape.

    Args:
        text: what the file should be, such as ``"VGG-16 of Caffe"``.
        shapes: by converted name.
        expected: shapes of that backbone.

    Raises:
        ConversionError: naming the first tensors in question.
    """
    wrong = [f"{name} is missing" for name in expected if name not in shapes]
    wrong += [f"{name} is unknown" for name in shapes if name not in expected]
    wrong += [
        f"{name} is {list(shape)} instead of {list(expected[name])}"
        for name, shape in shapes.items()
        if shape != expected.get(name, shape)
    ]
    if wrong:
        raise ConversionError(f"the file holds no whole {text}: {listing(wrong)}.")
