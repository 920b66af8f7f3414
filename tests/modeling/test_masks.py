"""Full-image masks in bounded memory against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from instseg_ext.modeling.masks import (
    Crop,
    Resize,
    encode_rle,
    iter_masks,
    masks_to_instances,
    tight_boxes,
)
from instseg_ext.structures.rle import rle_boxes

STEPS = [Resize((64, 96)), Crop((60, 83)), Resize((47, 71))]


def plain_masks(probs, steps, threshold=0.5):
    """One instance after the other, every step in full."""
    out = []
    for prob in probs.float():
        value = prob[None, None]
        for step in steps:
            if isinstance(step, Crop):
                value = value[..., : step.size_hw[0], : step.size_hw[1]]
            else:
                value = F.interpolate(value, step.size_hw, mode="bilinear", align_corners=False)
        out.append(value[0, 0] > threshold)
    return torch.stack(out)


def loop_boxes(masks):
    boxes = []
    for mask in masks:
        ys, xs = np.nonzero(mask.numpy())
        boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(ys) else [0, 0, 0, 0])
    return torch.tensor(np.array(boxes), dtype=torch.float32)


def blobs(num, height, width, seed=0):
    """Noisy ellipses: some cut by the border, the first empty, the second full."""
    gen = torch.Generator().manual_seed(seed)
    y, x = torch.arange(height)[None, :, None], torch.arange(width)[None, None]
    cy, cx, ry, rx = torch.rand(4, num, 1, 1, generator=gen)
    ry, rx = (ry * 0.3 + 0.05) * height, (rx * 0.3 + 0.05) * width
    logits = 3 - 3 * ((y - cy * height) / ry) ** 2 - 3 * ((x - cx * width) / rx) ** 2
    probs = torch.sigmoid(logits + 0.4 * torch.randn(num, height, width, generator=gen))
    probs[0] = 0.1
    probs[1] = 0.9
    return probs


@pytest.fixture(params=["windowed", "step by step"])
def way(request, monkeypatch):
    """Run a test with and without the windowed path."""
    if request.param == "step by step":
        monkeypatch.setattr("instseg_ext.modeling.masks.exact_float32_matmul", lambda: False)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("budget_mb", [1e-6, 0.2, 256])
def test_chunks_cover_all_and_equal_the_plain_loop(budget_mb):
    probs = blobs(9, 16, 24)
    chunks = list(iter_masks(probs, STEPS, budget_mb=budget_mb))
    assert torch.equal(torch.cat([m for _, m in chunks]), plain_masks(probs, STEPS))
    assert [i for s, _ in chunks for i in range(9)[s]] == list(range(9))
    if budget_mb == 0.2:
        assert 1 < len(chunks) < 9
    else:
        assert len(chunks) == {1e-6: 9, 256: 1}[budget_mb]


def test_values_that_are_no_probabilities():
    probs = 4 * blobs(9, 16, 24) - 2
    masks = torch.cat([m for _, m in iter_masks(probs, STEPS, threshold=-0.5)])
    assert torch.equal(masks, plain_masks(probs, STEPS, -0.5))
    probs[3, 2, 2] = torch.nan
    assert torch.equal(next(iter_masks(probs, STEPS))[1], plain_masks(probs, STEPS))


def test_function_of_slices_equals_tensor():
    probs = blobs(5, 16, 24)
    chunks = iter_masks(lambda s: probs[s], STEPS, budget_mb=0.2, num=5)
    assert torch.equal(torch.cat([m for _, m in chunks]), plain_masks(probs, STEPS))
    with pytest.raises(ValueError, match="num="):
        next(iter_masks(lambda s: probs[s], STEPS))


@pytest.mark.usefixtures("way")
def test_reused_planes_hold_the_current_chunk():
    probs, expected = blobs(9, 16, 24), plain_masks(blobs(9, 16, 24), STEPS)
    places = set()
    for index, masks in iter_masks(probs, STEPS, budget_mb=0.2, reuse=True):
        assert torch.equal(masks, expected[index])
        places.add(masks.data_ptr())
    assert len(places) == 1


def test_threshold_is_strict_and_steps_are_not_fused():
    flat = torch.full((1, 4, 4), 0.5)
    assert not next(iter_masks(flat, []))[1].any()
    assert next(iter_masks(flat + 1e-3, []))[1].all()
    noise = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    up_down = [Resize((11, 13)), Resize((9, 7))]
    two = next(iter_masks(noise, up_down))[1]
    assert torch.equal(two, plain_masks(noise, up_down))
    assert not torch.equal(two, plain_masks(noise, [Resize((9, 7))]))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("output", ["bool", "rle"])
@pytest.mark.parametrize("num", [0, 2, 6])
def test_instances_fields(output, num):
    probs = blobs(6, 16, 24)[:num].half()
    scores, classes = torch.rand(num).half(), torch.arange(num, dtype=torch.int32)
    result = masks_to_instances(
        probs, STEPS, scores, classes, image_size=(47, 71), budget_mb=0.1, output=output
    )
    assert len(result) == num
    assert result.image_size == (47, 71)
    assert result.scores.dtype == torch.float32
    assert result.pred_classes.dtype == torch.int64
    assert result.pred_boxes.tensor.dtype == torch.float32
    assert result.pred_boxes.tensor.shape == (num, 4)
    expected = plain_masks(probs, STEPS) if num else torch.zeros(0, 47, 71, dtype=torch.bool)
    if output == "bool":
        assert result.pred_masks.dtype == torch.bool
        assert torch.equal(result.pred_masks, expected)
    else:
        decoded = [torch.from_numpy(coco_mask.decode(r)).bool() for r in result.pred_masks_rle]
        assert len(decoded) == num
        assert all(torch.equal(a, b) for a, b in zip(decoded, expected, strict=True))
    if num:
        assert torch.equal(result.pred_boxes.tensor, loop_boxes(expected))
        assert len(result[result.pred_classes > 0]) == num - 1
        assert result.pred_boxes.tensor[0].tolist() == [0, 0, 0, 0]


def test_given_boxes_are_kept_and_wrong_sizes_are_named():
    probs, boxes = blobs(2, 16, 24), torch.rand(2, 4)
    args = (torch.rand(2), torch.zeros(2))
    result = masks_to_instances(probs, STEPS, *args, image_size=(47, 71), boxes=boxes)
    assert torch.equal(result.pred_boxes.tensor, boxes)
    with pytest.raises(ValueError, match=r"\(47, 71\)"):
        masks_to_instances(probs, STEPS, *args, image_size=(48, 71))
    with pytest.raises(ValueError, match="cannot crop"):
        masks_to_instances(probs, [Crop((17, 24))], *args, image_size=(17, 24))
    with pytest.raises(ValueError, match="MASK_OUTPUT"):
        masks_to_instances(probs, STEPS, *args, image_size=(47, 71), output="png")


def test_boxes_of_single_pixels_and_borders():
    masks = torch.zeros(5, 7, 9, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 6, 8] = masks[2, 3, 4] = True
    masks[3] = True
    assert torch.equal(tight_boxes(masks), loop_boxes(masks))
    assert tight_boxes(masks[:0]).shape == (0, 4)


def test_rle_of_both_memory_orders_and_json():
    masks = plain_masks(blobs(4, 16, 24), STEPS)
    by_column = masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert encode_rle(masks) == encode_rle(by_column)
    for rle, mask in zip(encode_rle(masks), masks, strict=True):
        assert isinstance(rle["counts"], str)
        assert rle["size"] == [47, 71]
        assert np.array_equal(coco_mask.decode(rle).astype(bool), mask.numpy())


@pytest.mark.parametrize("piece_bytes", [1, 100, 500])
def test_rle_in_pieces(piece_bytes, monkeypatch):
    monkeypatch.setattr("instseg_ext.structures.rle._PIECE_BYTES", piece_bytes)
    masks = torch.cat([plain_masks(blobs(8, 16, 24), STEPS), torch.rand(3, 47, 71) > 0.5])
    masks[-1, 46] = masks[-1, 0] = True  # runs that go on from column to column
    for rle, mask in zip(encode_rle(masks), masks, strict=True):
        expected = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert rle["counts"] == expected["counts"].decode()


def test_boxes_of_run_lengths():
    masks = torch.cat([plain_masks(blobs(8, 16, 24), STEPS), torch.zeros(3, 47, 71).bool()])
    masks[-3, 46, 70] = masks[-2, :, 5] = masks[-1, 9] = True
    assert torch.equal(torch.from_numpy(rle_boxes(encode_rle(masks))).float(), loop_boxes(masks))
    assert rle_boxes([]).shape == (0, 4)


def test_rle_list_indexes_like_a_tensor():
    rles = encode_rle(plain_masks(blobs(4, 16, 24), STEPS))
    assert rles[torch.tensor([3, 0])] == [rles[3], rles[0]]
    assert rles[torch.tensor([True, False, True, False])] == [rles[0], rles[2]]
    assert rles[1:] == [rles[1], rles[2], rles[3]]
    assert rles[np.int64(2)] == rles[-2]
    with pytest.raises(IndexError, match="length 2 for 4"):
        rles[torch.tensor([True, False])]
