"""The perceptron that predicts the mask at single points.

Shapes: R regions, P points of each, F channels of the features, K classes, S side of the coarse
masks, D hidden channels.
"""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instseg_ext.methods.pointrend.coarse_terms import CoarseTerms

__all__ = ["StandardPointHead", "stacked_product"]


class StandardPointHead(nn.Module):
    """One perceptron for all points of all regions (Sec. 3 of arXiv:1912.08193).

    It reads the features and the coarse logits of all classes at a point. Names, shapes and initial
    weights are those of detectron2's project: the weights are those of convolutions over points,
    (out, in, 1). They are applied as matrix products, and the coarse logits have products of their
    own, so that nothing is concatenated.

    Attributes:
        in_channels: F.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        num_classes: int,
        fc_dim: int = 256,
        num_fc: int = 3,
        class_agnostic: bool = False,
        coarse_each_layer: bool = True,
    ) -> None:
        """Create the layers.

        Args:
            in_channels: F.
            num_classes: K.
            fc_dim: D.
            num_fc: layers before the prediction, at least one.
            class_agnostic: predict one mask for all classes.
            coarse_each_layer: let every layer read the coarse logits, not only the first.

        Raises:
            ValueError: if there is no layer.
        """
        super().__init__()
        if num_fc < 1:
            raise ValueError(f"MODEL.POINT_HEAD.NUM_FC must be at least 1, not {num_fc}.")
        self.in_channels = in_channels
        self.coarse_each_layer = coarse_each_layer
        self._fcs = tuple(f"fc{number}" for number in range(1, num_fc + 1))
        width = in_channels + num_classes
        for name in self._fcs:
            self.add_module(name, nn.Conv1d(width, fc_dim, kernel_size=1))
            width = fc_dim + (num_classes if coarse_each_layer else 0)
        self.predictor = nn.Conv1d(width, 1 if class_agnostic else num_classes, kernel_size=1)
        for name in self._fcs:
            weight_init.c2_msra_fill(getattr(self, name))
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    @property
    def first_weight(self) -> Tensor:
        """The part (D, F) of the first layer that reads features.

        It is linear, and so is interpolation: a map that it was applied to can be read in place of
        the features.
        """
        return self.fc1.weight[:, : self.in_channels, 0]

    def coarse_terms(self, coarse: Tensor, classes: Tensor) -> CoarseTerms:
        """Prepare coarse masks for ``forward``.

        Args:
            coarse: (R, K, S, S) logits.
            classes: (R,) int64, the class whose mask is asked for; of no effect on a head that is
                class agnostic.
        """
        if self.predictor.out_channels == 1:
            classes = torch.zeros_like(classes)
        layers = [getattr(self, name) for name in self._fcs]
        parts = [(layer.weight[None, :, :, 0], layer.bias[None]) for layer in layers]
        parts.append((self.predictor.weight[classes].mT, self.predictor.bias[classes, None]))
        # where the weights for the coarse logits begin
        starts = [self.in_channels] + [layer.out_channels for layer in layers]
        dtype = _product_dtype(coarse.device.type)
        shares = []
        for number, ((weight, bias), start) in enumerate(zip(parts, starts, strict=True)):
            reads = number == 0 or self.coarse_each_layer
            shares.append((weight[:, :, start:].to(dtype) if reads else None, bias.to(dtype)))
        with torch.autocast(coarse.device.type, enabled=False):
            return CoarseTerms(coarse, shares)

    def forward(self, first: Tensor, points: Tensor, terms: CoarseTerms, classes: Tensor) -> Tensor:
        """Predict one class at each point.

        Args:
            first: (R, P, D) features, times ``first_weight``; overwritten.
            points: (R, P, 2) relative to the boxes.
            terms: what ``coarse_terms`` gave for the regions.
            classes: see ``coarse_terms``.

        Returns:
            (R, P) float32 logits.
        """
        if self.predictor.out_channels == 1:
            classes = torch.zeros_like(classes)
        with torch.autocast(points.device.type, enabled=False):
            basis = terms.basis(points)
            # Sums are built in place: no gradient needs what was there before.
            x = terms.term(0, basis, plus=first.to(basis.dtype)).relu_()
            for number, name in enumerate(self._fcs[1:], start=1):
                weight = getattr(self, name).weight[:, : x.shape[2], 0].to(x.dtype)
                rows = terms.term(number, basis).flatten(0, 1).addmm_(x.flatten(0, 1), weight.t())
                x = rows.relu_().unflatten(0, x.shape[:2])
            weight = self.predictor.weight[classes, : x.shape[2]].to(x.dtype)
            return terms.term(-1, basis).baddbmm_(x, weight)[:, :, 0].float()

    def all_classes(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Predict every class at each point.

        Args:
            fine: (R, F, P) features.
            coarse: (R, K, P) coarse logits.

        Returns:
            (R, K, P) float32 logits.
        """
        x, side = self._hidden(fine, coarse)
        return _apply(self.predictor, x, side).float()

    def _hidden(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the prediction reads: (R, D, P), and the coarse logits if it reads them."""
        x, side = fine, coarse
        for name in self._fcs:
            x = F.relu(_apply(getattr(self, name), x, side))
            side = coarse if self.coarse_each_layer else None
        return x, side


def _product_dtype(device_type: str) -> torch.dtype:
    """Return the precision of matrix products here; sums in place need to be told."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.float32


def _apply(layer: nn.Conv1d, x: Tensor, side: Tensor | None) -> Tensor:
    """Apply a layer to all regions; see ``stacked_product``."""
    # Conv1d's weight without the axis of its kernel, for every region the same
    weight = layer.weight[:, :, 0].expand(x.shape[0], -1, -1)
    return stacked_product(weight, layer.bias[:, None], x, side)


def stacked_product(weight: Tensor, bias: Tensor, x: Tensor, side: Tensor | None) -> Tensor:
    """Return ``weight @ [x; side] + bias`` without building the stack.

    Args:
        weight: (R, out, channels of x and of side).
        bias: broadcasts to (R, out, P).
        x: (R, channels, P).
        side: (R, channels, P), or None for none.
    """
    channels = x.shape[1]
    result = torch.baddbmm(bias, weight[:, :, :channels], x)
    if side is None:
        return result
    return torch.baddbmm(result, weight[:, :, channels:], side)
