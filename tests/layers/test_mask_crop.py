"""Crops of bit masks against OpenCV on copies of them."""

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from instseg_ext.layers.mask_crop import crop_masks


def by_opencv(mask, box, size, threshold):
    """Paste the mask into the frame of the box, resize, compare."""
    x1, y1, x2, y2 = (int(v) for v in box)
    frame = np.zeros((y2 - y1, x2 - x1), np.float32)
    height, width = mask.shape
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if left < right and top < bottom:
        frame[top - y1 : bottom - y1, left - x1 : right - x1] = mask[top:bottom, left:right]
    return cv2.resize(frame, (size, size)) >= threshold


def some_boxes(count, height, width, generator):
    first = torch.stack(
        [
            torch.randint(-20, width + 10, (count,), generator=generator),
            torch.randint(-20, height + 10, (count,), generator=generator),
        ],
        dim=1,
    )
    sides = torch.randint(1, 90, (count, 2), generator=generator)
    return torch.cat([first, first + sides], dim=1).float()


@pytest.mark.parametrize("size", [21, 28])
def test_equals_opencv(size):
    generator = torch.Generator().manual_seed(size)
    masks = torch.rand((4, 60, 83), generator=generator) > 0.4
    boxes = some_boxes(120, 60, 83, generator)
    index = torch.randint(4, (120,), generator=generator)
    crops = crop_masks(masks, index, boxes, size)
    expected = np.stack(
        [by_opencv(masks[i].numpy(), box, size, 0.4) for i, box in zip(index, boxes, strict=True)]
    )
    assert crops.dtype == torch.bool
    np.testing.assert_array_equal(crops.numpy(), expected)


def test_beside_the_mask_and_the_image_there_is_nothing():
    masks = torch.ones((1, 8, 8), dtype=torch.bool)
    boxes = torch.tensor([[-9.0, 0, -1, 8], [8, 8, 20, 20], [0, 0, 8, 8], [4, 0, 12, 8]])
    crops = crop_masks(masks, torch.zeros(4, dtype=torch.int64), boxes, 4)
    assert crops.flatten(1).sum(dim=1).tolist() == [0, 0, 16, 8]
    assert crops[3, :, :2].all()


def test_nothing_to_crop():
    boxes, index = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64)
    assert crop_masks(torch.ones((2, 5, 5)).bool(), index, boxes, 21).shape == (0, 21, 21)
    none = crop_masks(
        torch.zeros((0, 5, 5)).bool(), torch.zeros(1).long(), torch.tensor([[0.0, 0, 2, 2]]), 21
    )
    assert none.shape == (1, 21, 21)
    assert not none.any()


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operator made, views of ``given`` aside."""

    def __init__(self, given):
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != self.given:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_mask_of_the_size_of_the_image_for_each_box():
    masks = torch.ones((3, 200, 300), dtype=torch.bool)
    boxes = some_boxes(50, 200, 300, torch.Generator().manual_seed(0))
    with Largest(masks) as seen:
        crop_masks(masks, torch.zeros(50, dtype=torch.int64), boxes, 21)
    assert seen.elements <= 50 * 21 * 21
