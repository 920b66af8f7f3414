"""Mirrored borders."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from instseg_ext.layers.symmetric_pad import PAD_MODES, mirror_pad, symmetric_pad

FORMATS = [torch.contiguous_format, torch.channels_last]


def maps(height, width, memory_format=torch.contiguous_format):
    values = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return values.contiguous(memory_format=memory_format)


def test_the_edge_sample_is_repeated():
    """Check 3 of DeepMask: [0..4] by 3 is [2, 1, 0, 0, 1, 2, 3, 4, 4, 3, 2]."""
    line = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 5, 5)
    padded = symmetric_pad(line, 3)
    assert padded.shape == (1, 1, 11, 11)
    assert padded[0, 0, 4].tolist() == [2, 1, 0, 0, 1, 2, 3, 4, 4, 3, 2]
    assert padded.transpose(2, 3)[0, 0, 4].tolist() == [padded[0, 0, 0, 4]] * 11


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("height", "width", "pad"), [(5, 7, 1), (4, 6, 3), (3, 3, 3), (2, 9, 0)])
def test_equals_numpy(height, width, pad, memory_format, gradient):
    x = maps(height, width, memory_format).requires_grad_(gradient)
    expected = np.pad(
        x.detach().numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="symmetric"
    )
    padded = symmetric_pad(x, pad)
    assert torch.equal(padded.detach(), torch.from_numpy(expected))
    assert padded.is_contiguous(memory_format=memory_format)


def test_one_line_is_the_replicated_border():
    """Check 3 of DeepMask, second half."""
    x = maps(6, 5)
    assert torch.equal(symmetric_pad(x, 1), F.pad(x, (1, 1, 1, 1), mode="replicate"))


@pytest.mark.parametrize("pad", [1, 3])
def test_gradient_counts_the_copies(pad):
    x = maps(4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: symmetric_pad(t, pad), (x,))


def test_modes():
    x = maps(4, 5)
    assert torch.equal(mirror_pad(x, 2, "symmetric"), symmetric_pad(x, 2))
    assert torch.equal(mirror_pad(x, 2, "reflect"), F.pad(x, (2, 2, 2, 2), mode="reflect"))
    assert torch.equal(mirror_pad(x, 2, "zeros"), F.pad(x, (2, 2, 2, 2)))
    assert len(PAD_MODES) == 3


@pytest.mark.parametrize(
    ("pad", "mode", "message"),
    [(5, "symmetric", "mirror 5 lines"), (4, "reflect", "reflect 4 lines"), (1, "x", "one of")],
)
def test_what_cannot_be_padded(pad, mode, message):
    with pytest.raises(ValueError, match=message):
        mirror_pad(maps(4, 9), pad, mode)
