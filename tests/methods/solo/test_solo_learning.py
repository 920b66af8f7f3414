"""Every variant learns: three shapes on unseen images, and four many-class images by heart."""

import pytest
from methods.learning import by_heart, three_shapes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]

FOUR_LEVELS = ["MODEL.SOLO.NUM_GRIDS", [20, 14, 6, 3]]
GRIDS = {
    "solov2": ["MODEL.SOLO.NUM_GRIDS", [20, 14], "MODEL.SOLO.KERNEL_DIM", 32],
    "solo": FOUR_LEVELS,
    "decoupled_solo": FOUR_LEVELS,
    "decoupled_solo_light": FOUR_LEVELS,
}
# A channel of vanilla SOLO learns from the objects of one cell alone: it needs coarser grids and
# more images to learn.
SHAPES = {
    "solo": ["MODEL.SOLO.NUM_GRIDS", [10, 8, 5, 3], "SOLVER.IMS_PER_BATCH", 8],
}
# What knowing four images by heart takes more than SOLOv2: repetitions, and for rows and columns
# (87 with the narrow ResNet and its rate) the full width.
HEART = {
    "solo": ["SOLVER.MAX_ITER", 250],
    "decoupled_solo": [
        "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.STEM_OUT_CHANNELS", 64,
        "SOLVER.BASE_LR", 0.001,
        "SOLVER.MAX_ITER", 250,
    ],
    "decoupled_solo_light": ["SOLVER.MAX_ITER", 200],
}  # fmt: skip


def sized(side, width):
    return [
        "MODEL.SOLO.CONV_DIM", width,
        "INPUT.MIN_SIZE_TRAIN", (side,),
        "INPUT.MIN_SIZE_TEST", side,
    ]  # fmt: skip


@pytest.fixture(params=GRIDS)
def variant(request):
    return request.param


def config(variant):
    return f"SOLO/nuclei_{variant}_R_18_FPN"


def test_three_shapes(variant, tmp_path):
    opts = [*sized(128, 128), *GRIDS[variant], "MODEL.SOLO.NUM_CLASSES", 3]
    metrics = three_shapes(config(variant), tmp_path, [*opts, *SHAPES.get(variant, [])])
    assert metrics["AP50"] >= 60, metrics


def test_four_images_of_many_classes_by_heart(variant, tmp_path):
    opts = [*sized(96, 64), *GRIDS[variant], "MODEL.SOLO.NUM_CLASSES", 12]
    opts += HEART.get(variant, [])
    right, swapped = by_heart(config(variant), variant, tmp_path, opts)
    assert right >= 90
    # Two of twelve classes are wrong: what the other ten give is left.
    assert swapped < right - 10
