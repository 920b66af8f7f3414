"""Target assignment against the sheet's worked cases and a plain-loop oracle."""

import math

import pytest
import torch
import torch.nn.functional as F

from instseg_ext.methods.solo.targets import (
    CellGrid,
    assign_cells,
    downsample_masks,
    make_targets,
)


def rectangle(height, width, x0, y0, x1, y1):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def targets_of(boxes, classes, masks, grid, size=256, num_classes=80):
    return make_targets(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
        masks,
        input_hw=(size, size),
        mask_sizes={4: (size // 4, size // 4)},
        grid=grid,
        num_classes=num_classes,
    )


def split(cells, grid):
    """Return (level, row, column) of flat cells."""
    out = []
    for cell in cells.tolist():
        level = 0
        while cell >= grid.num_grids[level] ** 2:
            cell -= grid.num_grids[level] ** 2
            level += 1
        out.append((level, cell // grid.num_grids[level], cell % grid.num_grids[level]))
    return out


def loop_oracle(boxes, classes, masks, input_hw, grid, num_classes):
    """Assign with loops over instances, levels and cells; shrink masks block by block."""
    starts = [0]
    for side in grid.num_grids:
        starts.append(starts[-1] + side * side)
    labels, pairs = [num_classes] * starts[-1], []
    for m, (box, mask) in enumerate(zip(boxes.tolist(), masks, strict=True)):
        points = mask.nonzero().tolist()
        if not points:
            continue
        cy = sum(p[0] for p in points) / len(points)
        cx = sum(p[1] for p in points) / len(points)
        w, h = box[2] - box[0], box[3] - box[1]
        for level, (side, (low, high)) in enumerate(
            zip(grid.num_grids, grid.scale_ranges, strict=True)
        ):
            if not low <= math.sqrt(w * h) <= high:
                continue
            half = 0.5 * grid.center_radius

            def cell(c, size, side=side):
                return math.floor(c * side / size)

            ic, jc = cell(cy, input_hw[0]), cell(cx, input_hw[1])
            top = max(0, cell(cy - half * h, input_hw[0]), ic - 1)
            bottom = min(side - 1, cell(cy + half * h, input_hw[0]), ic + 1)
            left = max(0, cell(cx - half * w, input_hw[1]), jc - 1)
            right = min(side - 1, cell(cx + half * w, input_hw[1]), jc + 1)
            for i in range(top, bottom + 1):
                for j in range(left, right + 1):
                    labels[starts[level] + i * side + j] = int(classes[m])
                    pairs.append((m, starts[level] + i * side + j))
    return torch.tensor(labels), pairs


def shrink_loop(mask, stride, size_hw):
    out = torch.zeros(size_hw, dtype=torch.uint8)
    padded = torch.zeros(size_hw[0] * stride, size_hw[1] * stride, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    a, b = stride // 2 - 1, stride // 2
    for r in range(size_hw[0]):
        for c in range(size_hw[1]):
            block = padded[r * stride : (r + 1) * stride, c * stride : (c + 1) * stride]
            out[r, c] = int(sum(int(block[y, x]) for y in (a, b) for x in (a, b)) >= 2)
    return out


def test_one_rectangle(published_grid):
    mask = rectangle(256, 256, 64, 64, 192, 128)
    found = targets_of([[64, 64, 192, 128]], [7], mask[None], published_grid)
    cells = split(found.cells, published_grid)
    level0 = [(i, j) for level, i, j in cells if level == 0]
    level1 = [(i, j) for level, i, j in cells if level == 1]
    assert len(cells) == 18
    assert level0 == [(i, j) for i in (13, 14, 15) for j in (18, 19, 20)]
    assert level1 == [(i, j) for i in (12, 13, 14) for j in (16, 17, 18)]
    assert (found.cells[0].item(), found.cells[8].item()) == (538, 620)
    assert found.num_positive.item() == 18
    assert (found.labels == 7).sum() == 18
    assert (found.labels == 80).sum() == published_grid.num_cells - 18
    expected = torch.zeros(64, 64, dtype=torch.uint8)
    expected[16:32, 16:48] = 1
    assert torch.equal(found.masks[4][0], expected)


def test_collision_keeps_both_masks_and_the_last_label(published_grid):
    masks = torch.stack(
        [rectangle(256, 256, 64, 64, 192, 128), rectangle(256, 256, 80, 72, 176, 120)]
    )
    boxes = [[64, 64, 192, 128], [80, 72, 176, 120]]
    found = targets_of(boxes, [7, 9], masks, published_grid)
    levels = [level for level, _, _ in split(found.cells, published_grid)]
    assert (levels.count(0), levels.count(1)) == (15, 18)
    assert found.num_positive.item() == 18
    unique = split(found.cells.unique(), published_grid)
    assert [level for level, _, _ in unique] == [0] * 9 + [1] * 9
    labels = found.labels[found.cells.unique()].tolist()
    assert labels == [7] * 3 + [9] * 6 + [9] * 9
    # With one mask per cell, as in the first SOLO, the last instance owns the cell.
    owners = found.winners[found.cells.unique()]
    sums = found.masks[4].flatten(1).sum(1)[owners].tolist()
    assert sums[:9] == [512] * 3 + [288] * 6


@pytest.mark.parametrize(
    ("side", "levels"), [(96, {0, 1, 2}), (48, {0, 1}), (384, {2, 3, 4}), (256, {2, 3})]
)
def test_level_ranges_include_both_ends(published_grid, side, levels):
    size = 512
    mask = rectangle(size, size, 0, 0, side, side)
    found = targets_of([[0, 0, side, side]], [0], mask[None], published_grid, size=size)
    assert {level for level, _, _ in split(found.cells, published_grid)} == levels


def test_full_image_mask(published_grid):
    found = targets_of([[0, 0, 256, 256]], [0], torch.ones(1, 256, 256).bool(), published_grid)
    level2 = [(i, j) for level, i, j in split(found.cells, published_grid) if level == 2]
    assert level2 == [(i, j) for i in (10, 11, 12) for j in (10, 11, 12)]


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_downsample_counts_the_centre_of_each_block(stride):
    low, high = stride // 2 - 1, stride // 2
    centre = [(low, low), (low, high), (high, low), (high, high)]
    for number, expected in enumerate([0, 0, 1, 1, 1]):
        mask = torch.zeros(1, stride, stride, dtype=torch.bool)
        for y, x in centre[:number]:
            mask[0, y, x] = True
        assert downsample_masks(mask, stride, (1, 1)).item() == expected
        elsewhere = torch.ones(1, stride, stride, dtype=torch.bool)
        for y, x in centre[number:]:
            elsewhere[0, y, x] = False
        assert downsample_masks(elsewhere, stride, (1, 1)).item() == expected


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_downsample_equals_bilinear_on_whole_blocks_and_the_loop_elsewhere(stride):
    masks = torch.rand(3, 96, 64) > 0.5
    bilinear = F.interpolate(masks[None].float(), scale_factor=1 / stride, mode="bilinear")[0]
    found = downsample_masks(masks, stride, (96 // stride, 64 // stride))
    assert torch.equal(found, (bilinear >= 0.5).to(torch.uint8))
    cut = masks[:, :75, :53]
    found = downsample_masks(cut, stride, (7 * 16 // stride, 64 // stride))
    for mask, small in zip(cut, found, strict=True):
        assert torch.equal(small, shrink_loop(mask, stride, (7 * 16 // stride, 64 // stride)))


def test_random_images_against_the_loop():
    grid = CellGrid(
        num_grids=(12, 7, 3),
        strides=(8, 8, 16),
        scale_ranges=((1, 24), (12, 48), (24, 512)),
        center_radius=0.2,
    )
    generator = torch.Generator().manual_seed(1)

    def integers(low, high, count):
        return torch.randint(low, high, (count,), generator=generator).tolist()

    for _ in range(30):
        height, width = integers(20, 97, 1)[0], integers(20, 129, 1)[0]
        masks, boxes = [], []
        for x0, y0, w, h in zip(
            integers(0, width - 2, 6), integers(0, height - 2, 6), integers(1, 90, 6),
            integers(1, 90, 6), strict=True,
        ):  # fmt: skip
            mask = rectangle(height, width, x0, y0, x0 + w, y0 + h)
            mask &= torch.rand(height, width, generator=generator) > 0.3
            masks.append(mask)
            boxes.append([x0, y0, min(x0 + w, width), min(y0 + h, height)])
        masks[3].zero_()
        boxes, masks = torch.tensor(boxes, dtype=torch.float32), torch.stack(masks)
        classes = torch.tensor(integers(0, 5, 6))
        found = make_targets(
            boxes,
            classes,
            masks,
            input_hw=(96, 128),
            mask_sizes={4: (24, 32)},
            grid=grid,
            num_classes=5,
        )
        labels, pairs = loop_oracle(boxes, classes, masks, (96, 128), grid, 5)
        assert torch.equal(found.labels, labels)
        assert sorted(pairs) == sorted(
            zip(found.instances.tolist(), found.cells.tolist(), strict=True)
        )
        assert torch.equal(found.masks[4][0], shrink_loop(masks[0], 4, (24, 32)))


def test_one_pixel_object_and_no_object(published_grid):
    pixel = rectangle(64, 64, 63, 63, 64, 64)
    instances, cells = assign_cells(
        torch.tensor([[63.0, 63.0, 64.0, 64.0]]), pixel[None], (64, 64), published_grid
    )
    assert instances.tolist() == [0]
    assert split(cells, published_grid) == [(0, 39, 39)]
    none = targets_of([], [], torch.zeros(0, 64, 64).bool(), published_grid, size=64)
    assert none.num_positive.item() == 0
    assert none.masks[4].shape == (0, 16, 16)
    assert (none.labels == 80).all()


def test_grid_refuses_lists_of_unequal_length():
    with pytest.raises(ValueError, match=r"MODEL\.SOLO\.NUM_GRIDS"):
        CellGrid(num_grids=(4, 2), strides=(8,), scale_ranges=((1, 2), (2, 3)))
