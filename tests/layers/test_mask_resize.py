"""The windowed mask path against the plain chain of resizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg_ext.layers.mask_resize import ThresholdedResize, axis_map, exact_float32_matmul

CHAINS = {
    "two-stage": [("resize", (64, 96)), ("crop", (60, 83)), ("resize", (47, 71))],
    "one-stage": [("resize", (61, 97))],
    "shrink": [("resize", (5, 7))],
    "large": [("resize", (64, 96)), ("crop", (64, 95)), ("resize", (530, 311))],
    "one axis only": [("resize", (16, 50))],
    "crop last": [("resize", (50, 70)), ("crop", (33, 41))],
}


def values(probs, steps):
    for kind, (height, width) in steps:
        if kind == "crop":
            probs = probs[:, :height, :width]
        else:
            probs = F.interpolate(
                probs[:, None], (height, width), mode="bilinear", align_corners=False
            )[:, 0]
    return probs


def build(low_hw, steps, threshold):
    maps = [axis_map(low_hw[k], tuple((kind, size[k]) for kind, size in steps)) for k in (0, 1)]
    num = sum(kind == "resize" for kind, _ in steps)
    return ThresholdedResize(*maps, num_resizes=num, threshold=threshold)


def check(low_hw, steps, threshold, probs):
    """Compare with the plain chain; return how many pixels are too close to tell."""
    resize, plain = build(low_hw, steps, threshold), values(probs, steps)
    masks = torch.ones(plain.shape, dtype=torch.bool)
    resize(probs, masks)
    close = (plain - threshold).abs() <= 2 * resize.tolerance
    assert 2 * resize.tolerance < 1e-5 * threshold
    assert not ((masks != (plain > threshold)) & ~close).any()
    assert not (masks & (plain < threshold)).any()
    return int(close.sum())


def smooth_maps(num, height, width, seed):
    """Blobs anywhere, cut by all borders, plus pure noise, one pixel, nothing, everything."""
    gen = torch.Generator().manual_seed(seed)
    noise = torch.rand(num, 1, 3, 3, generator=gen)
    probs = F.interpolate(noise, (height, width), mode="bicubic", align_corners=False)[:, 0]
    probs = probs.clamp(0, 1)
    probs[0] = 0
    probs[1] = 0.99
    probs[2] = torch.rand(height, width, generator=gen)
    probs[3] = 0
    probs[3, torch.randint(height, (), generator=gen), width - 1] = 1
    probs[4] = 0
    probs[4, 0, torch.randint(width, (), generator=gen)] = 1
    return probs


@pytest.mark.parametrize("steps", CHAINS.values(), ids=CHAINS)
def test_equals_the_plain_chain(steps):
    for seed, threshold in enumerate([0.5, 0.3, 0.9]):
        probs = smooth_maps(24, 16, 24, seed)
        close = check((16, 24), steps, threshold, probs)
        assert close < 1e-4 * values(probs, steps).numel(), "nearly all pixels must be compared"


@settings(max_examples=40, deadline=None)
@given(
    low=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    mid=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    keep=st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)),
    out=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    seed=st.integers(0, 99),
)
def test_any_sizes(low, mid, keep, out, seed):
    crop = tuple(max(1, int(m * k)) for m, k in zip(mid, keep, strict=True))
    steps = [("resize", mid), ("crop", crop), ("resize", out)]
    probs = smooth_maps(8, *low, seed)
    check(low, steps, 0.5, probs)


@pytest.mark.parametrize("steps", CHAINS.values(), ids=CHAINS)
def test_values_at_the_threshold_are_not_above_it(steps):
    probs = torch.full((2, 16, 24), 0.5)
    probs[1, 4:9, 4:9] = 0.7
    resize = build((16, 24), steps, 0.5)
    masks = torch.ones(values(probs, steps).shape, dtype=torch.bool)
    resize(probs, masks)
    assert not masks[0].any()
    assert torch.equal(masks[1], values(probs[1:], steps)[0] > 0.5 + resize.tolerance)


def test_crisp_masks():
    # 0/1 maps put the exact value one half on whole edges
    probs = (smooth_maps(12, 16, 24, 5) > 0.5).float()
    for steps in CHAINS.values():
        check((16, 24), steps, 0.5, probs)


def test_axis_map_is_the_chain():
    steps = (("resize", 37), ("crop", 31), ("resize", 52))
    mapped = axis_map(9, steps)
    signal = torch.rand(1, 1, 9, 1)
    value = F.interpolate(signal, (37, 1), mode="bilinear", align_corners=False)[:, :, :31]
    value = F.interpolate(value, (52, 1), mode="bilinear", align_corners=False)
    assert torch.allclose(mapped.weights @ signal[0, 0], value[0, 0], atol=1e-6)
    for line in range(52):
        low, high = mapped.band(line, line + 1)
        rest = mapped.weights[line].clone()
        rest[low:high] = 0
        assert not rest.any()


@pytest.mark.parametrize("length", [5000, 4096, 1333])
def test_long_axes_keep_the_rounding_of_the_coordinates(length):
    mapped = axis_map(333, (("resize", length),))
    expected = F.interpolate(
        torch.eye(333)[None, None], (length, 333), mode="bilinear", align_corners=False
    )
    assert torch.equal(mapped.weights, expected[0, 0])


def test_not_applicable_where_the_bound_does_not_hold():
    probs = torch.rand(2, 4, 4)
    assert ThresholdedResize.applicable(probs, 1, 0.5)
    assert not ThresholdedResize.applicable(probs - 1, 1, 0.5)
    assert not ThresholdedResize.applicable(probs, 0, 0.5)
    assert not ThresholdedResize.applicable(probs, 4, 0.5)
    assert not ThresholdedResize.applicable(probs, 1, 0.0)
    assert not ThresholdedResize.applicable(torch.full_like(probs, torch.nan), 1, 0.5)
    assert not ThresholdedResize.applicable(torch.full_like(probs, torch.inf), 1, 0.5)
    assert axis_map(10000, (("resize", 20000),)) is None


def test_reduced_precision_products_are_noticed():
    assert exact_float32_matmul()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not exact_float32_matmul()
    finally:
        torch.set_float32_matmul_precision("highest")
