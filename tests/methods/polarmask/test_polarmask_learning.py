"""PolarMask learns: three shapes on unseen images, and four many-class images by heart."""

import pytest
from methods.learning import by_heart, three_shapes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]

CONFIG = "PolarMask/nuclei_polarmask_R_18_FPN"


def sized(side, width):
    """Return options for images of this size with objects of an eighth of it and more."""
    return [
        "INPUT.MIN_SIZE_TRAIN", (side,),
        "INPUT.MIN_SIZE_TEST", side,
        "MODEL.POLARMASK.WIDTH", width,
        "MODEL.POLARMASK.SIZE_RANGES", [side / 4, side / 2],
    ]  # fmt: skip


def test_three_shapes(tmp_path):
    metrics = three_shapes(CONFIG, tmp_path, [*sized(128, 128), "MODEL.POLARMASK.NUM_CLASSES", 3])
    assert metrics["AP50"] >= 60, metrics


def test_four_images_of_many_classes_by_heart(tmp_path):
    opts = [*sized(96, 64), "MODEL.POLARMASK.NUM_CLASSES", 12]
    right, swapped = by_heart(CONFIG, "polarmask", tmp_path, opts)
    assert right >= 90
    # Two of twelve classes are wrong: what the other ten give is left.
    assert swapped < right - 10
