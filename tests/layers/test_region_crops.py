"""Windows of regions against one crop at a time, resized by OpenCV's and by MATLAB's rule."""

import cv2
import numpy as np
import pytest
import torch

from instseg_ext.layers.region_crops import _axis, crop_members, crop_regions


def half_away(value):
    return int(np.sign(value) * np.floor(abs(value) + 0.5))


def window_by_loop(box, length, size, context):
    """First and last pixel in the image, samples before it and samples it gets, along one axis.

    In pixels counted from 1, both ends inclusive.
    """
    near, far = box[0] + 1, box[1]
    half = (far - near + 1) / 2
    scale = size / (size - 2 * context)
    centre = near + half
    near, far = half_away(centre - half * scale), half_away(centre + half * scale)
    whole = far - near + 1
    before = max(0, 1 - near)
    near, far = max(1, near), min(length, far)
    share = size / whole
    before = half_away(before * share)
    return near, far, before, min(half_away((far - near + 1) * share), size - before), whole


def crops_by_loop(image, mask, box, size, context):
    """One crop of the image and of the region, (C, S, S) each."""
    x1, y1, x2, y2 = (int(v) for v in box)
    left, right, before_x, width, _ = window_by_loop((x1, x2), image.shape[2], size, context)
    top, bottom, before_y, height, _ = window_by_loop((y1, y2), image.shape[1], size, context)
    window = image[:, top - 1 : bottom, left - 1 : right].transpose(1, 2, 0)
    crop = cv2.resize(np.ascontiguousarray(window), (width, height)).reshape(height, width, -1)
    cut = mask[top - 1 : bottom, left - 1 : right]
    rows = (np.arange(height) + 0.5) * cut.shape[0] / height
    columns = (np.arange(width) + 0.5) * cut.shape[1] / width
    inside = cut[rows.astype(int)[:, None], columns.astype(int)]
    whole, region = np.zeros((2, size, size, len(image)), np.float32)
    place = (slice(before_y, before_y + height), slice(before_x, before_x + width))
    whole[place], region[place] = crop, crop * inside[..., None]
    return whole.transpose(2, 0, 1), region.transpose(2, 0, 1)


def some_boxes(num, height, width):
    corner = torch.stack([torch.randint(0, n, (2, num)) for n in (width, height)], dim=2)
    near, far = corner.amin(dim=0), corner.amax(dim=0) + 1
    return torch.cat([near, far], dim=1).float()


def test_acceptance_check_9_window_of_a_box():
    """A box x 100..294 becomes 84..311, both inclusive: 228 pixels, by the rounding of its ends."""
    assert window_by_loop((99, 294), 1000, 227, 16) == (84, 311, 0, 227, 228)
    axis = _axis(torch.tensor([100.0]), torch.tensor([295.0]), 1000, 227, 16)
    assert axis.inside.all()
    # the first and the last of 227 samples over the 228 pixels 84..311
    assert axis.position[0, 0].item() == pytest.approx(84 + 0.5 * 228 / 227 - 0.5)
    assert axis.position[0, -1].item() == pytest.approx(311 - 0.5 * 228 / 227 + 0.5)
    assert axis.nearest[0, [0, -1]].tolist() == [84, 311]


def test_acceptance_check_9_outside_the_image_there_is_nothing():
    """The 195-pixel box at the corner: 16 pixels before the image become 16 blank samples."""
    image = torch.full((3, 400, 500), 5.0)
    crops = crop_regions(image, torch.tensor([[0.0, 0, 195, 195], [305, 205, 500, 400]]), 227)
    blank = crops[:, 0] == 0
    assert blank[0, :16].all()
    assert blank[0, :, :16].all()
    assert not blank[0, 16:, 16:].any()
    # on the far side the window has one pixel more
    assert blank[1, 210:].all()
    assert blank[1, :, 210:].all()
    assert not blank[1, :210, :210].any()


@pytest.mark.parametrize(("size", "context"), [(227, 16), (32, 3), (16, 0)])
def test_equals_one_crop_at_a_time(size, context):
    image = torch.randn(3, 90, 130) * 50
    boxes = some_boxes(24, 90, 130)
    boxes[0] = torch.tensor([0.0, 0, 130, 90])
    boxes[1] = torch.tensor([129.0, 89, 130, 90])
    superpixels = torch.randint(0, 40, (90, 130), dtype=torch.int32)
    members = torch.rand(40, len(boxes)) > 0.4
    crops = crop_regions(image, boxes, size, context)
    inside = crop_members(superpixels, members, boxes, size, context)
    assert inside.dtype == torch.bool
    for row, box in enumerate(boxes):
        mask = members[:, row][superpixels.long()].numpy()
        if context:
            whole, region = crops_by_loop(image.numpy(), mask, box, size, context)
        else:
            x1, y1, x2, y2 = box.long().tolist()
            window = np.ascontiguousarray(image.numpy()[:, y1:y2, x1:x2].transpose(1, 2, 0))
            whole = cv2.resize(window, (size, size)).transpose(2, 0, 1)
            rows = ((np.arange(size) + 0.5) * (y2 - y1) / size).astype(int) + y1
            columns = ((np.arange(size) + 0.5) * (x2 - x1) / size).astype(int) + x1
            region = whole * mask[rows[:, None], columns]
        np.testing.assert_allclose(crops[row].numpy(), whole, atol=5e-3)
        np.testing.assert_allclose((crops * inside[:, None])[row].numpy(), region, atol=5e-3)


def test_acceptance_check_9_region_and_mirror():
    """Outside the region a crop is zero; the crop that is mirrored is the flipped crop."""
    image = torch.rand(3, 60, 80) + 1
    boxes = some_boxes(8, 60, 80)
    superpixels = torch.randint(0, 9, (60, 80), dtype=torch.int32)
    members = torch.rand(9, 8) > 0.5
    inside = crop_members(superpixels, members, boxes, 40, 4)
    assert ((crop_regions(image, boxes, 40, 4) * inside[:, None])[:, 0] > 0).eq(inside).all()
    mirror = torch.arange(8) % 2 == 0
    for plain, mirrored in (
        (crop_regions(image, boxes, 40, 4), crop_regions(image, boxes, 40, 4, mirror=mirror)),
        (inside, crop_members(superpixels, members, boxes, 40, 4, mirror=mirror)),
    ):
        torch.testing.assert_close(mirrored[mirror], plain[mirror].flip(-1))
        torch.testing.assert_close(mirrored[~mirror], plain[~mirror])


def test_a_mean_image_is_subtracted_inside_the_image_only():
    image, boxes = torch.rand(3, 30, 40) + 9, torch.tensor([[0.0, 0, 20, 20], [5, 5, 20, 20]])
    mean = torch.rand(3, 24, 24)
    plain, crops = crop_regions(image, boxes, 24, 4), crop_regions(image, boxes, 24, 4, mean=mean)
    torch.testing.assert_close(crops, torch.where(plain == 0, plain, plain - mean))


def test_large_images_keep_their_precision():
    """Of a ramp, every sample is its own position."""
    image = torch.arange(6000.0).expand(1, 2, 6000)
    boxes = torch.tensor([[5700.0, 0, 5900, 2], [0, 0, 6000, 2]])
    crops = crop_regions(image, boxes, 64, 8)
    columns = _axis(boxes[:, 0], boxes[:, 2], 6000, 64, 8)
    shown = columns.inside & (crops[:, 0, 32] > 0)
    assert (crops[:, 0, 32] - columns.position).abs()[shown].max() < 2e-3


def test_regions_without_pixels_and_no_regions():
    image, superpixels = torch.ones(3, 10, 12), torch.zeros((10, 12), dtype=torch.int32)
    empty, none = torch.zeros(1, 4), torch.zeros(0, 4)
    for context in (0, 3):
        assert crop_regions(image, empty, 16, context).isfinite().all()
        members = torch.zeros((1, 1), dtype=torch.bool)
        assert not crop_members(superpixels, members, empty, 16, context).any()
    assert crop_regions(image, none, 16, 3).shape == (0, 3, 16, 16)
    assert crop_members(superpixels, torch.zeros((1, 0)).bool(), none, 16, 3).shape == (0, 16, 16)
    assert crop_regions(torch.zeros(3, 0, 0), empty, 16, 3).shape == (1, 3, 16, 16)
    nothing = torch.zeros((0, 0), dtype=torch.int32)
    assert not crop_members(nothing, torch.zeros((0, 1)).bool(), empty, 16, 3).any()


@pytest.mark.parametrize(("size", "context"), [(0, 0), (16, 8), (16, -1)])
def test_context_must_leave_room(size, context):
    with pytest.raises(ValueError, match=f"{context} pixels of context on each side"):
        crop_regions(torch.ones(3, 9, 9), torch.tensor([[0.0, 0, 9, 9]]), size, context)
