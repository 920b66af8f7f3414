"""Points NMS and Matrix NMS against hand-computed cases and plain loops."""

import math

import pytest
import torch

from instseg_ext.layers.mask_nms import mask_intersections, matrix_nms, points_nms


def strip(*spans, length=12):
    masks = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        masks[row, start:stop] = True
    return masks


def matrix_nms_loop(masks, labels, scores, kernel, sigma):
    """Oracle: the formula of the paper written with loops over the pairs a < b."""
    n = len(scores)
    iou = [[0.0] * n for _ in range(n)]
    for a in range(n):
        for b in range(a + 1, n):
            if labels[a] == labels[b]:
                inter = (masks[a] & masks[b]).sum().item()
                union = (masks[a] | masks[b]).sum().item()
                iou[a][b] = inter / union if union else 0.0
    out = []
    for b in range(n):
        decay = 1.0
        for a in range(b):
            comp = max((iou[k][a] for k in range(a)), default=0.0)
            if kernel == "gaussian":
                ratio = math.exp(-sigma * iou[a][b] ** 2) / math.exp(-sigma * comp**2)
            else:
                ratio = (1 - iou[a][b]) / max(1 - comp, 1e-6)
            decay = min(decay, ratio)
        out.append(float(scores[b]) * decay)
    return torch.tensor(out)


def points_nms_loop(scores):
    out = torch.zeros_like(scores)
    height, width = scores.shape[-2:]
    for i in range(height):
        for j in range(width):
            window = scores[..., max(i - 1, 0) : i + 1, max(j - 1, 0) : j + 1]
            best = window.amax(dim=(-1, -2))
            here = scores[..., i, j]
            out[..., i, j] = torch.where(here == best, here, torch.zeros_like(here))
    return out


def test_points_nms_hand_case():
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.4, 0.9, 0.2], [0.6, 0.7, 0.8]])[None, None]
    expected = torch.tensor([[0.1, 0.5, 0.0], [0.4, 0.9, 0.0], [0.6, 0.0, 0.0]])
    assert torch.equal(points_nms(scores)[0, 0], expected)


def test_points_nms_against_loop_and_ties():
    scores = torch.rand(2, 3, 6, 5)
    assert torch.equal(points_nms(scores), points_nms_loop(scores))
    flat = torch.full((1, 1, 4, 4), 0.3)
    assert torch.equal(points_nms(flat), flat)


@pytest.mark.parametrize(
    ("spans", "kernel", "expected"),
    [
        (((0, 8), (0, 6), (2, 8)), "gaussian", (0.9, 0.2597, 0.2273)),
        (((0, 8), (0, 6), (2, 8)), "linear", (0.9, 0.2, 0.175)),
        (((0, 6), (2, 8), (6, 12)), "gaussian", (0.9, 0.4852, 0.7)),
        (((0, 6), (0, 6), (0, 6)), "gaussian", (0.9, 0.1083, 0.0947)),
        (((0, 6), (0, 6), (0, 6)), "linear", (0.9, 0.0, 0.0)),
    ],
)
def test_matrix_nms_hand_cases(spans, kernel, expected):
    scores = torch.tensor([0.9, 0.8, 0.7])
    out = matrix_nms(strip(*spans), torch.zeros(3, dtype=torch.long), scores, kernel=kernel)
    torch.testing.assert_close(out, torch.tensor(expected), atol=1e-4, rtol=0)


def test_matrix_nms_leaves_other_classes_alone():
    scores = torch.tensor([0.9, 0.8, 0.7])
    out = matrix_nms(strip((0, 6), (0, 6), (0, 6)), torch.arange(3), scores)
    assert torch.equal(out, scores)


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("budget_mb", [256, 1e-4])
def test_matrix_nms_against_loop(kernel, budget_mb):
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(20, 6, 7, generator=generator) > 0.5
    labels = torch.randint(0, 3, (20,), generator=generator)
    scores = torch.rand(20, generator=generator).sort(descending=True).values
    out = matrix_nms(masks, labels, scores, kernel=kernel, sigma=2.0, budget_mb=budget_mb)
    torch.testing.assert_close(out, matrix_nms_loop(masks, labels, scores, kernel, 2.0))
    given = matrix_nms(masks, labels, scores, areas=masks.flatten(1).sum(1), kernel=kernel)
    torch.testing.assert_close(given, out)


def test_intersections_are_exact_counts():
    masks = torch.rand(9, 50) > 0.4
    labels = torch.tensor([0, 1, 0, 1, 0, 2, 2, 0, 1])
    expected = torch.zeros(9, 9)
    for a in range(9):
        for b in range(9):
            if labels[a] == labels[b]:
                expected[a, b] = (masks[a] & masks[b]).sum()
    assert torch.equal(mask_intersections(masks, labels), expected)
    assert torch.equal(mask_intersections(masks, labels, budget_mb=1e-5), expected)


def test_matrix_nms_empty_and_unknown_kernel():
    empty = matrix_nms(torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0).long(), torch.zeros(0))
    assert empty.shape == (0,)
    with pytest.raises(ValueError, match="gaussian"):
        matrix_nms(strip((0, 1)), torch.zeros(1).long(), torch.ones(1), kernel="box")
