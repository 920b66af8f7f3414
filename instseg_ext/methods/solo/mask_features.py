"""SOLOv2's mask features: one map that all levels' kernels are applied to."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from instseg_ext.layers.coord import append_coords
from instseg_ext.modeling.towers import DeformOptions, build_block

__all__ = ["MaskFeatures"]


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
        style = {"deform": deform.mask_features, "modulated": deform.modulated}
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
            self.levels.append(
                nn.ModuleList(build_block(a, b, 3, norm, **style) for a, b in pairwise(dims))
            )
        self.pred = build_block(width, out_dim, 1, norm, **style)

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
