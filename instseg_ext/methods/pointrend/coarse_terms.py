"""What coarse masks add to layers that are applied at points.

Shapes: R regions, P points of each, K classes, S side of the coarse masks, D channels of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from instseg_ext.layers.point_sample import cell_weights, sample_points

__all__ = ["CoarseTerms"]


class CoarseTerms:
    """The terms of layers that stem from coarse logits and biases, as products of two matrices.

    The logits at a point are a sum of cells with the weights of bilinear interpolation, and a layer
    is linear. With fewer cells than classes the layers are therefore applied to the cells, once for
    all points; a point then brings the weights of the cells instead of the logits of all classes.
    """

    def __init__(self, coarse: Tensor, layers: Sequence[tuple[Tensor | None, Tensor]]) -> None:
        """Apply the layers.

        Args:
            coarse: (R, K, S, S) logits.
            layers: weight (1 or R, D, K) and bias (1 or R, D) of each, of one dtype. A layer that
                does not read the logits has no weight.
        """
        self._coarse = coarse
        self._dtype = layers[0][1].dtype
        # traced sizes cannot be compared
        self._of_cells = not torch.jit.is_tracing() and (
            coarse.shape[1] > coarse.shape[2] * coarse.shape[3]
        )
        cells = coarse.flatten(2).to(self._dtype)
        # of each layer (R, J + 1, D), or (R, 1, D) of one that reads no logits
        self._factors = []
        for weight, bias in layers:
            columns = [bias[:, :, None].expand(coarse.shape[0], -1, -1)]
            if weight is not None:
                part = weight @ cells if self._of_cells else weight
                columns.insert(0, part.expand(coarse.shape[0], -1, -1))
            self._factors.append(torch.cat(columns, dim=2).mT)

    def basis(self, points: Tensor) -> Tensor:
        """Return what points bring: (R, P, 2) relative points to (R, P, J + 1), 1 in the last."""
        if self._of_cells:
            values = cell_weights(points, self._coarse.shape[3])
        else:
            values = sample_points(self._coarse, points).transpose(1, 2)
        return torch.cat([values, torch.ones_like(values[..., :1])], dim=2).to(self._dtype)

    def term(self, number: int, basis: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """Return the share of a layer.

        Args:
            number: of the layer.
            basis: what ``basis`` gave for the points.
            plus: (R, P, D), to which it is added in place.

        Returns:
            (R, P, D).
        """
        factor = self._factors[number]
        basis = basis[..., -factor.shape[1] :]
        if plus is None:
            return torch.bmm(basis, factor)
        return plus.baddbmm_(basis, factor)
