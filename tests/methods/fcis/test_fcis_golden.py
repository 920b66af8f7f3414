"""Parity with the authors' code on seeded weights, from the image to masks, losses and gradients.

The golden file was written by their code; ``docs/parity.md`` says how. The weights come under their
names and go through the converter.
"""

import pathlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from methods.fcis import fcis_golden as golden

import instseg_ext
from instseg_ext.checkpoint import convert
from instseg_ext.structures.legacy_boxes import add_last_pixel

FILE = pathlib.Path(__file__).parent / "data" / "fcis_golden.npz"
FORMATS = ["contiguous", "channels_last"]
LOSSES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_mask", "loss_box_reg")
BOX_MAPS = 4 * 7 * 7


def build(expected, memory_format):
    """Return our model with the authors' weights, and our name of each of theirs."""
    width = 64 // golden.DIVISOR
    opts = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "INSTSEG.MEMORY_FORMAT": memory_format,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": width,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 4 * width,
        "MODEL.RPN.CONV_DIMS": [8 * width],
        "MODEL.FCIS.HEAD_DIM": 16 * width,
        "MODEL.ANCHOR_GENERATOR.SIZES": [list(golden.SIZES)],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": golden.PRE_NMS,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": golden.PRE_NMS,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": golden.POST_NMS,
        "MODEL.RPN.POST_NMS_TOPK_TEST": golden.POST_NMS,
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": golden.MIN_SIZE,
        "MODEL.FCIS.MIN_DROP_SIZE": float(golden.MIN_SIZE),
        "MODEL.FCIS.OHEM": True,
        "MODEL.FCIS.OHEM_ROIS": golden.OHEM_ROIS,
        "MODEL.FCIS.BG_IOU": [0.0, 0.5],
        "MODEL.FCIS.LEGACY_BOXES": True,
        "MODEL.ROI_HEADS.NUM_CLASSES": golden.CLASSES - 1,
        "TEST.DETECTIONS_PER_IMAGE": golden.DETECTIONS,
        "INPUT.MIN_SIZE_TEST": golden.IMAGE_HW[0],
        "INPUT.MAX_SIZE_TEST": golden.MAX_SIZE,
    }
    cfg = instseg_ext.get_config("FCIS/fcis_R_101_sbd", [x for pair in opts.items() for x in pair])
    model = build_model(cfg).eval()
    biases = {
        key.removeprefix("bias:"): value.numpy()
        for key, value in expected.items()
        if key.startswith("bias:")
    }
    weights = {k: torch.from_numpy(v) for k, v in golden.weights(biases).items()}
    ours, report = convert(weights, "fcis-mxnet")
    model.load_state_dict(ours)
    return model, report.mapped


@pytest.fixture(scope="module")
def expected():
    assert FILE.stat().st_size <= 300_000
    with np.load(FILE) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.fixture(scope="module", params=FORMATS)
def case(request, expected):
    memory_format = request.param
    model, names = build(expected, memory_format)
    height, width = golden.ORIGINAL_HW
    image = torch.from_numpy(golden.image().transpose(2, 0, 1).copy())
    objects = torch.from_numpy(golden.OBJECTS)
    target = Instances(
        golden.IMAGE_HW,
        gt_boxes=Boxes(add_last_pixel(objects[:, :4].float(), 1.0)),
        gt_classes=objects[:, 4] - 1,
        gt_masks=BitMasks(torch.from_numpy(golden.masks())),
    )
    item = {"image": image, "height": height, "width": width, "instances": target}
    with torch.no_grad():
        images = model.preprocess_image([item])
        maps = model.backbone(images.tensor)
        scores = model.roi_heads.score_maps(maps["res5"])
        proposals, _ = model.proposal_generator(images, maps)
    return SimpleNamespace(**locals())


def by_ratio(channels, values=1):
    """Bring (A * values, ...) anchors to the authors' order: all sizes of a ratio together."""
    sizes = len(golden.SIZES)
    return channels.unflatten(0, (sizes, -1, values)).transpose(0, 1).flatten(0, 2)


def as_theirs(layer, channels):
    """Bring the (C, ...) channels of a predictor to the authors' order."""
    if layer == "rpn_cls_score":
        return by_ratio(channels)
    if layer == "rpn_bbox_pred":
        return by_ratio(channels, 4)
    # Their background is the first class.
    return channels.roll(98, dims=0) if layer == "fcis_cls_seg" else channels


def assert_close(found, wanted, probe=1):
    """Compare with every so many values of the file by the bar of parity."""
    values, wanted = found.flatten()[::probe], wanted.flatten()
    assert values.shape == wanted.shape
    assert (values - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


@torch.no_grad()
def test_raw_outputs(case):
    expected, probe = case.expected, golden.PROBE
    for name in ("res4", "res5"):
        assert_close(case.maps[name], expected[name], probe[name])
    logits, deltas = case.model.proposal_generator.rpn_head([case.maps["res4"]])
    background, foreground = expected["rpn_logits"][0].chunk(2)
    assert_close(as_theirs("rpn_cls_score", logits[0][0]), foreground - background)
    deltas = as_theirs("rpn_bbox_pred", deltas[0][0])
    assert_close(deltas, expected["rpn_deltas"], probe["rpn_deltas"])
    classes = as_theirs("fcis_cls_seg", case.scores.classes[0])
    assert_close(classes, expected["score_maps"], probe["scores"])
    assert_close(case.scores.boxes, expected["box_maps"], probe["boxes"])


def test_proposals(case):
    boxes = add_last_pixel(case.proposals[0].proposal_boxes.tensor, -1.0)
    torch.testing.assert_close(boxes, case.expected["proposals"], rtol=0, atol=1e-3)


@torch.no_grad()
def test_candidates_of_both_rounds(case):
    found = case.model.inference([case.item], do_postprocess=False)[0]
    expected = case.expected
    assert len(found) == 2 * golden.POST_NMS
    boxes = add_last_pixel(found.candidate_boxes.tensor, -1.0)
    torch.testing.assert_close(boxes, expected["candidate_boxes"], rtol=0, atol=1e-3)
    scores = expected["candidate_scores"][:, 1:]
    torch.testing.assert_close(found.candidate_scores, scores, rtol=0, atol=1e-4)
    masks = found.candidate_masks.flatten()[:: golden.PROBE["masks"]]
    torch.testing.assert_close(masks, expected["candidate_masks"], rtol=0, atol=1e-4)


def assert_detections(found, expected, rle):
    assert found.image_size == golden.ORIGINAL_HW
    # No two scores are so close that the order could differ.
    assert torch.equal(found.pred_classes, expected["classes"].long())
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-4)
    ends = expected[f"{rle}_lengths"].cumsum(0).tolist()
    counts = expected[rle].numpy().tobytes()
    rles = [
        {"size": list(golden.ORIGINAL_HW), "counts": counts[start:end]}
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    masks = torch.from_numpy(mask_util.decode(rles)).permute(2, 0, 1).bool()
    assert masks.any()
    different = (found.pred_masks ^ masks).sum(dim=(1, 2))
    union = (found.pred_masks | masks).sum(dim=(1, 2))
    # An IoU of 0.999, or a single pixel of a small mask.
    assert (different <= (0.001 * union).clamp(min=1)).all()


@torch.no_grad()
def test_detections(case):
    found = case.model([case.item])[0]["instances"]
    assert_detections(found, case.expected, "rle")
    boxes = add_last_pixel(found.pred_boxes.tensor, -1.0)
    assert torch.equal(boxes, case.expected["boxes"].float())


@torch.no_grad()
def test_detections_as_the_authors_evaluate_them(case, monkeypatch):
    """Masks of their result files have passed through 21 x 21 cells."""
    monkeypatch.setattr(case.model, "voting", replace(case.model.voting, reencode=True))
    assert_detections(case.model([case.item])[0]["instances"], case.expected, "coded_rle")


def test_anchor_labels(case):
    generator = case.model.proposal_generator
    anchors = generator.anchor_generator([case.maps["res4"]])
    labels, _ = generator.label_and_sample_anchors(anchors, [case.target])
    height, width = case.maps["res4"].shape[2:]
    found = labels[0].view(height, width, -1).permute(2, 0, 1)
    assert torch.equal(by_ratio(found).long(), case.expected["rpn_labels"].long())


def test_hard_regions_and_their_masks(case):
    """The regions of largest loss, in any order."""
    regions = case.model.roi_heads.sample_regions(case.scores, case.proposals[0], case.target)
    expected = case.expected
    boxes = add_last_pixel(regions.boxes, -1.0)
    distance = torch.cdist(boxes, expected["region_boxes"], p=torch.inf)
    # One in the other's place: the objects' boxes are regions, too.
    match = distance.argmin(dim=1)
    assert sorted(match.tolist()) == list(range(golden.OHEM_ROIS))
    assert distance.amin(dim=1).max() < 1e-3
    wanted = expected["region_classes"].long()[match]
    assert torch.equal(regions.classes, (wanted - 1) % golden.CLASSES)
    foreground = expected["region_classes"] > 0
    bits = np.unpackbits(expected["region_masks"].numpy())[: int(foreground.sum()) * 21 * 21]
    masks = torch.from_numpy(bits).view(-1, 21, 21)
    row = (foreground.cumsum(0) - 1)[match[wanted > 0]]
    assert torch.equal(regions.masks.bool(), masks[row].bool())


def test_losses_and_gradients(case):
    case.model.train()
    with EventStorage():
        losses = case.model([case.item])
    found = torch.stack([losses[name] for name in LOSSES]).double()
    torch.testing.assert_close(found, case.expected["losses"], rtol=1e-5, atol=0)
    found.sum().backward()
    parameters = dict(case.model.named_parameters())
    for theirs in golden.GRADIENTS:
        grad = parameters[case.names[f"arg:{theirs}"]].grad
        layer, _, _ = theirs.rpartition("_")
        grad = as_theirs(layer, grad)
        if layer == "rpn_cls_score":
            grad = torch.cat([-grad, grad])
        elif layer == "fcis_bbox":
            grad = torch.cat([grad.new_zeros(BOX_MAPS), grad])
        assert_close(grad, case.expected[f"grad:{theirs}"], golden.PROBE["grads"])
    case.model.eval()
