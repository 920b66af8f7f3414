"""Parity with the authors' networks and inference on seeded weights, from pixels to masks."""

import pathlib

import numpy as np
import pytest
import torch
from methods.deepmask import deepmask_golden as golden
from methods.deepmask.deepmask_models import model_of, sharp_model_of

FILE = pathlib.Path(__file__).parent / "data" / "deepmask_golden.npz"
FORMATS = pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])


@pytest.fixture(scope="module")
def expected():
    with np.load(FILE, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def build(make, memory_format):
    model = make(
        "INSTSEG.MEMORY_FORMAT", memory_format,
        "MODEL.DEEPMASK.TEST_SCALES", golden.SCALES,
        "MODEL.DEEPMASK.LEGACY_INDEXING", True,
        "MODEL.DEEPMASK.LEGACY_PASTE", True,
        "TEST.DETECTIONS_PER_IMAGE", golden.PROPOSALS,
    ).eval()  # fmt: skip
    # DeepMask's weights are part of SharpMask's.
    model.load_state_dict(golden.weights(sharp_model_of().state_dict()), strict=False)
    return model


def assert_close(found, wanted):
    """Within 1e-4 of the spread of what the authors have."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


@FORMATS
def test_patch(expected, memory_format):
    model = build(sharp_model_of, memory_format)
    with torch.no_grad():
        found = model.patch_outputs([{"image": golden.picture(golden.PATCH, golden.PATCH)}])
    assert_close(found.mask_logits, expected["patch_mask"])
    assert_close(found.refined_logits, expected["patch_refined"])
    assert abs(found.score_logits - expected["patch_score"]).item() < 1e-4


@FORMATS
def test_windows_of_an_image(expected, memory_format):
    model = build(sharp_model_of, memory_format)
    with torch.no_grad():
        maps = model.pyramid_maps(golden.picture(*golden.IMAGE_HW))
    assert_close(torch.cat([m.codes[0].flatten(1) for m in maps], 1), expected["codes"])
    assert_close(torch.cat([m.scores.flatten() for m in maps]), expected["scores"])
    for stage in range(4):
        laterals = torch.cat([m.laterals[stage].flatten() for m in maps])
        assert_close(laterals, expected[f"lateral_{stage}"])


@FORMATS
@pytest.mark.parametrize("make", [model_of, sharp_model_of], ids=["deepmask", "sharpmask"])
def test_proposals(expected, memory_format, make):
    """With the authors' indexing and pasting: the same windows, scores and masks, in order."""
    name = "deep" if make is model_of else "sharp"
    height, width = golden.IMAGE_HW
    sample = {"image": golden.picture(height, width), "height": height, "width": width}
    with torch.no_grad():
        found = build(make, memory_format)([sample])[0]["instances"]
    bits = np.unpackbits(expected[f"{name}_masks"].numpy(), axis=1, count=height * width)
    masks = torch.from_numpy(bits).view(-1, height, width).bool()
    assert len(found) == len(masks)
    torch.testing.assert_close(found.scores, expected[f"{name}_scores"], rtol=0, atol=1e-4)
    shared = (found.pred_masks & masks).flatten(1).sum(1)
    either = (found.pred_masks | masks).flatten(1).sum(1)
    assert (shared >= 0.999 * either).all()
