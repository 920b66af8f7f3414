"""Sliding the released network over an image, beside running it on single windows."""

import pytest
import torch
from detectron2.modeling import build_model
from methods.deepmask.deepmask_models import picture
from methods.project import Project

pytestmark = pytest.mark.slow

# Of the trunk's receptive field, 267 pixels, what lies around a cell, rounded up to whole cells.
FULL_CONTEXT = 144


def windows_around(image, cells, context):
    """Return the patches of windows of 160 pixels and their context at (row, column) cells."""
    half = 80 + context
    padded = torch.nn.functional.pad(image.float(), (half,) * 4, value=127.5)
    side = 2 * half
    return [
        {"image": padded[:, 16 * row : 16 * row + side, 16 * col : 16 * col + side]}
        for row, col in cells
    ]


def test_scores_are_those_of_single_windows():
    """480 x 640 pixels, 31 x 41 windows.

    With the patches of training the borders are mirrored where the image goes on, so that scores
    differ; with all that the trunk sees around a window they are the same.
    """
    torch.manual_seed(0)
    cfg = Project("DeepMask").config(
        "deepmask_R_50", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "",
        "MODEL.DEEPMASK.TEST_SCALES", [1.0],
    )  # fmt: skip
    model = build_model(cfg).eval()
    image = picture(480, 640)["image"]
    inside = [(14, 14), (15, 20), (16, 26)]
    with torch.no_grad():
        (maps,) = model.pyramid_maps(image)
        model.context = FULL_CONTEXT
        alone = model.patch_outputs(windows_around(image, inside, FULL_CONTEXT)).score_logits
    rows, cols = zip(*inside, strict=True)
    assert maps.scores.shape == (1, 31, 41)
    spread = maps.scores.max() - maps.scores.min()
    assert (maps.scores[0, rows, cols] - alone).abs().max() / spread < 1e-4
