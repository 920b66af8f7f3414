"""From score maps to proposals."""

import math

import pytest
import torch
from methods.deepmask.deepmask_models import (
    model_of,
    picture,
    planted_maps,
    sharp_model_of,
)

from instseg_ext.methods.deepmask.inference import (
    PAD_VALUE,
    Windows,
    choose_windows,
    gather_windows,
    legacy_cells,
    place_windows,
    resize_and_pad,
    scaled_size,
)

SCALES = [2 ** (k / 2) for k in range(-5, 2)]


def windows_of(rows):
    """Return windows of (scale, row, column, score)."""
    scale, row, col, logits = zip(*rows, strict=True)
    return Windows(torch.tensor(scale), torch.tensor(row), torch.tensor(col), torch.tensor(logits))


@pytest.mark.parametrize(
    ("scale", "cells"), [(1.0, (31, 41)), (2**0.5, (44, 58)), (2**-2.5, (7, 9))]
)
def test_grid_of_a_480_x_640_image(scale, cells):
    """Check 5, first half."""
    model = model_of("MODEL.DEEPMASK.TEST_SCALES", [scale], "MODEL.DEEPMASK.INPUT_SIZE", 160).eval()
    with torch.no_grad():
        (maps,) = model.pyramid_maps(torch.zeros(3, 480, 640))
    assert maps.scores.shape == (1, *cells)
    size = scaled_size((480, 640), scale)
    assert cells == tuple(math.ceil(side / 16) + 1 for side in size)


def test_places_of_windows():
    """Check 5, second half: cell (0, 0) is [-80, 80), cell (30, 40) is centred at (480, 640)."""
    windows = windows_of([(0, 0, 0, 1.0), (0, 30, 40, 1.0)])
    rows, cols = place_windows(windows, [1.0], 160, 56, (480, 640), (480, 640))
    assert (rows[0].start, len(rows[0].cells.weights)) == (0, 80)
    # The middle of the window lies at the first pixel: between the middle cells.
    assert rows[0].cells.weights[0].nonzero().flatten().tolist() == [27, 28]
    assert (rows[1].start, len(rows[1].cells.weights)) == (400, 80)
    assert (cols[1].start, len(cols[1].cells.weights)) == (560, 80)


def test_image_sizes_round_half_up():
    assert [scaled_size((480, 640), s) for s in (2**0.5, 2**-2.5)] == [(679, 905), (85, 113)]
    assert scaled_size((5, 7), 0.5) == (3, 4)
    assert scaled_size((2, 3), 0.17) == (1, 1)


def test_pyramid_has_grey_borders_and_no_smoothing():
    image = torch.rand(3, 9, 13) * 255
    same = resize_and_pad(image, 1.0, 4)
    assert torch.equal(same[:, 4:-4, 4:-4], image)
    assert (same[:, :4] == PAD_VALUE).all()
    assert (same[:, :, -4:] == PAD_VALUE).all()
    # Of 13 columns 7: corners in place, every other sample exactly.
    half = resize_and_pad(image, 0.5, 0)
    torch.testing.assert_close(half, image[:, ::2, ::2])


@pytest.mark.parametrize(
    ("hot", "legacy"),
    [
        ((1, 3, 2), (1, 2, 3)),
        ((0, 0, 1), (0, 0, 2)),
        ((1, 4, 6), (1, 4, 0)),
        ((1, 0, 6), (1, 0, 0)),
    ],
)
def test_one_hot_cell_is_one_window(hot, legacy):
    """Check 6: the cell itself; in the authors' code the one up and right, or the row's first."""
    maps = planted_maps([(3, 4), (5, 7)], [(*hot, 4.0)])
    scores = [part.scores[0] for part in maps]
    windows = choose_windows(scores, 1)
    assert (windows.scale.item(), windows.row.item(), windows.col.item()) == hot
    assert windows.logits.item() == 4.0
    moved = legacy_cells(windows, scores)
    assert (moved.scale.item(), moved.row.item(), moved.col.item()) == legacy
    codes = gather_windows([part.codes for part in maps], moved, 1).flatten(1)
    assert codes[0, :3].tolist() == list(legacy)


@pytest.mark.parametrize("paste", [False, True])
def test_a_hot_cell_gives_a_mask_around_its_centre(paste):
    """Check 6: the centre is at (16 r / s, 16 c / s) of the original image."""
    model = model_of(
        "MODEL.DEEPMASK.TEST_SCALES", [0.5, 2.0], "TEST.DETECTIONS_PER_IMAGE", 1,
        "MODEL.DEEPMASK.LEGACY_PASTE", paste,
    ).eval()  # fmt: skip
    block = torch.full((1, 12, 12), -5.0)
    block[:, 4:8, 4:8] = 5.0
    model.head.mask.forward = lambda codes: block.expand(len(codes), -1, -1)
    sizes = [(3, 4), (9, 13)]  # of 64 x 96 pixels
    for scale, row, col, s in [(0, 1, 2, 0.5), (1, 5, 7, 2.0)]:
        maps = planted_maps(sizes, [(scale, row, col, 3.0)])
        found = model._paste(
            maps, choose_windows([part.scores[0] for part in maps], 1), (64, 96), (64, 96)
        )
        box = found.pred_boxes.tensor[0]
        centre = (box[:2] + box[2:]) / 2
        expected = torch.tensor([16 * col / s, 16 * row / s])
        assert (centre - expected).abs().max() <= 1
        # Four of twelve cells of a window of 32 / s pixels, and a bit of their neighbours.
        assert 32 / s / 3 <= box[2] - box[0] <= 32 / s / 3 + 2 * 32 / s / 12


def test_equal_scores_keep_the_lower_scale_first():
    """Check 14: order of ties; more windows than there are give each once."""
    scores = [torch.zeros(2, 3), torch.zeros(3, 2), torch.full((1, 2), 1.0)]
    windows = choose_windows(scores, 1000)
    assert len(windows) == 14
    cells = list(
        zip(windows.scale.tolist(), windows.row.tolist(), windows.col.tolist(), strict=True)
    )
    assert len(set(cells)) == 14
    expected = [(2, 0, 0), (2, 0, 1)]
    expected += [(0, i, j) for i in range(2) for j in range(3)]
    expected += [(1, i, j) for i in range(3) for j in range(2)]
    assert cells == expected
    few = choose_windows(scores, 5)
    assert (
        list(zip(few.scale.tolist(), few.row.tolist(), few.col.tolist(), strict=True))
        == (expected[:5])
    )


def test_scores_that_are_no_numbers_are_not_chosen():
    scores = torch.tensor([[float("nan"), 1.0], [float("inf"), -float("inf")]])
    windows = choose_windows([scores], 4)
    assert (windows.row.tolist(), windows.col.tolist()) == ([0], [1])


def test_windows_beyond_a_map_are_filled_with_zeros():
    maps = [torch.arange(2 * 5 * 6.0).view(1, 2, 5, 6) + 1, torch.ones(1, 2, 3, 3)]
    windows = windows_of([(0, 1, 1, 0.0), (1, 0, 1, 0.0), (0, 0, 2, 0.0)])
    found = gather_windows(maps, windows, size=4, step=2)
    assert torch.equal(found[2], maps[0][0, :, 0:4, 4:6].new_zeros(2, 4, 4).index_copy(
        2, torch.tensor([0, 1]), maps[0][0, :, 0:4, 4:6]))  # fmt: skip
    assert torch.equal(found[0, :, :3, :4], maps[0][0, :, 2:5, 2:6])
    assert (found[0, :, 3] == 0).all()
    assert (found[1, :, :3, :1] == 1).all()
    assert found[1].sum() == 6


def test_boxes_are_tight_and_empty_masks_are_dropped():
    """Check 15: all-negative masks leave no proposal; boxes have an area and fit their masks."""
    model = model_of().eval()
    with torch.no_grad():
        found = model([picture(40, 52)])[0]
        instances, proposals = found["instances"], found["proposals"]
        assert len(instances) == len(proposals) > 0
        for box, mask in zip(instances.pred_boxes.tensor, instances.pred_masks, strict=True):
            ys, xs = mask.nonzero().T
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert torch.equal(proposals.proposal_boxes.tensor, instances.pred_boxes.tensor)
        torch.testing.assert_close(proposals.objectness_logits.sigmoid(), instances.scores)
        assert (instances.pred_classes == 0).all()
        model.head.mask.fc.weight.zero_()
        model.head.mask.fc.bias.fill_(-9.0)
        found = model([picture(40, 52)])[0]
    assert len(found["instances"]) == len(found["proposals"]) == 0
    assert found["proposals"].proposal_boxes.tensor.shape == (0, 4)


@pytest.mark.parametrize("size", [(15, 9), (1, 1), (3, 200)])
def test_small_images_have_windows_at_every_scale(size):
    """Check 15: an image of fewer than 16 pixels still gives at least one per scale."""
    model = model_of("MODEL.DEEPMASK.TEST_SCALES", SCALES).eval()
    with torch.no_grad():
        maps = model.pyramid_maps(torch.zeros(3, *size))
        found = model([picture(*size)])[0]["instances"]
    assert len(maps) == len(SCALES)
    assert all(part.scores[0].numel() >= 1 for part in maps)
    assert found.image_size == size


def test_a_window_of_the_image_is_the_patch_around_it():
    """Where the trunk sees no border, scores and masks do not depend on the way to the window.

    The receptive field of a cell is 267 pixels: patches with 144 pixels of context or more show a
    window all that it sees.
    """
    model = model_of("MODEL.DEEPMASK.TEST_SCALES", [1.0], "MODEL.DEEPMASK.CONTEXT", 144).eval()
    image = torch.rand(3, 320, 352, generator=torch.Generator().manual_seed(0)) * 255
    with torch.no_grad():
        (maps,) = model.pyramid_maps(image)
        windows = windows_of([(0, 10, 10, 0.0), (0, 10, 12, 0.0)])
        logits, _, _ = model.window_masks([maps], windows)
        outputs = model.patch_outputs([{"image": image[:, :, x : x + 320]} for x in (0, 32)])
        masks = logits(slice(None))
    scores = maps.scores[0, windows.row, windows.col]
    torch.testing.assert_close(scores, outputs.score_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(masks, outputs.mask_logits, rtol=1e-4, atol=1e-4)


def test_refined_windows_move_with_the_image():
    """Two views of an image, 32 pixels apart: windows that see no border have the same masks."""
    model = sharp_model_of("MODEL.DEEPMASK.TEST_SCALES", [1.0]).eval()
    image = torch.rand(3, 416, 448, generator=torch.Generator().manual_seed(0)) * 255
    windows = windows_of([(0, 13, 13, 0.0), (0, 13, 14, 0.0)])
    moved = windows_of([(0, 13, 11, 0.0), (0, 13, 12, 0.0)])
    with torch.no_grad():
        first, second = model.pyramid_maps(image), model.pyramid_maps(image[:, :, 32:])
        masks = model.window_masks(first, windows)[0](slice(None))
        again = model.window_masks(second, moved)[0](slice(None))
    assert masks.shape == (2, 32, 32)
    torch.testing.assert_close(masks, again, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masks[0], masks[1], atol=1e-3)


def test_sharpmask_predicts_with_either_head():
    model = sharp_model_of().eval()
    coarse = sharp_model_of("MODEL.SHARPMASK.USE_DEEPMASK_HEAD", True).eval()
    coarse.load_state_dict(model.state_dict())
    plain = model_of().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        results = [m([picture(48, 64)])[0]["instances"] for m in (coarse, plain, model)]
    assert torch.equal(results[0].pred_masks, results[1].pred_masks)
    assert torch.equal(results[0].scores, results[1].scores)
    assert results[2].pred_masks.shape[1:] == (48, 64)
    assert not torch.equal(results[0].pred_masks[:5], results[2].pred_masks[:5])


def test_suppression_keeps_the_best_of_overlapping_boxes():
    everything = model_of().eval()
    few = model_of("MODEL.DEEPMASK.NMS_THRESH", 0.5).eval()
    with torch.no_grad():
        a = everything([picture(48, 64)])[0]
        b = few([picture(48, 64)])[0]
    assert 0 < len(b["instances"]) < len(a["instances"])
    assert torch.equal(b["instances"].scores[0], a["instances"].scores[0])
    assert torch.equal(b["proposals"].proposal_boxes.tensor, b["instances"].pred_boxes.tensor)


def test_results_are_at_the_original_size():
    """An image that was resized before the pyramid, in both axes by another factor."""
    model = model_of("MODEL.DEEPMASK.TEST_SCALES", [1.0], "TEST.DETECTIONS_PER_IMAGE", 1).eval()
    block = torch.full((1, 12, 12), -5.0)
    block[:, 3:9, 3:9] = 5.0
    model.head.mask.forward = lambda codes: block.expand(len(codes), -1, -1)
    maps = planted_maps([(5, 7)], [(0, 2, 3, 3.0)])
    windows = choose_windows([maps[0].scores[0]], 1)
    found = model._paste(maps, windows, (64, 96), (128, 48))
    x0, y0, x1, y1 = found.pred_boxes.tensor[0].tolist()
    # Half of a window of 32 pixels around (48, 32), halved in x and doubled in y.
    assert ((x0 + x1) / 2, (y0 + y1) / 2) == pytest.approx((24, 64), abs=0.6)
    assert (x1 - x0, y1 - y0) == pytest.approx((8, 32), abs=5)
    model = model_of("MODEL.DEEPMASK.LEGACY_PASTE", True).eval()
    with pytest.raises(ValueError, match="LEGACY_PASTE knows the original size"):
        model._paste(maps, windows, (64, 96), (128, 48))
