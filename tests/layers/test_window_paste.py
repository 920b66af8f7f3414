"""Masks of windows in the image."""

import math

import pytest
import torch
import torch.nn.functional as F

from instseg_ext.layers.window_paste import (
    aligned_axis,
    centred_axis,
    corner_resize,
    iter_window_masks,
)


def logits_of(num, cells, seed=0):
    return torch.randn(num, cells, cells, generator=torch.Generator().manual_seed(seed)) * 3


def pasted(values, rows, cols, size, threshold, **options):
    chunks = iter_window_masks(lambda s: values[s], rows, cols, size, threshold, **options)
    return torch.cat([torch.zeros(0, *size, dtype=torch.bool), *(m.clone() for _, m in chunks)])


@pytest.mark.parametrize(("length", "size"), [(56, 112), (56, 57), (7, 23), (1, 4)])
def test_enlarging_keeps_the_corners(length, size):
    signal = torch.randn(1, 1, length, generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(signal, size=size, mode="linear", align_corners=True)[0, 0]
    torch.testing.assert_close(corner_resize(length, size) @ signal[0, 0], expected)


@pytest.mark.parametrize(("length", "size"), [(160, 113), (56, 28), (160, 1), (9, 9)])
def test_shrinking_averages_by_area(length, size):
    """Compared with the integral of a step function between the new cells' borders."""
    signal = torch.randn(length, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = torch.cat([torch.zeros(1, dtype=torch.float64), signal.cumsum(0)])

    def integral(at):
        whole = min(math.floor(at), length - 1)
        return total[whole] + (at - whole) * signal[whole]

    step = length / size
    expected = [(integral((k + 1) * step) - integral(k * step)) / step for k in range(size)]
    found = corner_resize(length, size).double() @ signal
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "end", "length"), [(3.3, 21.9, 30), (-7.5, 12.25, 30), (20, 47.1, 30), (-9, 60, 30)]
)
def test_centred_windows_are_sampled_at_the_centres_of_pixels(start, end, length):
    values = torch.linspace(-1, 1, 8) ** 3
    axis = centred_axis(start, end, 8, length)
    inside = [p for p in range(length) if start <= p + 0.5 < end]
    assert axis.start == inside[0]
    found = axis.cells.weights @ values
    assert len(found) == len(inside)
    for pixel, value in zip(inside, found.tolist(), strict=True):
        at = min(max((pixel + 0.5 - start) / (end - start) * 8 - 0.5, 0), 7)
        low = min(int(at), 6)
        assert value == pytest.approx(
            (1 - at + low) * values[low].item() + (at - low) * values[low + 1].item(), abs=1e-6
        )


@pytest.mark.parametrize("axis", [centred_axis(40, 50, 8, 30), centred_axis(-12, -1, 8, 30)])
def test_windows_outside_the_image_fill_nothing(axis):
    assert len(axis.cells.weights) == 0
    inside = centred_axis(0, 10, 8, 30)
    masks = pasted(logits_of(2, 8), [axis, inside], [inside, axis], (30, 30), 0.0)
    assert not masks.any()


def authors_paste(mask, start_y, start_x, size, image_size, threshold):
    """The authors' loop over the pixels of a window, on a mask resized already."""
    out = torch.zeros(image_size, dtype=torch.bool)
    for row in range(size):
        y = math.floor(start_y + row)
        for col in range(size):
            x = math.floor(start_x + col)
            inside = 0 <= y <= image_size[0] - 1 and 0 <= x <= image_size[1] - 1
            if mask[row, col] > threshold and inside:
                out[y, x] = True
    return out


@pytest.mark.parametrize("scale", [2**-0.5, 1.0, 2**0.5])
def test_aligned_windows_equal_the_authors_loop(scale):
    """Windows of 16 pixels with 12 cells, at places inside the image and across its borders."""
    values, size, image = logits_of(4, 12), int(16 / scale), (21, 34)
    places = [(0, 0), (1, 2), (2, 3), (1, 0)]
    starts = [tuple((16 * i - 8) / scale for i in place) for place in places]
    rows = [aligned_axis(y, size, 12, image[0]) for y, _ in starts]
    cols = [aligned_axis(x, size, 12, image[1]) for _, x in starts]
    masks = pasted(values, rows, cols, image, -1.38629)
    resize = corner_resize(12, size)
    for mask, value, (y, x) in zip(masks, values, starts, strict=True):
        resized = resize @ value @ resize.t()
        assert torch.equal(mask, authors_paste(resized, y, x, size, image, -1.38629))


def test_pixels_are_those_of_the_dense_product():
    """Only the cells that can matter are multiplied; nothing may be lost."""
    values = logits_of(5, 9)
    values[1] = -5.0
    values[2, 3:5, 4] = 7.0
    rows = [centred_axis(-4.2 + 3 * i, 17.5 + 3 * i, 9, 25) for i in range(5)]
    cols = [centred_axis(-1.7 + i, 30.1 + i, 9, 40) for i in range(5)]
    masks = pasted(values, rows, cols, (25, 40), 0.4)
    for mask, value, row, col in zip(masks, values, rows, cols, strict=True):
        dense = row.cells.weights @ value @ col.cells.weights.t()
        expected = torch.zeros(25, 40, dtype=torch.bool)
        height, width = dense.shape
        expected[row.start : row.start + height, col.start : col.start + width] = dense > 0.4
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("cells", [28, 56, 160])
def test_the_threshold_itself_is_not_above_it(cells):
    """Check 12 of DeepMask: a probability of 0.2 everywhere is background, a bit more is not."""
    threshold = math.log(0.2 / 0.8)
    assert threshold == pytest.approx(-1.3862944)
    axis = centred_axis(-3.7, 91.3, cells, 80)
    exact = torch.full((1, cells, cells), threshold)
    assert not pasted(exact, [axis], [axis], (80, 80), threshold).any()
    assert pasted(exact + 1e-4, [axis], [axis], (80, 80), threshold).all()


def test_chunks_and_numbers_that_are_none():
    values = logits_of(7, 6)
    values[3] = float("nan")
    axis = centred_axis(2, 20, 6, 24)
    asked = []

    def source(index):
        asked.append(index)
        return values[index]

    chunks = iter_window_masks(source, [axis] * 7, [axis] * 7, (24, 24), 0.0, largest_chunk=3)
    found = torch.cat([masks.clone() for _, masks in chunks])
    assert [(s.start, s.stop) for s in asked] == [(0, 3), (3, 6), (6, 7)]
    assert torch.equal(found, pasted(values, [axis] * 7, [axis] * 7, (24, 24), 0.0))
    assert not found[3].any()
    assert len(pasted(values[:0], [], [], (24, 24), 0.0)) == 0
