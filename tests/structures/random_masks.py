"""Random masks of all kinds that real ones come in, for oracles to look at."""

import numpy as np

HEIGHT, WIDTH = 36, 44


def blob(rng):
    """Smoothed noise above a threshold: several parts, holes, touching borders."""
    noise = rng.standard_normal((HEIGHT // 4 + 1, WIDTH // 4 + 1)).repeat(4, 0).repeat(4, 1)
    noise = noise[:HEIGHT, :WIDTH]
    for axis in (0, 1):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
    return noise > np.quantile(noise, rng.uniform(0.5, 0.97))


def ellipse(rng, scale=1.0):
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    cy, cx = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
    ry, rx = rng.uniform(1, 16, size=2) * scale
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def ring(rng):
    """One that the border may cut; with a small hole its inner contour is nearly as large."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(y - rng.integers(0, HEIGHT), x - rng.integers(0, WIDTH))
    outer = rng.uniform(3, 16)
    return (distance <= outer) & (distance >= outer - rng.uniform(1, 4))


def parts(rng):
    return ellipse(rng, 0.5) | ellipse(rng, 0.5) | ellipse(rng, 0.3)


def line(rng):
    """One pixel wide, straight or diagonal, perhaps a single pixel."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    length = rng.integers(1, 20)
    y, x = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
    step_y, step_x = rng.integers(0, 2), rng.integers(-1, 2)
    for k in range(length):
        if 0 <= y + k * step_y < HEIGHT and 0 <= x + k * step_x < WIDTH:
            mask[y + k * step_y, x + k * step_x] = True
    return mask


def rectangle(rng):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    y, x = rng.integers(-4, HEIGHT - 1), rng.integers(-4, WIDTH - 1)
    height, width = rng.integers(5, 30, size=2)
    mask[max(y, 0) : y + height, max(x, 0) : x + width] = True
    return mask


KINDS = (blob, ellipse, ring, parts, line, rectangle)


def random_masks(num, seed=0):
    """(num, HEIGHT, WIDTH) bool; every kind comes equally often; a few masks are empty."""
    rng = np.random.default_rng(seed)
    return np.stack([KINDS[k % len(KINDS)](rng) for k in range(num)])
