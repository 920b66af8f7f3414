"""Masks drawn in their boxes, against loops over pixels and ``cv2.resize``."""

import cv2
import numpy as np
import pytest
import torch

from instseg_ext.layers.mask_render import pixel_boxes, render_masks

SIZE = (30, 40)


def candidates(num, seed, m=21):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * torch.tensor([36.0, 26.0]) - 3
    side = 1 + torch.rand(num, 2, generator=generator) * 30
    masks = torch.rand(num, m, m, generator=generator)
    return masks, torch.cat([corner, corner + side], dim=1)


def pixel_by_pixel(mask, box, image_size):
    """Draw by MNC's rule: the nearest value wherever one index is that of the last cell."""
    m = len(mask)
    value = torch.zeros(image_size)
    x1, y1, x2, y2 = box.double().tolist()
    for y in range(image_size[0]):
        for x in range(image_size[1]):
            if x < x1 or x > x2 - 1 or y < y1 or y > y2 - 1:
                continue
            u, v = (x - x1) * m / (x2 - x1), (y - y1) * m / (y2 - y1)
            i, j = int(v), int(u)
            if max(i, j) == m - 1:
                value[y, x] = mask[i, j]
                continue
            upper = mask[i, j] * (1 - (u - j)) + mask[i, j + 1] * (u - j)
            lower = mask[i + 1, j] * (1 - (u - j)) + mask[i + 1, j + 1] * (u - j)
            value[y, x] = upper * (1 - (v - i)) + lower * (v - i)
    return value


def test_corner_aligned_is_the_loop_over_pixels():
    masks, boxes = candidates(6, 0)
    # Large enough that there are pixels of the last cell.
    boxes[:2] = torch.tensor([[2.3, 1.0, 37.6, 29.9], [-4.0, 3.5, 25.0, 28.5]])
    found = render_masks(masks, boxes, SIZE, corner_aligned=True)
    for mask, box, drawn in zip(masks, boxes, found, strict=True):
        wanted = pixel_by_pixel(mask, box, SIZE)
        torch.testing.assert_close(drawn, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_centred_is_cv2_in_the_rounded_box(seed):
    masks, boxes = candidates(12, seed)
    boxes[0] = torch.tensor([3.5, 4.5, 9.5, 11.5])  # halves are rounded to even
    found = render_masks(masks, boxes, SIZE, corner_aligned=False)
    for mask, box, drawn in zip(masks, boxes.numpy(), found, strict=True):
        x1, y1, x2, y2 = np.round(box - [0, 0, 1, 1]).astype(int)
        # The box may reach beyond the image: draw on a larger sheet, then cut.
        sheet = np.zeros((SIZE[0] + 80, SIZE[1] + 80), np.float32)
        resized = cv2.resize(mask.numpy(), (x2 - x1 + 1, y2 - y1 + 1))
        sheet[y1 + 40 : y2 + 41, x1 + 40 : x2 + 41] = resized
        wanted = torch.from_numpy(sheet[40:-40, 40:-40])
        torch.testing.assert_close(drawn, wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize("corner_aligned", [True, False])
def test_a_window_is_a_part_of_the_drawing(corner_aligned):
    masks, boxes = candidates(5, 3)
    whole = render_masks(masks, boxes, SIZE, corner_aligned=corner_aligned)
    part = render_masks(masks, boxes, SIZE, corner_aligned=corner_aligned, window=(7, 4, 21, 30))
    torch.testing.assert_close(part, whole[:, 4:30, 7:21])


@pytest.mark.parametrize("corner_aligned", [True, False])
def test_edges_of_boxes(corner_aligned):
    boxes = torch.tensor(
        [
            [10.0, 20, 30, 29],
            [5.0, 6, 6, 7],  # one pixel
            [-20.0, -20, -4, -4],  # beside the image
            [4.0, 4, 4, 9],  # nothing
            [39.0, 29, 40, 30],  # the last pixel
        ]
    )
    drawn = render_masks(torch.ones(5, 7, 7), boxes, SIZE, corner_aligned=corner_aligned)
    assert drawn.sum(dim=(1, 2)).tolist() == pytest.approx([180, 1, 0, 0, 1])
    assert drawn[0, 20:29, 10:30].min() == pytest.approx(1)
    assert drawn[1, 6, 5] == drawn[4, 29, 39] == 1


def test_no_masks_and_half_precision():
    nothing = render_masks(torch.zeros(0, 21, 21), torch.zeros(0, 4), SIZE, corner_aligned=True)
    assert nothing.shape == (0, *SIZE)
    masks, boxes = candidates(2, 4)
    half = render_masks(masks.bfloat16(), boxes, SIZE, corner_aligned=False)
    assert half.dtype == torch.float32


def test_first_and_last_pixel_are_rounded():
    boxes = torch.tensor([[0.4, 0.6, 3.4, 3.6], [2.5, 3.5, 5.5, 6.5], [1.0, 1.0, 1.3, 1.3]])
    wanted = [[0, 1, 3, 4], [2, 4, 5, 7], [1, 1, 1, 1]]
    assert pixel_boxes(boxes).tolist() == wanted
