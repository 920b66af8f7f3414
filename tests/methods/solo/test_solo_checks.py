"""Worked cases and plain-loop oracles for SOLO and Decoupled SOLO, from targets to detections."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from methods.solo.test_solo_inference import loop_oracle
from methods.solo.toys import MaskTable

from instseg_ext.evaluation.coco import instances_to_results
from instseg_ext.methods.solo.inference import InferenceOptions
from instseg_ext.methods.solo.location_head import SOLOOutputs
from instseg_ext.visualization.draw import draw_instances

KINDS = ("vanilla", "decoupled", "decoupled_light")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def raw_outputs(head, input_hw, num_classes, images=1, towers=torch.zeros, category=-10.0):
    """Return hand-made outputs of a head 32 channels wide."""
    sizes = [(input_hw[0] // s, input_hw[1] // s) for s in head.strides]
    number = 2 if hasattr(head, "mask_tower_x") else 1
    return SOLOOutputs(
        [torch.full((images, num_classes, s, s), category) for s in head.num_grids],
        [tuple(towers(images, 32, *size) for _ in range(number)) for size in sizes],
    )


def set_cell(head, level, row, column, weight, bias):
    """Make channel 0 of the tower the mask of one cell; the masks of all others are empty.

    Its logit is ``weight`` times that channel plus ``bias``.
    """
    with torch.no_grad():
        for parameter in head.level_parameters():
            parameter.fill_(-10 if parameter.ndim == 1 else 0)
        if hasattr(head, "mask_pred"):
            predictor, channel = head.mask_pred[level], row * head.num_grids[level] + column
        else:
            predictor, channel = head.mask_pred_x[level], column
            head.mask_pred_y[level].bias[row] = 10
        middle = predictor.weight.shape[-1] // 2
        predictor.weight[channel, 0, middle, middle] = weight
        predictor.bias[channel] = bias


def instances_of(masks, boxes, classes):
    found = Instances(tuple(masks.shape[-2:]))
    found.gt_masks = BitMasks(masks)
    found.gt_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
    return found


def rectangle(height, width, x0, y0, x1, y1):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


# --- shapes --------------------------------------------------------------------------------------


def test_masks_have_the_sizes_of_the_sheet(make_head, kind):
    head = make_head(kind=kind, dim=32, num_convs=1, width=32)
    raw = raw_outputs(head, (256, 384), 80)
    sizes = [(64, 96), (64, 96), (32, 48), (16, 24), (16, 24)]
    with torch.no_grad():
        for level, (side, size) in enumerate(zip(head.num_grids, sizes, strict=True)):
            every = torch.arange(side * side)
            assert head.level_masks(raw, 0, level, every).shape == (side * side, *size)
        one_of_each = torch.tensor([0, 1600, 2896, 3472, 3871])
        assert head.masks(raw, [one_of_each])[0].shape == (5, 64, 96)


# --- targets -------------------------------------------------------------------------------------


def loop_targets(truth, input_hw, grid, num_classes):
    """Fill one label and one mask plane per cell, instance by instance: the last one stays.

    Returns per level the (S, S) labels and the masks by cell.
    """
    levels = []
    for side, stride, (low, high) in zip(
        grid.num_grids, grid.strides, grid.scale_ranges, strict=True
    ):
        labels, planes = torch.full((side, side), num_classes), {}
        for box, label, mask in zip(
            truth.gt_boxes.tensor.tolist(),
            truth.gt_classes.tolist(),
            truth.gt_masks.tensor,
            strict=True,
        ):
            width, height = box[2] - box[0], box[3] - box[1]
            if not mask.any() or not low <= math.sqrt(width * height) <= high:
                continue
            y, x = mask.nonzero().double().mean(dim=0).tolist()
            padded = torch.zeros(input_hw)
            padded[: mask.shape[0], : mask.shape[1]] = mask
            small = F.interpolate(padded[None, None], scale_factor=2 / stride, mode="bilinear")
            half_h, half_w = 0.5 * grid.center_radius * height, 0.5 * grid.center_radius * width

            def span(center, half, size, side=side):
                middle = math.floor(center * side / size)
                first = max(0, middle - 1, math.floor((center - half) * side / size))
                last = min(side - 1, middle + 1, math.floor((center + half) * side / size))
                return range(first, last + 1)

            for i in span(y, half_h, input_hw[0]):
                for j in span(x, half_w, input_hw[1]):
                    labels[i, j] = label
                    planes[i * side + j] = (small[0, 0] >= 0.5).to(torch.uint8)
        levels.append((labels, planes))
    return levels


def random_truth(generator):
    """Return up to six overlapping ragged rectangles on an image of random size."""

    def integer(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    height, width = integer(40, 97), integer(40, 129)
    masks, boxes, classes = [], [], []
    for _ in range(integer(1, 7)):
        x0, y0 = integer(0, width - 2), integer(0, height - 2)
        x1, y1 = min(x0 + integer(1, 90), width), min(y0 + integer(1, 90), height)
        mask = rectangle(height, width, x0, y0, x1, y1)
        masks.append(mask & (torch.rand(height, width, generator=generator) > 0.3))
        boxes.append([x0, y0, x1, y1])
        classes.append(integer(0, 3))
    return instances_of(torch.stack(masks), boxes, classes)


def test_targets_of_random_images_against_the_loop(make_model):
    model = make_model(kind="vanilla")
    generator = torch.Generator().manual_seed(2)
    contested = 0
    for _ in range(12):
        truths = [random_truth(generator) for _ in range(5)]
        images = ImageList(torch.zeros(5, 3, 96, 128), [t.image_size for t in truths])
        raw = raw_outputs(model.head, (96, 128), 3, images=5)
        targets = model.targets(raw, images, truths)
        wanted = iter(model.head.mask_pairs(raw, targets)[1])
        for truth, target in zip(truths, targets, strict=True):
            levels = loop_targets(truth, (96, 128), model.grid, 3)
            assert torch.equal(target.labels, torch.cat([x.flatten() for x, _ in levels]))
            for _, planes in levels:
                if planes:
                    expected = torch.stack([planes[cell] for cell in sorted(planes)])
                    assert torch.equal(next(wanted), expected)
            assert target.num_positive == sum(len(planes) for _, planes in levels)
            contested += len(target.cells) - int(target.num_positive)
        assert next(wanted, None) is None
    assert contested > 100


def test_the_last_instance_owns_a_contested_cell(make_model, published_grid, kind):
    model = make_model(kind=kind, grid=published_grid, num_classes=80)
    masks = [rectangle(256, 256, 64, 64, 192, 128), rectangle(256, 256, 80, 72, 176, 120)]
    boxes = [[64, 64, 192, 128], [80, 72, 176, 120]]
    truth = instances_of(torch.stack(masks), boxes, [7, 9])
    raw = raw_outputs(model.head, (256, 256), 80)
    images = ImageList(torch.zeros(1, 3, 256, 256), [(256, 256)])
    targets = model.targets(raw, images, [truth])
    probs, wanted = model.head.mask_pairs(raw, targets)
    assert [p.shape for p in probs] == [w.shape for w in wanted] == [(9, 64, 64)] * 2
    assert wanted[0].flatten(1).sum(dim=1).tolist() == [512] * 3 + [288] * 6
    assert wanted[1].flatten(1).sum(dim=1).tolist() == [288] * 9


# --- inference -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "row", "column"), [(0, 2, 7), (2, 5, 0), (4, 1, 1)])
def test_only_its_cell_detects_the_mask_of_a_channel(make_model, kind, level, row, column):
    model = make_model(kind=kind).eval()
    set_cell(model.head, level, row, column, weight=0, bias=10)
    raw = raw_outputs(model.head, (64, 64), 3, category=1.0)  # all cells are candidates
    found = model.detections(raw)[0]
    start = sum(s * s for s in model.grid.num_grids[:level])
    cell = start + row * model.grid.num_grids[level] + column
    assert found.cells.tolist() == [cell] * 3
    assert sorted(found.classes.tolist()) == [0, 1, 2]
    assert (found.probs(slice(0, 3)) > 0.99).all()


@pytest.mark.parametrize(
    ("image_hw", "padded_hw", "original_hw", "level", "least"),
    [
        ((300, 400), (320, 416), (487, 649), 1, 0.98),
        ((300, 400), (320, 416), (211, 282), 0, 0.98),
        ((48, 40), (64, 64), (48, 40), 0, 0.85),
    ],
)
def test_round_trip_of_a_known_mask(
    make_model, kind, image_hw, padded_hw, original_hw, level, least
):
    """A mask given as logits of +-10 comes back in its place, whatever padding and resize."""
    model = make_model(kind=kind).eval()
    set_cell(model.head, level, 3, 2, weight=20, bias=-10)
    ys, xs = torch.meshgrid(
        torch.arange(image_hw[0]) + 0.5, torch.arange(image_hw[1]) + 0.5, indexing="ij"
    )
    inside = ((ys / image_hw[0] - 0.5) ** 2 + (xs / image_hw[1] - 0.55) ** 2) < 0.4**2
    full = torch.zeros(padded_hw)
    full[: image_hw[0], : image_hw[1]] = inside.float()
    raw = raw_outputs(model.head, padded_hw, 3)
    for tower in raw.mask_towers[level]:
        tower[0, 0] = F.avg_pool2d(full[None, None], 8)[0, 0]
    raw.category_logits[level][0, 2, 3, 2] = 5.0
    images = ImageList(torch.zeros(1, 3, *padded_hw), [image_hw])
    given = [{"height": original_hw[0], "width": original_hw[1]}]
    result = model.inference(raw, images, given)[0]
    assert result.pred_classes.tolist() == [2]
    expected = F.interpolate(inside[None, None].float(), original_hw, mode="bilinear")[0, 0] > 0.5
    mask = result.pred_masks[0]
    assert (mask & expected).sum() / (mask | expected).sum() > least


def every_mask(head, raw):
    """Return the (C, Hm, Wm) masks of all cells of the first image, cell by cell."""
    size = tuple(2 * side for side in raw.mask_towers[0][0].shape[-2:])
    masks = []
    for level, side in enumerate(head.num_grids):
        towers = [
            F.interpolate(x[:1], scale_factor=2, mode="bilinear") for x in raw.mask_towers[level]
        ]
        if hasattr(head, "mask_pred"):
            maps = [head.mask_pred[level](towers[0])]
        else:
            maps = [head.mask_pred_x[level](towers[0]), head.mask_pred_y[level](towers[-1])]
        maps = [F.interpolate(x.sigmoid(), size, mode="bilinear")[0] for x in maps]
        for i in range(side):
            for j in range(side):
                vanilla = len(maps) == 1
                masks.append(maps[0][i * side + j] if vanilla else maps[0][j] * maps[1][i])
    return torch.stack(masks)


def peaks(logits):
    """Return (C, K) scores, 0 where the cell above, to the left or between them scores higher."""
    rows = []
    for level in logits:
        scores = level[0].sigmoid()
        for i in range(scores.shape[1]):
            for j in range(scores.shape[2]):
                window = scores[:, max(i - 1, 0) : i + 1, max(j - 1, 0) : j + 1]
                best = window.flatten(1).amax(dim=1)
                rows.append(torch.where(scores[:, i, j] == best, scores[:, i, j], 0.0))
    return torch.stack(rows)


def test_detections_against_the_loop(make_model, kind):
    """Candidate by candidate, from the masks of all cells."""
    torch.manual_seed(6)
    options = {"nms_pre": 60, "max_detections": 20}
    model = make_model(kind=kind, **options).eval()
    for parameter in model.head.level_parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    raw = raw_outputs(model.head, (64, 96), 3, towers=torch.randn)
    raw = raw._replace(category_logits=[torch.randn_like(x) * 2 - 2 for x in raw.category_logits])
    with torch.no_grad():
        masks, scores = every_mask(model.head, raw), peaks(raw.category_logits)
        found = model.detections(raw)[0]
        model.mask_budget_mb = 1e-3  # mask by mask
        piecewise = model.detections(raw)[0]
    strides = (8, 8, 16, 32, 32)
    areas = torch.cat(
        [torch.full((s * s,), t) for s, t in zip(model.grid.num_grids, strides, strict=True)]
    )
    expected = loop_oracle(scores, masks, areas, InferenceOptions(**options))
    assert len(expected) == 20
    assert found.cells.tolist() == [row[2] for row in expected]
    assert found.classes.tolist() == [row[1] for row in expected]
    torch.testing.assert_close(found.scores, torch.tensor([row[0] for row in expected]))
    torch.testing.assert_close(found.probs(slice(0, 20)), masks[found.cells], rtol=1e-4, atol=1e-5)
    assert torch.equal(piecewise.cells, found.cells)
    torch.testing.assert_close(piecewise.scores, found.scores)


@pytest.mark.parametrize(("level", "area"), enumerate((8, 8, 16, 32, 32)))
def test_a_mask_must_cover_more_than_its_levels_stride(make_model, kind, monkeypatch, level, area):
    model = make_model(kind=kind).eval()
    raw = raw_outputs(model.head, (64, 64), 3)
    side = model.grid.num_grids[level]
    cells = sum(s * s for s in model.grid.num_grids[:level]) + torch.tensor([0, side * side - 1])
    for row, column in ((0, 0), (side - 1, side - 1)):
        raw.category_logits[level][0, 1, row, column] = 5.0
    masks = torch.zeros(model.grid.num_cells, 16 * 16)
    masks[cells[0], :area] = masks[cells[1], 64 : 64 + area + 1] = 1.0

    def source(raw, image, asked):
        assert asked.tolist() == cells.tolist()
        return MaskTable(masks.unflatten(1, (16, 16)))

    monkeypatch.setattr(model.head, "mask_source", source)
    assert model.detections(raw)[0].cells.tolist() == [cells[1].item()]


# --- degenerate inputs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "positive"),
    [
        ([(48, 64, [(8, 8, 40, 36, 1), (63, 47, 64, 48, 0)]), (64, 40, [(0, 0, 40, 64, 2)])], True),
        ([(48, 64, []), (64, 64, [(8, 8, 40, 36, 1)])], True),
        ([(48, 64, []), (48, 48, [])], False),
    ],
    ids=["mixed sizes", "half-empty", "empty"],
)
def test_losses_are_finite_and_reach_every_parameter(
    make_model, make_sample, kind, batch, positive
):
    model = make_model(kind=kind).train()
    losses = model([make_sample(*spec) for spec in batch])
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert (0 < losses["loss_mask"].item() <= 3 + 1e-5) == positive
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_ground_truth_with_an_empty_mask_is_skipped(make_model, make_sample, kind):
    sample = make_sample(64, 64, [(8, 8, 40, 36, 1)])
    sample["instances"].gt_masks.tensor.zero_()
    losses = make_model(kind=kind).train()([sample])
    assert losses["loss_mask"].item() == 0
    assert losses["loss_cls"].isfinite()


@pytest.mark.parametrize("kind", ["solov2", *KINDS])
def test_no_detections_are_accepted_by_evaluation_and_drawing(make_model, make_sample, kind):
    samples = [make_sample(48, 64), make_sample(64, 40)]
    samples[0].update(height=101, width=130)
    results = make_model(kind=kind).eval()(samples)
    for result, size in zip(results, [(101, 130), (64, 40)], strict=True):
        instances = result["instances"]
        assert instances.pred_masks.shape == (0, *size)
        assert instances.pred_masks.dtype == torch.bool
        assert instances.pred_classes.dtype == torch.int64
        assert instances.pred_boxes.tensor.shape == (0, 4)
        assert instances_to_results(instances, 1, [1, 2, 3]) == []
        image = torch.zeros(*size, 3, dtype=torch.uint8).numpy()
        drawn = draw_instances(image, instances.pred_masks.numpy(), scores=instances.scores)
        assert not drawn.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["category_logits", "mask_towers"])
def test_outputs_that_are_not_finite_give_no_detections(make_model, kind, bad, where):
    model = make_model(kind=kind).eval()
    for parameter in model.head.level_parameters():
        if parameter.ndim == 1:
            torch.nn.init.constant_(parameter, 5.0)
    raw = raw_outputs(model.head, (64, 64), 3, category=5.0)
    assert len(model.detections(raw)[0].scores) > 0
    for entry in getattr(raw, where):
        for tensor in entry if where == "mask_towers" else [entry]:
            tensor.fill_(bad)
    assert len(model.detections(raw)[0].scores) == 0
