"""Windows of images and masks, resized as Torch7 does. Numbers: acceptance checks of DeepMask."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

from instseg_ext.methods.deepmask.patches import PAD_VALUE, Window, crop_image, crop_segmentation


def resized_axis(values, size):
    """Resize a list as ``image.scale`` does along one axis, sample by sample."""
    length, out = len(values), []
    for k in range(size):
        if length < size:
            place = k * (length - 1) / (size - 1)
            low = min(int(place), length - 2) if length > 1 else 0
            share = place - low
            out.append((1 - share) * values[low] + share * values[min(low + 1, length - 1)])
        elif length == size:
            out.append(values[k])
        else:
            start, end = k * length / size, (k + 1) * length / size
            cover = [max(0, min(end, i + 1) - max(start, i)) for i in range(length)]
            out.append(sum(c * v for c, v in zip(cover, values, strict=True)) / sum(cover))
    return out


def slow_crop(image, window, size):
    """Copy a window of whole pixels, grey outside, and resize one axis after the other."""
    left, top, side = (int(v) for v in window)
    height, width, channels = image.shape
    out = np.zeros((channels, size, size))
    for channel in range(channels):
        copy = [
            [
                float(image[y, x, channel]) if 0 <= y < height and 0 <= x < width else PAD_VALUE
                for x in range(left, left + side)
            ]
            for y in range(top, top + side)
        ]
        rows = [resized_axis(row, size) for row in copy]
        out[channel] = np.array(
            [resized_axis(column, size) for column in zip(*rows, strict=True)]
        ).T
    return out


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "window",
    [
        (3, 2, 9), (3, 2, 16), (3, 2, 17), (0, 0, 21),
        (-4, -7, 12), (20, 15, 16), (-20, -30, 60), (8, 5, 1),
    ],
)  # fmt: skip
def test_crops_on_whole_pixels_equal_a_loop(image, window):
    got = crop_image(image, Window(*window), 16)
    assert got.dtype is torch.float32
    assert got.is_contiguous()
    np.testing.assert_allclose(got.numpy(), slow_crop(image, window, 16), atol=1e-3)


@pytest.mark.parametrize("side", [7.3, 16.0, 40.6])
def test_windows_lie_between_pixels(side):
    """Of a ramp: its interpolated value where it is enlarged, its integral where it is reduced."""
    ramp = np.broadcast_to(np.arange(200, dtype=np.float32), (200, 200))[..., None]
    left = 50.37
    got = crop_image(ramp, Window(left, 60.9, side), 16)[0, 3].numpy()
    if side <= 16:
        expected = left + np.arange(16) * (side - 1) / 15
    else:
        border = left + np.arange(17) * side / 16
        whole = np.floor(border)
        area = whole * (whole - 1) / 2 + (border - whole) * whole
        expected = np.diff(area) * 16 / side
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_what_lies_outside_is_grey(image):
    for window in (Window(100, 100, 10), Window(-50, 3, 20), Window(3, -500, 400)):
        assert (crop_image(image, window, 8) == PAD_VALUE).all()
    partly = crop_image(image, Window(-8, 0, 16), 16)
    assert (partly[:, :, :8] == PAD_VALUE).all()
    np.testing.assert_array_equal(partly[:, :, 8:].numpy(), image[:16, :8].transpose(2, 0, 1))


def test_the_image_is_not_changed(image):
    before = image.copy()
    crop_image(image, Window(-3, 4.5, 60), 16)
    np.testing.assert_array_equal(image, before)


def test_inner_windows_share_the_centre():
    window = Window.around(10, 20, 12)
    assert window == Window(4, 14, 12)
    assert window.inner(6) == Window(7, 17, 6)


@pytest.fixture(scope="module")
def star():
    """A polygon of two parts, with corners between pixels and outside the image."""
    return [
        [10.2, 5.1, 40.7, 12.3, 30.4, 30.9, 55.0, 44.2, 20.5, 38.0, -4.0, 22.5],
        [44.1, 3.3, 58.8, 6.0, 50.2, 18.9],
    ]


@pytest.mark.parametrize("window", [(0.0, 0.0, 64.0), (8.4, -3.2, 30.0), (20.25, 10.75, 9.5)])
def test_polygons_are_drawn_in_the_window_as_in_an_enlarged_image(star, window):
    """The same polygons drawn in a picture four times as fine, sampled at the patch's pixels."""
    window, size, fine = Window(*window), 56, 4
    got = crop_segmentation(star, window, size, (48, 64)).numpy()
    assert got.shape == (size, size)
    assert got.dtype == bool
    moved = [
        ((np.reshape(part, (-1, 2)) + 30 - window[:2]) * (fine * size / window.side))
        for part in star
    ]
    side = int(np.ceil(94 * fine * size / window.side)) + fine * size
    canvas = mask_util.decode(
        mask_util.merge(
            mask_util.frPyObjects([part.ravel().tolist() for part in moved], side, side)
        )
    )
    corner = round(30 * fine * size / window.side)
    cut = canvas[corner : corner + fine * size, corner : corner + fine * size]
    covered = cut.reshape(size, fine, size, fine).mean(axis=(1, 3))
    sure = np.abs(covered - 0.5) > 0.4
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(got[sure], covered[sure] > 0.5)


@pytest.mark.parametrize("kind", ["rle", "counts", "array"])
@pytest.mark.parametrize("window", [(4, 6, 20), (-5, -5, 64), (30.5, 20.25, 11.5)])
def test_raster_masks_are_resized_like_images(kind, window):
    mask = np.zeros((48, 64), dtype=np.uint8)
    mask[10:30, 8:50] = 1
    mask[15:20, 20:25] = 0
    segmentation = {
        "rle": mask_util.encode(np.asfortranarray(mask)),
        "counts": {"size": [48, 64], "counts": _runs(mask)},
        "array": mask.astype(bool),
    }[kind]
    got = crop_segmentation(segmentation, Window(*window), 32, (48, 64))
    shaded = crop_image(np.float32(mask)[..., None] * 2 * PAD_VALUE, Window(*window), 32)[0]
    inside = crop_image(np.full((48, 64, 1), 2 * PAD_VALUE, np.float32), Window(*window), 32)[0]
    # Outside the image, a mask is empty and not grey.
    expected = shaded - (2 * PAD_VALUE - inside) > PAD_VALUE
    assert torch.equal(got, expected)


def _runs(mask):
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="mask of 8 x 9 pixels does not"):
        crop_segmentation(np.zeros((9, 8), dtype=bool), Window(0, 0, 8), 16, (48, 64))
