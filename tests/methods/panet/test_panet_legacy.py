"""The authors' geometry piece by piece (acceptance check 11, with modeling/test_legacy_anchors.py).

The whole is in the golden test.
"""

import copy

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from methods.panet.panet_toys import batch, box_lists, narrow

from instseg_ext.methods.panet.arch import PANetRCNN
from instseg_ext.methods.panet.legacy import paste_legacy_instances
from instseg_ext.methods.panet.legacy_parts import LegacyPANetROIHeads, LegacyRPN
from instseg_ext.modeling.legacy_anchors import LegacyAnchorGenerator
from instseg_ext.structures.legacy_boxes import Frame, add_last_pixel, clip_to_pixels

LEGACY = ("MODEL.PANET.LEGACY_D1", True)


def legacy_model(opts=()):
    torch.manual_seed(0)
    return build_model(narrow([*LEGACY, *opts])).eval()


def random_boxes(num=50, size=60.0):
    first = torch.rand(num, 2) * size
    return torch.cat([first, first + 1 + torch.rand(num, 2) * size], dim=1)


# --- acceptance check 11 -------------------------------------------------------------------------


def test_acceptance_check_11_the_last_pixel_comes_and_goes():
    boxes = random_boxes().round()
    assert torch.equal(add_last_pixel(add_last_pixel(boxes, -1.0), 1.0), boxes)
    pixels = torch.rand(len(boxes))
    there = add_last_pixel(boxes, pixels)
    assert torch.equal(there[:, :2], boxes[:, :2])
    torch.testing.assert_close(there[:, 2:] - boxes[:, 2:], pixels[:, None].expand(-1, 2))
    torch.testing.assert_close(add_last_pixel(there, -pixels), boxes)


def test_continuous_boxes_are_decoded_as_inclusive_ones():
    """The same as width = x2 - x1 + 1 and x2 = centre + width / 2 - 1."""
    inclusive, deltas = add_last_pixel(random_boxes(), -1.0), torch.randn(50, 4)
    size = inclusive[:, 2:] - inclusive[:, :2] + 1
    centre = inclusive[:, :2] + size / 2 + deltas[:, :2] / 10 * size
    half = (deltas[:, 2:] / 5).exp() * size / 2
    wanted = torch.cat([centre - half, centre + half - 1], dim=1)
    decode = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas
    found = add_last_pixel(decode(deltas, add_last_pixel(inclusive, 1.0)), -1.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


# --- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel", [1.0, 1.75])
def test_the_first_and_the_last_pixel_are_clipped(pixel):
    boxes = random_boxes(size=80.0) - 30
    height, width = 40 * pixel, 60 * pixel
    inclusive = add_last_pixel(boxes, -pixel)
    high = torch.tensor([width, height, width, height]) - pixel
    wanted = add_last_pixel(torch.minimum(inclusive.clamp(min=0), high), pixel)
    found = clip_to_pixels(boxes, (height, width), pixel)
    torch.testing.assert_close(found, wanted)
    assert (found[:, 2:] > found[:, :2]).all()


@pytest.mark.parametrize(
    ("original", "image", "pixel"),
    [
        ((480, 640), (1000, 1333), 1000 / 480),
        # The longer side reached the limit; the shorter one was rounded from 982.19.
        ((449, 640), (982, 1400), 1400 / 640),
        ((640, 449), (1400, 982), 1400 / 640),
        ((90, 120), (90, 120), 1.0),
    ],
)
def test_pixels_have_the_size_of_the_side_that_was_not_rounded(original, image, pixel):
    assert Frame.of(image, original, 1400) == Frame(original, pixel)


def test_masks_are_pasted_as_by_resizing_with_a_border():
    frame = Frame((60, 80), 1.5)
    torch.manual_seed(0)
    boxes = torch.tensor([[10.2, 5.7, 33.9, 41.1], [50.0, 20, 80, 60], [0, 0, 3.4, 2.2]])
    found = Instances((90, 120), pred_boxes=Boxes(boxes * frame.pixel))
    found.pred_masks = F.interpolate(torch.rand(3, 1, 4, 4), (28, 28), mode="bilinear")
    found.pixel = torch.full((3,), frame.pixel)
    pasted = paste_legacy_instances(copy.copy(found), frame)
    torch.testing.assert_close(pasted.pred_boxes.tensor, boxes)
    assert not pasted.has("pixel")
    for box, probs, mask in zip(boxes, found.pred_masks, pasted.pred_masks, strict=True):
        assert np.array_equal(mask.numpy(), resize_with_border(probs[0], box, frame.original_size))


def resize_with_border(probs, box, size):
    """What the authors do for one mask, in numpy and OpenCV."""
    x1, y1, x2, y2 = (float(v) for v in add_last_pixel(box[None], -1.0)[0])
    cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2 * 30 / 28, (y2 - y1) / 2 * 30 / 28
    x1, y1, x2, y2 = (int(v) for v in (cx - w, cy - h, cx + w, cy + h))
    resized = cv2.resize(np.pad(probs.numpy(), 1), (max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)))
    mask = np.zeros(size, dtype=bool)
    rows, columns = slice(max(y1, 0), min(y2 + 1, size[0])), slice(max(x1, 0), min(x2 + 1, size[1]))
    mask[rows, columns] = (resized > 0.5)[
        rows.start - y1 : rows.stop - y1, columns.start - x1 : columns.stop - x1
    ]
    return mask


# --- the switch ----------------------------------------------------------------------------------


def test_one_switch_changes_all_parts_and_no_name():
    model, plain = legacy_model(), build_model(narrow())
    assert isinstance(model, PANetRCNN)
    assert isinstance(model.proposal_generator, LegacyRPN)
    assert isinstance(model.proposal_generator.anchor_generator, LegacyAnchorGenerator)
    assert isinstance(model.roi_heads, LegacyPANetROIHeads)
    for pooler in (model.roi_heads.box_pooler, model.roi_heads.mask_pooler):
        assert not any(level.level_poolers[0].aligned for level in pooler.level_poolers)
    assert not isinstance(plain.roi_heads, LegacyPANetROIHeads)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_proposals_beside_the_image_become_strips():
    rpn = legacy_model().proposal_generator
    anchors = [Boxes(torch.tensor([[-30.0, 10, -5, 20], [90, 60, 130, 90], [5, 5, 15, 15]]))]
    logits, deltas = [torch.tensor([[3.0, 2.0, 1.0]])], [torch.zeros(1, 3, 4)]
    found = rpn.predict_proposals(anchors, logits, deltas, [(60, 90)])[0]
    assert found.image_size == (60, 90)
    # The image is padded to 64 x 96.
    wanted = [[0, 10, 1, 20], [90, 60, 96, 64], [5, 5, 15, 15]]
    assert found.proposal_boxes.tensor.tolist() == wanted


@torch.no_grad()
def test_regions_are_pooled_without_the_last_pixel(monkeypatch):
    """Of the network input for boxes, of the original image for masks."""
    model, seen = legacy_model(), {}

    def watch(name):
        pooler = getattr(model.roi_heads, f"{name}_pooler")
        pooler.register_forward_pre_hook(lambda _, given: seen.__setitem__(name, given[1]))

    watch("box")
    watch("mask")
    forward = model.proposal_generator.forward
    given = [Instances((64, 96), proposal_boxes=box_lists()[0])]
    monkeypatch.setattr(model.proposal_generator, "forward", lambda *a: (given, forward(*a) and {}))
    item = {**batch([])[0], "height": 32, "width": 48}
    found = model.inference([item], do_postprocess=False)[0]
    before = given[0].proposal_boxes.tensor
    assert torch.equal(seen["box"][0].tensor, add_last_pixel(before, -1.0))
    boxes = found.pred_boxes.tensor
    assert len(boxes)
    assert torch.equal(seen["mask"][0].tensor, add_last_pixel(boxes, -2.0))
    # At least a pixel of the original is left of each, inside the image.
    assert (boxes[:, 2:] >= 2).all()
    assert (boxes <= torch.tensor([96.0, 64, 96, 64])).all()


@torch.no_grad()
@pytest.mark.parametrize("output", ["bool", "rle"])
def test_results_are_at_the_original_size(output):
    model = legacy_model(["INSTSEG.MASK_OUTPUT", output])
    items = [{**item, "height": 40, "width": 60} for item in batch([], [])]
    found = model(items)[1]["instances"]
    assert found.image_size == (40, 60)
    assert len(found) == 6
    assert not found.has("pixel")
    masks = found.pred_masks if output == "bool" else found.pred_masks_rle
    assert (masks.shape == (6, 40, 60)) if output == "bool" else (len(masks) == 6)


@torch.no_grad()
def test_masks_of_given_boxes_are_the_same():
    model = legacy_model()
    items = [{**item, "height": 40, "width": 60} for item in batch([], [])]
    results = model.inference(items, do_postprocess=False)
    given = [
        Instances(x.image_size, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes)
        for x in results
    ]
    again = model.inference(items, given, do_postprocess=False)
    for found, wanted in zip(again, results, strict=True):
        assert torch.equal(found.pred_masks, wanted.pred_masks)
    pasted = model(items)[0]["instances"]
    assert pasted.has("pred_masks")


@torch.no_grad()
def test_nothing_found_and_no_masks():
    model = legacy_model(["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0])
    found = model(batch([]))[0]["instances"]
    assert found.pred_masks.shape == (0, 64, 96)
    model = legacy_model(["MODEL.MASK_ON", False])
    assert not model(batch([]))[0]["instances"].has("pred_masks")


# --- what is refused -----------------------------------------------------------------------------


def test_training_is_refused():
    with pytest.raises(ValueError, match=r"LEGACY_D1 is for inference .* set it to False to train"):
        legacy_model().train()(batch([(8, 8, 40, 40)]))


def test_other_heads_and_stretched_images_are_refused():
    with pytest.raises(ValueError, match=r"needs MODEL.ROI_HEADS.NAME PANetROIHeads, not Inst"):
        legacy_model(["MODEL.ROI_HEADS.NAME", "InstSegROIHeads"])
    with pytest.raises(ValueError, match=r"set MODEL.KEYPOINT_ON to False"):
        legacy_model(["MODEL.KEYPOINT_ON", True])
    with pytest.raises(ValueError, match=r"set INSTSEG.STRETCH to \(0, 0\)"):
        legacy_model(["INSTSEG.STRETCH", [64, 64]])


def test_images_without_originals_are_refused():
    heads = legacy_model().roi_heads
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    with pytest.raises(TypeError, match="needs the images of PANetRCNN"):
        heads(images, {}, [])


def test_another_frame_does_not_ignore_the_switch():
    with pytest.raises(ValueError, match=r"LEGACY_D1 needs MODEL.META_ARCHITECTURE PANetRCNN"):
        legacy_model(["MODEL.META_ARCHITECTURE", "InstSegRCNN"])
