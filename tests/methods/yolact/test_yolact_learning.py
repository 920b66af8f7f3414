"""YOLACT learns: three shapes on unseen images, and four many-class images by heart."""

import pytest
import torch
from contract.cases import blobs
from detectron2.modeling import build_model
from methods.learning import by_heart, three_shapes

import instseg_ext

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


def test_three_shapes(tmp_path):
    # With mask scoring: all that YOLACT has is in it, and boxes and masks rank by different scores.
    opts = [*sized(128, 128), "MODEL.YOLACT.NUM_CLASSES", 3, "MODEL.YOLACT.MASK_IOU.ENABLED", True]
    metrics = three_shapes(CONFIG, tmp_path, opts)
    assert metrics["AP50"] >= 60, metrics


def test_four_images_of_many_classes_by_heart(tmp_path):
    opts = [*sized(96, 64), "MODEL.YOLACT.NUM_CLASSES", 12]
    right, swapped = by_heart(CONFIG, "yolact", tmp_path, opts)
    assert right >= 90
    # Two of twelve classes are wrong: what the other ten give is left.
    assert swapped < right - 10


def test_four_images_are_fitted_by_the_authors_recipe():
    """SGD at their rate with frozen batch norms: every object is found again."""
    cfg = instseg_ext.get_config(
        CONFIG,
        [
            *sized(128, 64),
            "MODEL.DEVICE", "cpu",
            "MODEL.FPN.OUT_CHANNELS", 64,
            "MODEL.YOLACT.FREEZE_BN", "always",
            "INSTSEG.OPTIMIZER", "sgd",
        ],
    )  # fmt: skip
    model = build_model(cfg).train()
    images = [
        blobs(128, 128 + shift, [(8 + shift, 12, 52, 58), (64, 26 + shift, 116, 96)])
        for shift in (0, 5, 10, 15)
    ]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    totals = []
    for _ in range(150):
        total = sum(model(images).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert sum(totals[-10:]) / 10 < totals[0] / 5
    with torch.no_grad():
        results = model.eval()(images)
    for image, result in zip(images, results, strict=True):
        masks = result["instances"].pred_masks
        for truth in image["instances"].gt_masks.tensor:
            common, union = (masks & truth).sum((1, 2)), (masks | truth).sum((1, 2))
            assert (common / union).max() > 0.7
