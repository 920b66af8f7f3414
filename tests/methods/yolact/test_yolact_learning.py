"""YOLACT learns: three shapes on unseen images, and four many-class images by heart."""

import pytest
from methods.learning import by_heart, three_shapes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]

CONFIG = "YOLACT/nuclei_yolact_R_18"


def sized(side, width):
    """Return options for images of this size, with anchors from an eighth of it upwards."""
    scales = [[side * base * step for step in (1.0, 1.26, 1.59)] for base in (1 / 8, 1 / 4, 1 / 2)]
    return [
        "INSTSEG.STRETCH", [side, side],
        "MODEL.YOLACT.WIDTH", width,
        "MODEL.YOLACT.IN_FEATURES", ["p3", "p4", "p5"],
        "MODEL.YOLACT.ANCHOR_SCALES", scales,
    ]  # fmt: skip


@pytest.mark.parametrize("scoring", [False, True], ids=["YOLACT", "YOLACT++"])
def test_three_shapes(scoring, tmp_path):
    opts = [*sized(128, 128), "MODEL.YOLACT.NUM_CLASSES", 3]
    opts += ["MODEL.YOLACT.MASK_IOU.ENABLED", scoring]
    metrics = three_shapes(CONFIG, tmp_path, opts)
    assert metrics["AP50"] >= 60, metrics


def test_four_images_of_many_classes_by_heart(tmp_path):
    opts = [*sized(96, 64), "MODEL.YOLACT.NUM_CLASSES", 12]
    right, swapped = by_heart(CONFIG, "yolact", tmp_path, opts)
    assert right >= 90
    # Two of twelve classes are wrong: what the other ten give is left.
    assert swapped < right - 10
