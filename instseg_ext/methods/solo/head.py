"""SOLOv2's head: category scores and a mask kernel per cell, and one map of mask features.

Shape shorthand: N images, L levels, S_l cells per side, C = sum of S_l^2 cells in level-major,
row-major order, K classes, E kernel channels, (Hm, Wm) size of the mask map.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn

from instseg_ext.layers.coord import append_coords
from instseg_ext.layers.deform_conv import DeformConvPack

__all__ = [
    "DeformOptions",
    "MaskFeatures",
    "SOLOv2Head",
    "SOLOv2Outputs",
    "flatten_cells",
    "resize_to_stride",
]


@dataclass(frozen=True)
class DeformOptions:
    """Where the head uses deformable convolution; see the config keys of the same names.

    Attributes:
        towers: ``none``, ``last`` or ``all`` convolutions of each tower.
        mask_features: all convolutions of the mask features.
        modulated: v2 instead of v1.
    """

    towers: str = "none"
    mask_features: bool = False
    modulated: bool = False

    def in_tower(self, index: int, num_convs: int) -> bool:
        """Tell whether convolution ``index`` of a tower is deformable."""
        return self.towers == "all" or (self.towers == "last" and index == num_convs - 1)


class SOLOv2Outputs(NamedTuple):
    """Raw outputs of the head.

    Attributes:
        category_logits: per level (N, K, S_l, S_l).
        kernels: per level (N, E, S_l, S_l).
        mask_features: (N, E, Hm, Wm), never negative.
    """

    category_logits: list[Tensor]
    kernels: list[Tensor]
    mask_features: Tensor


def flatten_cells(levels: Sequence[Tensor]) -> Tensor:
    """Join level maps into one axis of cells.

    Args:
        levels: per level (N, D, S_l, S_l).

    Returns:
        (N, C, D), level-major, then row-major.
    """
    return torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in levels], dim=1)


def resize_to_stride(
    features: Sequence[Tensor], strides: Sequence[int], finest: int
) -> list[Tensor]:
    """Bring each feature to its level's stride by a bilinear resize.

    The sizes follow from the padded input: P6 of an odd-sized P5 comes out at exactly P5's size.

    Args:
        features: per level (N, D, H_l, W_l), finest first.
        strides: wanted strides, input pixels.
        finest: stride of ``features[0]``.

    Returns:
        Per level (N, D, Hp / stride, Wp / stride).
    """
    height, width = (side * finest for side in features[0].shape[-2:])
    resized = []
    for feature, stride in zip(features, strides, strict=True):
        size = (math.ceil(height / stride), math.ceil(width / stride))
        if feature.shape[-2:] != size:
            feature = F.interpolate(feature, size=size, mode="bilinear", align_corners=False)
        resized.append(feature)
    return resized


def _block(
    in_dim: int, out_dim: int, kernel_size: int, norm: str, deform: bool = False, v2: bool = False
) -> nn.Module:
    """Return (deformable) convolution without bias, normalisation, ReLU."""
    options = {
        "padding": kernel_size // 2,
        "bias": False,
        "norm": get_norm(norm, out_dim),
        "activation": F.relu_,
    }
    if deform:
        conv = DeformConvPack(in_dim, out_dim, kernel_size, modulated=v2, **options)
    else:
        conv = Conv2d(in_dim, out_dim, kernel_size, **options)
    nn.init.normal_(conv.weight, std=0.01)
    return conv


def _tower(
    in_dim: int, width: int, num_convs: int, norm: str, deform: DeformOptions
) -> nn.Sequential:
    """Return ``num_convs`` 3x3 blocks."""
    dims = [in_dim] + [width] * num_convs
    return nn.Sequential(
        *(
            _block(a, b, 3, norm, deform.in_tower(q, num_convs), deform.modulated)
            for q, (a, b) in enumerate(pairwise(dims))
        )
    )


def _predictor(in_dim: int, out_dim: int, bias: float) -> Conv2d:
    """Return a 3x3 convolution with small weights and a constant bias."""
    conv = Conv2d(in_dim, out_dim, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, bias)
    return conv


class MaskFeatures(nn.Module):
    """Fuse pyramid features into one map at the finest stride (Sec. 3.2 of arXiv:2003.10152).

    Each coarser feature is convolved and upsampled by 2 in turn until it fits. Upsampling is
    linear, so the features are summed before their last upsampling, which they share: the same
    result at a third of the cost.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        width: int,
        out_dim: int,
        strides: Sequence[int],
        norm: str,
        deform: DeformOptions | None = None,
    ) -> None:
        """Build the convolutions.

        Args:
            in_dim: channels of every input.
            width: channels before the sum.
            out_dim: channels of the result (E).
            strides: of the inputs, finest first, each a power of two times the first.
            norm: normalisation layer.
            deform: deformable convolutions; none by default.

        Raises:
            ValueError: if the strides are no powers of two apart or do not grow.
        """
        super().__init__()
        deform = deform or DeformOptions()
        style = (norm, deform.mask_features, deform.modulated)
        steps = [max(stride // strides[0], 1).bit_length() - 1 for stride in strides]
        exact = [strides[0] << step for step in steps] == list(strides)
        if not exact or steps != sorted(set(steps)):
            raise ValueError(
                "MODEL.SOLO.MASK_FEATURES.IN_FEATURES must go from fine to coarse with strides "
                f"that are powers of two apart, got strides {tuple(strides)}."
            )
        self.levels = nn.ModuleList()
        for level, step in enumerate(steps):
            # The last input sees coordinates; with one input only, that is the first.
            first = in_dim + 2 if level == len(steps) - 1 else in_dim
            dims = [first] + [width] * max(step, 1)
            self.levels.append(nn.ModuleList(_block(a, b, 3, *style) for a, b in pairwise(dims)))
        self.pred = _block(width, out_dim, 1, *style)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse.

        Args:
            features: per input (N, D, H_m, W_m), finest first.

        Returns:
            (N, E, Hm, Wm) at the size of ``features[0]``, non-negative.
        """
        inputs = [*features[:-1], append_coords(features[-1])]
        result = self.levels[0][0](inputs[0])
        coarse = None
        for blocks, x in zip(self.levels[1:], inputs[1:], strict=True):
            x = blocks[0](x)
            for block in blocks[1:]:
                x = block(self._double(x))
            coarse = x if coarse is None else coarse + x
        if coarse is not None:
            result = result + self._double(coarse)
        return self.pred(result)

    @staticmethod
    def _double(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class SOLOv2Head(nn.Module):
    """Category tower, kernel tower, mask features.

    Towers are shared over levels and run on S_l x S_l maps. The kernel tower sees coordinates.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        strides: Sequence[int],
        num_grids: Sequence[int],
        num_classes: int,
        num_convs: int = 4,
        width: int = 512,
        kernel_dim: int = 256,
        mask_in_features: Sequence[str] = ("p2", "p3", "p4", "p5"),
        mask_width: int = 128,
        norm: str = "GN",
        deform: DeformOptions | None = None,
        prior_prob: float = 0.01,
    ) -> None:
        """Build the layers and initialise them as the authors do.

        Args:
            input_shape: channels and stride of every backbone feature; channels must be equal.
            in_features: features that carry grids, finest first.
            strides: stride to which each is resized before its grid is laid.
            num_grids: cells per side, per level.
            num_classes: K.
            num_convs: 3x3 convolutions per tower.
            width: channels of the towers.
            kernel_dim: E.
            mask_in_features: features that make the mask features, finest first.
            mask_width: channels of the mask-feature convolutions before the sum.
            norm: normalisation layer of all convolutions.
            deform: deformable convolutions; none by default.
            prior_prob: category score of every cell before training.
        """
        super().__init__()
        deform = deform or DeformOptions()
        in_dim = input_shape[in_features[0]].channels
        self.in_features = tuple(in_features)
        self.mask_in_features = tuple(mask_in_features)
        self.strides = tuple(strides)
        self.num_grids = tuple(num_grids)
        self.finest = input_shape[in_features[0]].stride
        self.mask_stride = input_shape[mask_in_features[0]].stride
        self.category_tower = _tower(in_dim, width, num_convs, norm, deform)
        self.kernel_tower = _tower(in_dim + 2, width, num_convs, norm, deform)
        self.category_pred = _predictor(
            width, num_classes, -math.log((1 - prior_prob) / prior_prob)
        )
        self.kernel_pred = _predictor(width, kernel_dim, 0.0)
        self.mask_features = MaskFeatures(
            in_dim=in_dim,
            width=mask_width,
            out_dim=kernel_dim,
            strides=[input_shape[name].stride for name in mask_in_features],
            norm=norm,
            deform=deform,
        )

    def forward(self, features: Mapping[str, Tensor]) -> SOLOv2Outputs:
        """Compute the raw outputs; the same in training and inference.

        Args:
            features: backbone features by name, (N, D, H_l, W_l).
        """
        levels = [features[name] for name in self.in_features]
        category_logits, kernels = [], []
        for feature, side in zip(
            resize_to_stride(levels, self.strides, self.finest), self.num_grids, strict=True
        ):
            cells = F.interpolate(feature, size=(side, side), mode="bilinear", align_corners=False)
            category_logits.append(self.category_pred(self.category_tower(cells)))
            # Resizing the coordinates by themselves equals resizing them with the features.
            cells = append_coords(cells, tuple(feature.shape[-2:]))
            kernels.append(self.kernel_pred(self.kernel_tower(cells)))
        mask_features = self.mask_features([features[name] for name in self.mask_in_features])
        return SOLOv2Outputs(category_logits, kernels, mask_features)

    def masks(self, raw: SOLOv2Outputs, selection: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Make mask probabilities: the sigmoid of kernel times mask features, without bias.

        Args:
            raw: outputs of ``forward``.
            selection: per image (P_n,) int64 cells, repetitions allowed; None means all C of them.

        Returns:
            Per image (P_n, Hm, Wm) float32 in [0, 1]. One matrix product per image.
        """
        kernels = flatten_cells(raw.kernels)
        if selection is not None:
            chosen = [k[cells] for k, cells in zip(kernels, selection, strict=True)]
        else:
            chosen = list(kernels)
        size = raw.mask_features.shape[-2:]
        with torch.autocast(kernels.device.type, enabled=False):
            # Rows of pixels: no copy of a channels_last map.
            return [
                (k @ f.permute(1, 2, 0).flatten(0, 1).T).float().sigmoid().unflatten(1, size)
                for k, f in zip(chosen, raw.mask_features, strict=True)
            ]
