"""Inference steps: thresholds and their edges, cell order, geometry, a plain-loop oracle."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from methods.solo.toys import MaskTable

from instseg_ext.layers import mask_nms
from instseg_ext.methods.solo import inference
from instseg_ext.methods.solo.head import SOLOv2Outputs
from instseg_ext.methods.solo.inference import InferenceOptions, category_scores, detect


def run(scores, masks, *, area=8.0, budget_mb=256, **options):
    """Detect with a table of masks (C, h, w) and scores (C, K)."""
    return detect(
        scores,
        lambda _: MaskTable(masks),
        min_areas=torch.full((len(masks),), area),
        size_hw=tuple(masks.shape[-2:]),
        options=InferenceOptions(**options),
        budget_mb=budget_mb,
    )


def disjoint(number, pixels=9, prob=1.0):
    """Return masks of ``pixels`` pixels that do not touch each other."""
    masks = torch.zeros(number, number, pixels)
    masks[torch.arange(number), torch.arange(number)] = prob
    return masks


def loop_oracle(scores, masks, min_areas, options):
    """Steps 3 to 9 with loops; returns (score, class, cell) rows."""
    rows = []
    for cell in range(scores.shape[0]):
        for k in range(scores.shape[1]):
            if not scores[cell, k] > options.score_thresh:
                continue
            inside = masks[cell] > options.mask_thresh
            if inside.sum() > min_areas[cell]:
                rows.append([(scores[cell, k] * masks[cell][inside].mean()).item(), k, cell])
    rows.sort(key=lambda r: -r[0])
    rows = rows[: options.nms_pre]

    def iou(a, b):
        first, second = (masks[r[2]] > options.mask_thresh for r in (a, b))
        return ((first & second).sum() / (first | second).sum()).item() if a[1] == b[1] else 0.0

    decayed = []
    for b, row in enumerate(rows):
        decay = 1.0
        for a in range(b):
            comp = max((iou(rows[k], rows[a]) for k in range(a)), default=0.0)
            ratio = math.exp(-options.nms_sigma * (iou(rows[a], row) ** 2 - comp**2))
            decay = min(decay, ratio)
        decayed.append([row[0] * decay, *row[1:]])
    decayed = [r for r in decayed if r[0] >= options.update_thresh]
    decayed.sort(key=lambda r: -r[0])
    return decayed[: options.max_detections]


@pytest.mark.parametrize("budget_mb", [256, 1e-3])
def test_against_loop(budget_mb):
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(30, 3, generator=generator) * (torch.rand(30, 3, generator=generator) > 0.4)
    masks = F.interpolate(torch.rand(30, 1, 3, 3, generator=generator), (12, 12), mode="bilinear")
    min_areas = torch.full((30,), 20.0)
    options = InferenceOptions(nms_pre=35, max_detections=12)
    found = detect(
        scores,
        lambda _: MaskTable(masks[:, 0]),
        min_areas=min_areas,
        size_hw=(12, 12),
        options=options,
        budget_mb=budget_mb,
    )
    expected = loop_oracle(scores, masks[:, 0], min_areas, options)
    assert len(expected) == 12
    assert found.classes.tolist() == [r[1] for r in expected]
    assert found.cells.tolist() == [r[2] for r in expected]
    torch.testing.assert_close(found.scores, torch.tensor([r[0] for r in expected]))
    torch.testing.assert_close(found.probs(slice(2, 5)), masks[found.cells[2:5], 0])


def test_score_threshold_is_strict():
    scores = torch.tensor([[0.1], [0.1 + 1e-6]])
    assert run(scores, disjoint(2)).cells.tolist() == [1]


def test_area_threshold_is_strict_and_per_cell():
    masks = disjoint(2)
    masks[0, 0, 0] = 0
    found = run(torch.full((2, 1), 0.9), masks)
    assert found.cells.tolist() == [1]


def test_update_threshold_is_inclusive():
    # 0.5 * 0.75 is exact, and so is a score equal to the float nearest to the threshold.
    half = run(torch.tensor([[0.5]]), disjoint(1, prob=0.75), update_thresh=0.375)
    assert len(half.scores) == 1
    exact = run(torch.tensor([[0.05], [0.0499]]), disjoint(2), score_thresh=0.01)
    assert exact.cells.tolist() == [0]


def test_limits_before_and_after_nms(monkeypatch):
    seen = []

    def spy(masks, *args, **kwargs):
        seen.append(len(masks))
        return mask_nms.matrix_nms(masks, *args, **kwargs)

    monkeypatch.setattr(inference, "matrix_nms", spy)
    found = run(torch.linspace(0.2, 0.9, 600)[:, None], disjoint(600))
    assert seen == [500]
    assert len(found.scores) == 100
    assert found.cells.tolist() == list(range(599, 499, -1))
    assert (found.scores.diff() <= 0).all()


def test_one_cell_may_give_several_classes():
    found = run(torch.tensor([[0.9, 0.0, 0.8]]), disjoint(1))
    assert found.classes.tolist() == [0, 2]
    assert found.cells.tolist() == [0, 0]
    assert found.probs(slice(0, 2)).shape == (2, 1, 9)


def test_low_scores_and_small_masks_give_nothing():
    for scores, masks in (
        (torch.full((3, 2), 0.05), disjoint(3)),
        (torch.full((3, 2), 0.9), disjoint(3, pixels=4)),
    ):
        found = run(scores, masks)
        assert found.scores.shape == found.classes.shape == found.cells.shape == (0,)
        assert found.classes.dtype == torch.int64
        assert found.probs(slice(0, 10)).shape == (0, *masks.shape[1:])


def test_category_scores_keep_peaks_and_zero_what_is_not_finite():
    level = torch.full((1, 1, 3, 3), -5.0)
    level[0, 0, 1, 1], level[0, 0, 2, 2], level[0, 0, 0, 0] = 3.0, 2.0, math.nan
    level[0, 0, 0, 2] = math.inf
    scores = category_scores([level, torch.zeros(1, 1, 1, 1)])
    assert scores.shape == (1, 10, 1)
    flat = scores.flatten()
    assert flat[4].item() == pytest.approx(torch.tensor(3.0).sigmoid().item())
    assert flat[[0, 2, 8]].tolist() == [0, 0, 0]
    assert flat[9].item() == 0.5


def by_hand(model, hw, fill=-10.0):
    """Return raw outputs for hand-written features: score 0 everywhere, kernels 0."""
    sides = model.grid.num_grids
    return SOLOv2Outputs(
        [torch.full((1, model.num_classes, s, s), fill) for s in sides],
        [torch.zeros(1, 2, s, s) for s in sides],
        torch.zeros(1, 2, hw[0] // 4, hw[1] // 4),
    )


@pytest.mark.parametrize(("level", "row", "column"), [(0, 2, 7), (2, 5, 0), (4, 1, 1)])
def test_kernel_of_a_cell_makes_its_mask(make_model, level, row, column):
    model = make_model().eval()
    raw = by_hand(model, (64, 64))
    raw.mask_features.fill_(1.0)
    for kernel in raw.kernels:
        kernel.fill_(-5.0)
    raw.kernels[level][0, :, row, column] = 5.0
    for k in range(model.num_classes):
        raw.category_logits[level][0, k].fill_(1.0)  # all cells of the level are candidates
    raw.category_logits[level][0, 1, row, column] = 5.0
    found = model.detections(raw)[0]
    side = model.grid.num_grids[level]
    start = sum(s * s for s in model.grid.num_grids[:level])
    assert set(found.cells.tolist()) == {start + row * side + column}
    assert found.classes[0].item() == 1
    assert (found.probs(slice(0, 1)) > 0.99).all()


@pytest.mark.parametrize(
    ("image_hw", "padded_hw", "original_hw"),
    [
        ((150, 200), (160, 224), (243, 333)),
        ((48, 40), (64, 64), (48, 40)),
        ((64, 64), (64, 64), (31, 47)),
    ],
)
def test_round_trip_of_a_known_mask(make_model, image_hw, padded_hw, original_hw):
    """Kernel (20, -10) on features (mask, 1) gives logits +-10 of a known mask."""
    model = make_model().eval()
    raw = by_hand(model, padded_hw)
    ys, xs = torch.meshgrid(
        torch.arange(image_hw[0]) + 0.5, torch.arange(image_hw[1]) + 0.5, indexing="ij"
    )
    inside = ((ys / image_hw[0] - 0.5) ** 2 + (xs / image_hw[1] - 0.55) ** 2) < 0.4**2
    full = torch.zeros(padded_hw)
    full[: image_hw[0], : image_hw[1]] = inside.float()
    raw.mask_features[0, 0] = F.avg_pool2d(full[None, None], 4)[0, 0]
    raw.mask_features[0, 1] = 1.0
    raw.kernels[1][0, :, 3, 3] = torch.tensor([20.0, -10.0])
    raw.category_logits[1][0, 2, 3, 3] = 5.0
    images = ImageList(torch.zeros(1, 3, *padded_hw), [image_hw])
    given = [{"height": original_hw[0], "width": original_hw[1]}]
    result = model.inference(raw, images, given)[0]
    assert result.image_size == original_hw
    assert result.pred_classes.tolist() == [2]
    expected = F.interpolate(inside[None, None].float(), original_hw, mode="bilinear")[0, 0] > 0.5
    mask = result.pred_masks[0]
    iou = ((mask & expected).sum() / (mask | expected).sum()).item()
    assert iou > (0.98 if image_hw[0] > 100 else 0.93)
    ys, xs = mask.nonzero(as_tuple=True)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert result.pred_boxes.tensor[0].tolist() == [float(v) for v in box]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["category_logits", "kernels", "mask_features"])
def test_outputs_that_are_not_finite_give_no_detections(make_model, bad, where):
    model = make_model().eval()
    raw = by_hand(model, (64, 64), fill=5.0)
    raw.mask_features.fill_(1.0)
    for kernel in raw.kernels:
        kernel.fill_(1.0)
    assert len(model.detections(raw)[0].scores) > 0
    for tensor in raw.category_logits + raw.kernels if where != "mask_features" else []:
        if (tensor.shape[1] == 3) == (where == "category_logits"):
            tensor.fill_(bad)
    if where == "mask_features":
        raw.mask_features.fill_(abs(bad))
    assert len(model.detections(raw)[0].scores) == 0


def test_unknown_kernel_names_the_key():
    with pytest.raises(ValueError, match=r"MODEL\.SOLO\.NMS_KERNEL"):
        InferenceOptions(nms_kernel="box")
