"""Deep metric learning learns four many-class images by heart."""

import pytest
from methods.learning import by_heart

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]


def test_four_images_of_many_classes_by_heart(tmp_path):
    opts = [
        "INPUT.MIN_SIZE_TRAIN", (96,),
        "INPUT.MIN_SIZE_TEST", 96,
        "MODEL.DEEP_METRIC.NUM_CLASSES", 12,
        "MODEL.DEEP_METRIC.HEAD_DIM", 64,
        "MODEL.DEEP_METRIC.PIXELS_OF_BACKGROUND", 50,
        "MODEL.DEEP_METRIC.MIN_CELLS", 4,
    ]  # fmt: skip
    right, swapped = by_heart("MetricLearning/nuclei_metric_R_18", "metric", tmp_path, opts)
    assert right >= 90
    # Two of twelve classes are wrong: what the other ten give is left.
    assert swapped < right - 10
