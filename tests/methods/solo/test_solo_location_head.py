"""The heads of the first paper: names, counts, and chosen cells against all cells at once."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from methods.project import count
from methods.solo.toys import pyramid

import instseg_ext
from instseg_ext.layers.losses import dice_loss
from instseg_ext.methods.solo.grid_head import flatten_cells

KINDS = ("vanilla", "decoupled", "decoupled_light")


def every_level_map(head, raw):
    """Return per level the masks of all cells, (N, S^2, 2h, 2w), as the paper writes them."""
    levels = []
    for level, side in enumerate(head.num_grids):
        towers = [
            F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            for x in raw.mask_towers[level]
        ]
        if hasattr(head, "mask_pred"):
            levels.append(head.mask_pred[level](towers[0]).sigmoid())
        else:
            x = head.mask_pred_x[level](towers[0]).sigmoid()
            y = head.mask_pred_y[level](towers[-1]).sigmoid()
            # Cell i S + j: row i outside, column j inside.
            levels.append((y[:, :, None] * x[:, None]).flatten(1, 2))
            assert levels[-1].shape[1] == side * side
    return levels


@pytest.mark.parametrize(
    ("kind", "parameters", "keys"),
    [
        ("vanilla", 9_448_816, 54),
        ("decoupled", 13_176_144, 85),
        ("decoupled_light", 5_501_776, 46),
    ],
)
def test_shapes_and_parameter_counts(make_head, kind, parameters, keys):
    with torch.device("meta"):
        head = make_head(kind=kind)
        raw = head(pyramid(256, 384, 256))
    assert count(head) == parameters
    assert len(head.state_dict()) == keys
    sides = [40, 36, 24, 16, 12]
    assert [tuple(x.shape) for x in raw.category_logits] == [(1, 80, s, s) for s in sides]
    sizes = [(32, 48), (32, 48), (16, 24), (8, 12), (8, 12)]
    towers = 2 if kind == "decoupled" else 1
    for level, size in zip(raw.mask_towers, sizes, strict=True):
        assert [tuple(x.shape) for x in level] == [(1, 256, *size)] * towers
    assert head.map_size(raw) == (64, 96)
    assert head.target_sizes(raw) == {4: (64, 96), 8: (32, 48), 16: (16, 24)}


def test_only_the_mask_towers_see_coordinates(make_head):
    heads = {kind: make_head(kind=kind, dim=32, num_convs=1, width=32) for kind in KINDS}
    widths = {
        kind: {
            name: module[0].weight.shape[1]
            for name, module in head.named_children()
            if "tower" in name
        }
        for kind, head in heads.items()
    }
    assert widths == {
        "vanilla": {"category_tower": 32, "mask_tower": 34},
        "decoupled": {"category_tower": 32, "mask_tower_x": 33, "mask_tower_y": 33},
        "decoupled_light": {"category_tower": 32, "mask_tower": 34},
    }


def test_columns_see_x_and_rows_see_y(make_head):
    """With the features cut off, a tower's output varies along its own coordinate only."""
    head = make_head(kind="decoupled", dim=32, num_convs=1, width=32).eval()
    with torch.no_grad():
        raw = head({name: torch.zeros_like(x) for name, x in pyramid(64, 96, 32).items()})
    x, y = (tower[..., 2:-2, 2:-2] for tower in raw.mask_towers[0])
    torch.testing.assert_close(x, x[..., :1, :].expand_as(x))
    torch.testing.assert_close(y, y[..., :1].expand_as(y))
    assert (x[..., 0] != x[..., -1]).any()
    assert (y[..., 0, :] != y[..., -1, :]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_initial_state(make_head, kind):
    head = make_head(kind=kind, dim=32, num_convs=1, width=32)
    biases = [p for name, p in head.named_parameters() if "pred" in name and name.endswith("bias")]
    assert len(biases) == 1 + 5 * (1 if kind == "vanilla" else 2)
    for bias in biases:
        torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.01))
    weights = torch.cat([p.flatten() for n, p in head.named_parameters() if p.ndim == 4])
    assert 0.009 < weights.std() < 0.011


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_chosen_cells_are_those_of_the_full_maps(make_head, kind, memory_format):
    torch.manual_seed(3)
    head = make_head(kind=kind, dim=32, num_convs=1, width=32, num_classes=2).eval()
    for parameter in head.level_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    maps = pyramid(64, 96, 32, num=2)
    with torch.no_grad():
        raw = head({k: v.contiguous(memory_format=memory_format) for k, v in maps.items()})
        full = [
            torch.cat(
                [
                    F.interpolate(level[n : n + 1], (16, 24), mode="bilinear")[0]
                    for level in every_level_map(head, raw)
                ]
            )
            for n in range(2)
        ]
        if kind != "vanilla":
            # The reference resizes the factors before it multiplies: not the same on coarse levels.
            full = [masks[: 40 * 40 + 36 * 36] for masks in full]
        cells = torch.tensor([2895, 0, 1600, 41, 0, 1639])
        few = head.masks(raw, [cells, cells[:0]])
        everything = head.masks(raw)
    torch.testing.assert_close(few[0], full[0][cells], rtol=1e-4, atol=1e-5)
    assert few[1].shape == (0, 16, 24)
    for found, expected in zip(everything, full, strict=True):
        assert found.shape == (3872, 16, 24)
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_decoupled_factors_are_resized_before_the_product(make_head):
    torch.manual_seed(4)
    head = make_head(kind="decoupled", dim=32, num_convs=1, width=32, num_classes=2).eval()
    for parameter in head.level_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        raw = head(pyramid(64, 96, 32))
        x, y = (
            F.interpolate(
                predictor[3](F.interpolate(tower, scale_factor=2, mode="bilinear")).sigmoid(),
                (16, 24),
                mode="bilinear",
            )[0]
            for predictor, tower in zip(
                (head.mask_pred_x, head.mask_pred_y), raw.mask_towers[3], strict=True
            )
        )
        start = 40 * 40 + 36 * 36 + 24 * 24
        found = head.masks(raw, [torch.tensor([start + 5 * 16 + 9])])[0][0]
    torch.testing.assert_close(found, x[9] * y[5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_the_full_maps(make_model, make_sample, kind):
    """Only the channels of positive cells are computed; the others had no part in the loss."""
    torch.manual_seed(5)
    model = make_model(kind=kind).train()
    batch = [
        make_sample(64, 96, [(4, 4, 60, 40, 1), (10, 8, 50, 60, 0), (70, 8, 80, 20, 2)]),
        make_sample(64, 96, [(30, 20, 42, 40, 1)]),
    ]
    images = model.preprocess_image(batch)
    gt = [x["instances"] for x in batch]

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    raw = model.head(model.backbone(images.tensor))
    loss = model.losses(raw, images, gt)["loss_mask"]
    found = gradients(loss)

    raw = model.head(model.backbone(images.tensor))
    parts = []
    for n, target in enumerate(model.targets(raw, images, gt)):
        owners = target.winners.split([s * s for s in model.head.num_grids])
        for level, maps in enumerate(every_level_map(model.head, raw)):
            cells = (owners[level] >= 0).nonzero().squeeze(1)
            masks = target.masks[model.head.strides[level] // 2]
            parts.append(dice_loss(maps[n, cells], masks[owners[level][cells]]))
    expected_loss = torch.cat(parts).mean() * 3
    assert len(torch.cat(parts)) > 10
    expected = gradients(expected_loss)

    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_without_positives_have_zero_gradients(make_model, make_sample, kind):
    model = make_model(kind=kind).train()
    loss = model([make_sample(64, 64, [(2, 2, 9, 9, 0)])])
    sum(loss.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    idle = [p for p in model.head.level_parameters() if not p.grad.any()]
    busy = [p for p in model.head.level_parameters() if p.grad.any()]
    assert idle
    assert busy
    # Of a level's channels only those of its positive cells learn.
    rows = busy[0].grad.flatten(1).any(dim=1)
    assert 0 < rows.sum() < len(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_owns_its_channel(make_model, kind):
    """Channel i S + j (or column j and row i) switched on: only cell (i, j) has a mask."""
    model = make_model(kind=kind).eval()
    head, level, row, column = model.head, 1, 5, 2
    side = head.num_grids[level]
    with torch.no_grad():
        for parameter in head.level_parameters():
            parameter.zero_()
        off = [p for p in head.level_parameters() if p.ndim == 1]
        for bias in off:
            bias.fill_(-10)
        if kind == "vanilla":
            head.mask_pred[level].bias[row * side + column] = 10
        else:
            head.mask_pred_x[level].bias[column] = 10
            head.mask_pred_y[level].bias[row] = 10
        raw = head(model.backbone(torch.randn(1, 3, 64, 64)))
        masks = head.masks(raw)[0] > 0.5
    start = sum(s * s for s in head.num_grids[:level])
    assert masks.flatten(1).any(dim=1).nonzero().squeeze(1).tolist() == [
        start + row * side + column
    ]
    assert masks[start + row * side + column].all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_made_before_a_score_asks_for_it(make_model, kind, monkeypatch):
    """Categories first: without candidates the predictors never run; with some, only theirs do."""
    model = make_model(kind=kind, score_thresh=0.5).eval()
    asked = []
    original = type(model.head).mask_source

    def spy(head, raw, image, cells):
        asked.append(len(cells))
        return original(head, raw, image, cells)

    monkeypatch.setattr(type(model.head), "mask_source", spy)
    images = ImageList(torch.randn(1, 3, 64, 64), [(64, 64)])
    with torch.no_grad():
        raw = model.head(model.backbone(images.tensor))
        assert len(model.inference(raw, images, [{"height": 64, "width": 64}])[0]) == 0
        assert asked == []
        raw.category_logits[0][0, 1, 3, 4] = 5
        raw.category_logits[2][0, 0, 2, 2] = 5
        model.inference(raw, images, [{"height": 64, "width": 64}])
    assert asked == [2]


def test_by_level_splits_cells_and_keeps_their_places(make_head):
    head = make_head(kind="vanilla", dim=32, num_convs=1, width=32)
    cells = torch.tensor([3871, 5, 1600, 1599, 5])
    split = {level: (rows.tolist(), local.tolist()) for level, rows, local in head.by_level(cells)}
    assert split == {0: ([1, 3, 4], [5, 1599, 5]), 1: ([2], [0]), 4: ([0], [143])}
    assert list(head.by_level(cells[:0])) == []


def test_flattened_categories_and_masks_number_cells_alike(make_head):
    head = make_head(kind="vanilla", dim=32, num_convs=1, width=32, num_classes=2)
    raw = head(pyramid(64, 64, 32))
    scores = flatten_cells(raw.category_logits)
    assert scores.shape[1] == head.masks(raw)[0].shape[0] == 3872


def test_solo_refuses_what_only_solov2_has():
    cfg = instseg_ext.get_config(
        "SOLO/nuclei_solo_R_18_FPN",
        ["MODEL.DEVICE", "meta", "MODEL.SOLO.DEFORM.MASK_FEATURES", True],
    )
    with pytest.raises(ValueError, match=r"DEFORM\.MASK_FEATURES must be False for SOLO"):
        build_model(cfg)


def test_solo_refuses_strides_that_halve_to_odd_numbers():
    cfg = instseg_ext.get_config(
        "SOLO/nuclei_solo_R_18_FPN",
        ["MODEL.DEVICE", "meta", "MODEL.SOLO.STRIDES", [8, 10, 16, 32]],
    )
    with pytest.raises(ValueError, match=r"STRIDES must be multiples of 4 .* got 10"):
        build_model(cfg)
