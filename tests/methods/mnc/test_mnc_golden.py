"""Parity with the authors' code on seeded weights, from the image to voted masks and to losses.

The golden file was written by their code; ``docs/parity.md`` says how. The weights come under their
layer names and go through the converter.
"""

import pathlib
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from methods.mnc import mnc_golden as golden

import instseg_ext
from instseg_ext.checkpoint import convert
from instseg_ext.structures.legacy_boxes import add_last_pixel

FORMATS = ["contiguous", "channels_last"]
# What the authors' last code does, apart from the boxes that the converter asks for.
AS_PUBLISHED = [
    "MODEL.MNC.EXT_WARP", "direct14", "MODEL.MNC.VOTE_REENCODE", True,
    "MODEL.MNC.VOTE_MIN_SCORE", 0.0, "MODEL.MNC.BRIDGE_DENORM_TRAIN", False,
]  # fmt: skip
SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.VGG.WIDTH", golden.WIDTH,
    "MODEL.RPN.CONV_DIMS", [golden.RPN_DIM],
    "MODEL.MNC.MASK_FC_DIM", golden.MASK_DIM,
    "MODEL.ROI_BOX_HEAD.FC_DIM", golden.FC_DIM,
    "MODEL.ROI_HEADS.NUM_CLASSES", golden.CLASSES,
    "MODEL.ANCHOR_GENERATOR.SIZES", [golden.ANCHORS],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", golden.PRE_NMS,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", golden.PRE_NMS,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", golden.TRAIN_POST_NMS,
    "MODEL.RPN.POST_NMS_TOPK_TEST", golden.POST_NMS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", golden.ALL,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", golden.ALL,
    "TEST.DETECTIONS_PER_IMAGE", golden.DETECTIONS,
    "INPUT.MIN_SIZE_TEST", golden.MIN_SIZE,
    "INPUT.MAX_SIZE_TEST", golden.MAX_SIZE,
]  # fmt: skip


@pytest.fixture(scope="module", params=FORMATS)
def case(request):
    path = pathlib.Path(__file__).parent / "data" / "mnc_golden.npz"
    assert path.stat().st_size <= 300_000
    with np.load(path) as file:
        expected = {key: file[key] for key in file.files}
    names = expected.pop("loss_names").tolist()
    expected = {key: torch.from_numpy(value) for key, value in expected.items()}
    weights, report = convert(golden.weights())
    opts = [*report.opts, *AS_PUBLISHED, *SMALL, "INSTSEG.MEMORY_FORMAT", request.param]
    model = build_model(instseg_ext.get_config(report.config, opts)).eval()
    model.load_state_dict(weights)
    height, width = golden.ORIGINAL_HW
    item = {"image": golden.image(), "height": height, "width": width}
    with torch.no_grad():
        images = model.preprocess_image([item])
        features = model.backbone(images.tensor)
    assert images.tensor.shape[2:] == golden.IMAGE_HW
    return SimpleNamespace(**locals())


def assert_close(found, wanted):
    """Compare values in the same order by the bar of parity."""
    found, wanted = found.flatten(), wanted.flatten()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


def by_ratio(anchors):
    """Order (A, ...) as the authors do, all sizes of a ratio together."""
    return anchors.unflatten(0, (3, 3)).transpose(0, 1).flatten(0, 1)


def background_first(values):
    """Move the last class of (R, K + 1, ...) before the others."""
    return values.roll(1, dims=1)


def masks_of(case, name):
    ends = case.expected[f"{name}_lengths"].cumsum(0).tolist()
    counts = case.expected[name].numpy().tobytes()
    rles = [
        {"size": list(golden.ORIGINAL_HW), "counts": counts[start:end]}
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return torch.from_numpy(mask_util.decode(rles)).permute(2, 0, 1).bool()


@torch.no_grad()
def test_features_and_rpn(case):
    assert_close(case.features["conv5"], case.expected["conv5"])
    logits, deltas = case.model.proposal_generator.rpn_head([case.features["conv5"]])
    background, foreground = case.expected["rpn_scores"][0].chunk(2)
    assert_close(by_ratio(logits[0][0]), foreground - background)
    deltas = by_ratio(deltas[0][0].unflatten(0, (-1, 4)))
    assert_close(deltas, case.expected["rpn_deltas"])


@torch.no_grad()
def test_proposals(case):
    found = case.model.proposal_generator(case.images, case.features)[0][0]
    boxes = add_last_pixel(found.proposal_boxes.tensor, -1.0)
    torch.testing.assert_close(boxes, case.expected["rois"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("second", ["", "_ext"])
@torch.no_grad()
def test_stages(case, second):
    """On the authors' regions."""
    heads, expected = case.model.roi_heads, case.expected
    boxes = add_last_pixel(expected[f"rois{second}"], 1.0)
    pooler = heads.second_pooler if second else heads.pooler
    regions, logits = heads.masks(case.features, [boxes], pooler)
    assert_close(logits.flatten()[:: golden.PROBE], expected[f"mask_pred{second}"])
    joined = heads.join(regions, logits.sigmoid())
    seg_logits = heads.seg_cls_score(joined)
    assert_close(background_first(seg_logits), expected[f"seg_cls_score{second}"])
    if not second:
        assert_close(background_first(heads.cls_score(joined)), expected["cls_score"])
        deltas = heads.bbox_pred(joined).unflatten(1, (-1, 4))
        # Their snapshots hold the layer times the scale of its targets, which decoding brings here.
        deltas = deltas / deltas.new_tensor(heads.transform.weights)
        assert_close(background_first(deltas), expected["bbox_pred"])


@torch.no_grad()
def test_candidates(case):
    found = case.model.inference([case.item], do_postprocess=False)[0]
    expected = case.expected
    boxes = add_last_pixel(found.candidate_boxes.tensor, -1.0)
    wanted = torch.cat([expected["rois"], expected["rois_ext"]])
    torch.testing.assert_close(boxes, wanted, rtol=0, atol=1e-3)
    logits = torch.cat([expected["seg_cls_score"], expected["seg_cls_score_ext"]])
    scores = logits.softmax(dim=1)[:, 1:]
    torch.testing.assert_close(found.candidate_scores, scores, rtol=0, atol=1e-5)


@torch.no_grad()
def test_detections(case):
    found = case.model([case.item])[0]["instances"]
    expected = case.expected
    assert found.image_size == golden.ORIGINAL_HW
    # No two scores are so close that the order could differ.
    assert torch.equal(found.pred_classes, expected["classes"])
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-5)
    boxes = add_last_pixel(found.pred_boxes.tensor, -1.0)
    assert torch.equal(boxes, expected["boxes"])
    masks, ties = masks_of(case, "masks"), masks_of(case, "ties")
    assert masks.flatten(1).any(dim=1).all()
    # Between a cell of 0 and one of 1, some pixels are exactly on the threshold of 0.4. OpenCV sets
    # about half of them.
    assert ties.sum() <= 50
    assert torch.equal(found.pred_masks & ~ties, masks & ~ties)


def test_losses(case):
    """Their losses of both passes and of stage 1, with the same regions and anchors."""
    masks, classes = golden.objects()
    target = Instances(golden.IMAGE_HW)
    target.gt_masks = BitMasks(torch.from_numpy(masks))
    target.gt_boxes = target.gt_masks.get_bounding_boxes()
    target.gt_classes = torch.from_numpy(classes)
    item = {"image": golden.image(), "instances": target}
    item["height"], item["width"] = golden.IMAGE_HW
    # The regions of both passes, which end in their last pixel here.
    seen = []
    hook = case.model.roi_heads.pooler.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[1][0].tensor.detach())
    )
    case.model.train()
    try:
        with EventStorage():
            losses = case.model([item])
    finally:
        hook.remove()
        case.model.eval()
    for boxes, name in zip(seen, ("train_rois", "train_rois_ext"), strict=True):
        # Boxes of the second pass move 10 times as far as the deltas mean, and so does rounding.
        torch.testing.assert_close(boxes, case.expected[name], rtol=0, atol=1e-2)
    assert sorted(losses) == case.names
    found = torch.stack([losses[name].detach().double() for name in case.names])
    torch.testing.assert_close(found, case.expected["losses"], rtol=1e-5, atol=0)
