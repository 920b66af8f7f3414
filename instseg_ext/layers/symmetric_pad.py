"""Padding by mirror images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PAD_MODES", "mirror_pad", "symmetric_pad"]

PAD_MODES = ("symmetric", "reflect", "zeros")


def symmetric_pad(x: Tensor, pad: int) -> Tensor:
    """Pad with the mirror image that repeats the edge sample: ``c b a | a b c d``.

    Args:
        x: (N, C, H, W).
        pad: lines to add on each of the four sides, at most H and W.

    Returns:
        (N, C, H + 2 pad, W + 2 pad) in the memory format of ``x``.

    Raises:
        ValueError: if ``pad`` is negative or exceeds H or W.
    """
    if not 0 <= pad <= min(x.shape[-2:]):
        raise ValueError(
            f"cannot mirror {pad} lines of a map of {tuple(x.shape[-2:])} (height, width)"
        )
    if pad == 0:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        if pad == 1:
            return F.pad(x, (1, 1, 1, 1), mode="replicate")
        x = torch.cat([x[:, :, :pad].flip(2), x, x[:, :, -pad:].flip(2)], dim=2)
        return torch.cat([x[..., :pad].flip(3), x, x[..., -pad:].flip(3)], dim=3)
    # A quarter of the time of torch's padding in channels_last, which a large map would notice
    # beside its convolution.
    (n, c, h, w), last = x.shape, x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (n, c, h + 2 * pad, w + 2 * pad),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    columns = slice(pad, pad + w)
    out[:, :, pad : pad + h, columns] = x
    out[:, :, :pad, columns] = x[:, :, :pad].flip(2)
    out[:, :, pad + h :, columns] = x[:, :, h - pad :].flip(2)
    out[..., :pad] = out[..., pad : 2 * pad].flip(3)
    out[..., pad + w :] = out[..., w : pad + w].flip(3)
    return out


def mirror_pad(x: Tensor, pad: int, mode: str) -> Tensor:
    """Pad a map on all sides as ``mode`` says.

    Args:
        x: (N, C, H, W).
        pad: lines to add on each of the four sides.
        mode: "symmetric", see ``symmetric_pad``; "reflect", ``c b | a b c d``, which takes one line
            less than the map has at most; or "zeros".

    Raises:
        ValueError: if ``mode`` is unknown, or the map too small for it.
    """
    if mode == "symmetric":
        return symmetric_pad(x, pad)
    if mode == "reflect":
        if pad >= min(x.shape[-2:]):
            raise ValueError(
                f"cannot reflect {pad} lines of a map of {tuple(x.shape[-2:])} (height, width)"
            )
        return F.pad(x, (pad,) * 4, mode="reflect")
    if mode == "zeros":
        return F.pad(x, (pad,) * 4)
    raise ValueError(f"mode must be one of {', '.join(PAD_MODES)}, not {mode!r}")
