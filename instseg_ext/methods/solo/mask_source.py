"""Where inference gets the masks of candidate cells from.

Shape shorthand: (Hm, Wm) size of the mask map.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

__all__ = ["MaskSource"]


class MaskSource(ABC):
    """Masks of one image's cells, made when they are asked for.

    Attributes:
        size_hw: (Hm, Wm).
    """

    def __init__(self, size_hw: tuple[int, int]) -> None:
        self.size_hw = size_hw

    @abstractmethod
    def __call__(self, cells: Tensor) -> Tensor:
        """Return the (n, Hm, Wm) float32 probabilities of (n,) int64 cells, as a new tensor."""

    def pieces(self, cells: Tensor, numel: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield the masks of many cells piece by piece, in whichever cut is fastest to make.

        Args:
            cells: (n,) int64.
            numel: most elements of a piece, if that is possible.

        Yields:
            Slices of ``range(n)`` and of ``range(Hm * Wm)``, and the probabilities there: float32,
            two-dimensional, the receiver's to change.
        """
        height, width = self.size_hw
        step = max(1, numel // (height * width))
        for start in range(0, len(cells), step):
            rows = slice(start, start + step)
            yield rows, slice(None), self(cells[rows]).flatten(1)
