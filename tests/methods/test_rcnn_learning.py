"""The two-stage methods learn: three shapes on unseen images, four many-class images by heart."""

import pytest
from methods.learning import by_heart, three_shapes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("all_cores")]

CONFIGS = {
    "mask_rcnn": "MaskRCNN/nuclei_mask_rcnn_R_18_FPN",
    "pointrend": "PointRend/nuclei_pointrend_R_18_FPN",
    "panet": "PANet/nuclei_panet_R_18_FPN",
    "mnc": "MNC/nuclei_mnc_R_18_FPN",
    "fcis": "FCIS/nuclei_fcis_R_18",
    "multipathnet": "MultiPathNet/nuclei_multipathnet_R_18_FPN",
}
WIDTHS = {
    "mask_rcnn": [],
    "pointrend": ["MODEL.ROI_MASK_HEAD.FC_DIM", 128, "MODEL.POINT_HEAD.FC_DIM", 64],
    # Every region on four levels: fewer and smaller ones.
    "panet": [
        "MODEL.ROI_BOX_HEAD.CONV_DIM", 32,
        "MODEL.ROI_BOX_HEAD.NUM_CONV", 2,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 8,
    ],
    "mnc": ["MODEL.MNC.MASK_CONV_DIM", 32, "MODEL.MNC.MASK_FC_DIM", 128],
    "fcis": ["MODEL.FCIS.HEAD_DIM", 128, "MODEL.FCIS.NUM_ROIS", 64],
    "multipathnet": ["MODEL.MULTIPATH.MIX_DIM", 32, "MODEL.MULTIPATH.L2_SCALE", 56.0],
}  # fmt: skip
# Images of twelve objects need as many regions with one.
HALF_WITH_OBJECTS = [
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.5,
]  # fmt: skip


def sized(side):
    """Return options for images of this size, with few regions and the dense methods' optimizer."""
    return [
        "INPUT.MIN_SIZE_TRAIN", (side,),
        "INPUT.MIN_SIZE_TEST", side,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200,
        "MODEL.RPN.PRE_NMS_TOPK_TEST", 200,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", 100,
        "MODEL.RPN.POST_NMS_TOPK_TEST", 100,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 128,
        "MODEL.ROI_MASK_HEAD.CONV_DIM", 64,
        "SOLVER.WEIGHT_DECAY", 0.01,
        "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR",
        "SOLVER.WARMUP_FACTOR", 0.01,
        "INSTSEG.OPTIMIZER", "adamw",
    ]  # fmt: skip


def classes(method, number):
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES"]
    if method == "pointrend":
        keys.append("MODEL.POINT_HEAD.NUM_CLASSES")
    return [item for key in keys for item in (key, number)]


@pytest.mark.parametrize(
    ("method", "iterations"),
    [
        ("pointrend", 250),
        ("mask_rcnn", 250),
        ("panet", 300),
        ("mnc", 200),
        ("fcis", 200),
        ("multipathnet", 200),
    ],
)
def test_three_shapes(method, iterations, tmp_path):
    opts = [*sized(128), *WIDTHS[method], *classes(method, 3)]
    opts += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32]
    opts += ["SOLVER.BASE_LR", 0.001, "SOLVER.MAX_ITER", iterations]
    metrics = three_shapes(CONFIGS[method], tmp_path, opts)
    assert metrics["AP50"] >= 60, metrics


@pytest.mark.parametrize("method", CONFIGS)
def test_four_images_of_many_classes_by_heart(method, tmp_path):
    opts = [*sized(96), *WIDTHS[method], *classes(method, 12), *HALF_WITH_OBJECTS]
    right, swapped = by_heart(CONFIGS[method], method, tmp_path, opts)
    assert right >= 90
    # Two of twelve classes are wrong: what the other ten give is left.
    assert swapped < right - 10
