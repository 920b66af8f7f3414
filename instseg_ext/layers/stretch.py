"""The resize to a fixed size that training and inference share; the aspect ratio is not kept."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["stretch"]


def stretch(image: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Resize one image to exactly ``size_hw``.

    Bilinear, half-pixel centres, no antialiasing, in float32. Training calls it in the mapper,
    inference in the model, both on raw pixel values (before normalisation), so that both see the
    same tensor. Calling it again on its result changes nothing.

    Args:
        image: (C, H, W), any real dtype, any value range.
        size_hw: height and width of the result in pixels, both positive.

    Returns:
        (C, h, w) float32 on the device of ``image``; gradients flow to a float input.

    Raises:
        ValueError: if ``image`` does not have three axes or a side of ``size_hw`` is not positive.
    """
    height, width = int(size_hw[0]), int(size_hw[1])
    if image.dim() != 3:
        raise ValueError(
            f"stretch takes one image (C, H, W), not a tensor of shape {tuple(image.shape)}"
        )
    if height <= 0 or width <= 0:
        raise ValueError(f"stretch needs a positive height and width, not {(height, width)}")
    image = image.float()
    if tuple(image.shape[1:]) == (height, width):
        return image
    # The same bits as with the image as it is, at a quarter of the time on a CPU.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(
        batch, size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )[0]
