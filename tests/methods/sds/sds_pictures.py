"""Pictures of three flat shapes, whose regions are easy to find."""

import numpy as np

SIZE = (80, 104)


def shapes_image(seed=0):
    """Three flat shapes on a flat ground, with noise of 8 grey levels: picture and masks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    masks = np.stack(
        [
            (y - 24) ** 2 + (x - 28) ** 2 < 15**2,
            (np.abs(y - 55) < 14) & (np.abs(x - 76) < 20),
            (y > 48) & (y < 74) & (np.abs(x - 26) < (y - 46) * 0.6),
        ]
    )
    image = np.full((*SIZE, 3), (90, 100, 110), dtype=np.float64)
    for mask, colour in zip(masks, ((200, 60, 60), (60, 170, 80), (40, 60, 190)), strict=True):
        image[mask] = colour
    image += rng.normal(0, 8, image.shape)
    return image.clip(0, 255).astype(np.uint8), masks
