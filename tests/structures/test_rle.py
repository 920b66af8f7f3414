"""Run-length encoding equals that of pycocotools, on shapes that touch borders and corners too."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from instseg_ext.structures.rle import decode_masks, encode_crops, encode_masks, is_rle


def _oracle(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def _cases() -> dict[str, np.ndarray]:
    blank = np.zeros((7, 5), dtype=bool)
    cases = {"empty": blank.copy(), "full": ~blank}
    for name, where in {
        "first_pixel": (0, 0),
        "last_pixel": (6, 4),
        "full_column": (slice(None), 2),
        "two_full_columns": (slice(None), slice(1, 3)),
        "last_columns": (slice(None), slice(3, 5)),
        "full_row": (3, slice(None)),
        "bottom_row": (6, slice(None)),
        "inner_box": (slice(2, 5), slice(1, 4)),
        "column_foot": (slice(4, 7), 1),
    }.items():
        cases[name] = blank.copy()
        cases[name][where] = True
    cases["bottom_then_top"] = blank.copy()
    cases["bottom_then_top"][5:, 1] = cases["bottom_then_top"][:2, 2] = True
    return cases


@pytest.mark.parametrize("name", sorted(_cases()))
def test_encoding_equals_pycocotools(name):
    mask = _cases()[name]
    assert encode_masks(mask[None])[0] == _oracle(mask)


def test_random_masks_equal_pycocotools_and_round_trip():
    rng = np.random.default_rng(3)
    for density in (0.02, 0.5, 0.98):
        masks = rng.random((25, 13, 9)) < density
        encoded = encode_masks(torch.from_numpy(masks))
        assert encoded == [_oracle(mask) for mask in masks]
        assert np.array_equal(decode_masks(encoded), masks)
        by_column = torch.from_numpy(np.ascontiguousarray(masks.transpose(0, 2, 1)))
        assert encode_masks(by_column.transpose(1, 2)) == encoded


@pytest.mark.parametrize("corner", [(0, 0), (3, 2), (5, 4)])
def test_crops_are_encoded_as_whole_masks_are(corner):
    size, crops = (11, 10), np.stack(list(_cases().values()))
    left, top = corner
    whole = np.zeros((len(crops), *size), dtype=bool)
    whole[:, top : top + crops.shape[1], left : left + crops.shape[2]] = crops
    assert encode_crops(crops, corner, size) == encode_masks(whole)
    assert encode_crops(crops[:0], corner, size) == []


def test_no_masks_and_wrong_shape():
    assert encode_masks(torch.zeros(0, 4, 4, dtype=torch.bool)) == []
    assert decode_masks([], (4, 6)).shape == (0, 4, 6)
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        encode_masks(np.zeros((4, 4), dtype=bool))


def test_uncompressed_counts_decode():
    mask = decode_masks([{"size": [3, 2], "counts": [1, 2, 3]}])[0]
    assert mask.tolist() == [[False, False], [True, False], [True, False]]
    assert is_rle({"size": [3, 2], "counts": [1, 2, 3]})
    assert not is_rle([[0, 0, 1, 1, 2, 2]])
