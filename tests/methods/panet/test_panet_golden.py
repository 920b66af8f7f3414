"""Parity with the authors' code on seeded weights, from the trunk's features to the masks.

The golden files were written by their code; ``docs/parity.md`` says how. The weights come under
their key names and go through the converter. Only the trunk is missing: its features are given.
"""

import pathlib
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from detectron2.structures import Boxes
from methods.panet import panet_golden as golden
from methods.panet.panet_toys import config

from instseg_ext.checkpoint import convert
from instseg_ext.structures.legacy_boxes import add_last_pixel

TRUNK = ("res2", "res3", "res4", "res5")
LEVELS = ("p2", "p3", "p4", "p5", "p6")
FORMATS = ["contiguous", "channels_last"]
# Their anchors start at 32 pixels.
SIZES = [[32], [64], [128], [256], [512]]


class Given(Backbone):
    """A trunk that returns the seeded maps, whatever the image."""

    def __init__(self, memory_format):
        super().__init__()
        self.maps = {
            name: maps.contiguous(memory_format=memory_format)
            for name, maps in zip(TRUNK, golden.features(), strict=True)
        }

    def output_shape(self):
        return {
            name: ShapeSpec(channels=maps.shape[1], stride=4 * 2**level)
            for level, (name, maps) in enumerate(self.maps.items())
        }

    def forward(self, x):
        return self.maps


def build(variant, memory_format):
    cfg = config(["MODEL.PANET.LEGACY_D1", True, "INSTSEG.MEMORY_FORMAT", memory_format])
    model = cfg.MODEL
    model.MASK_ON = variant.masks
    model.RESNETS.STEM_OUT_CHANNELS, model.RESNETS.WIDTH_PER_GROUP = 8, 8
    model.RESNETS.RES2_OUT_CHANNELS = golden.FIRST
    model.FPN.OUT_CHANNELS = golden.WIDTH
    model.ANCHOR_GENERATOR.SIZES = SIZES
    model.RPN.PRE_NMS_TOPK_TEST, model.RPN.POST_NMS_TOPK_TEST = golden.PRE_NMS, golden.POST_NMS
    model.ROI_HEADS.NUM_CLASSES = golden.CLASSES
    model.ROI_BOX_HEAD.CONV_DIM = model.ROI_MASK_HEAD.CONV_DIM = golden.WIDTH
    model.ROI_BOX_HEAD.FC_DIM = golden.FC_DIM
    if variant.two_fc:
        model.ROI_BOX_HEAD.NUM_CONV, model.ROI_BOX_HEAD.NUM_FC = 0, 2
        model.ROI_BOX_HEAD.FC_DIM = golden.WIDTH
    cfg.TEST.DETECTIONS_PER_IMAGE = golden.DETECTIONS
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = golden.MIN_SIZE, golden.MAX_SIZE
    panet = build_model(cfg).eval()
    panet.backbone.bottom_up = Given(panet.memory_format)
    ours, _ = convert(golden.weights(variant), "panet")
    panet.load_state_dict(ours)
    return panet


@pytest.fixture(
    scope="module",
    params=[(name, form) for name in golden.VARIANTS for form in FORMATS],
    ids=lambda pair: "-".join(pair),
)
def case(request):
    name, memory_format = request.param
    path = pathlib.Path(__file__).parent / "data" / f"{name}_golden.npz"
    assert path.stat().st_size <= 300_000
    with np.load(path) as file:
        expected = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    variant = golden.VARIANTS[name]
    model = build(variant, memory_format)
    height, width = golden.ORIGINAL_HW
    item = {"image": torch.zeros(3, *golden.IMAGE_HW), "height": height, "width": width}
    with torch.no_grad():
        images = model.preprocess_image([item])
        maps = model.backbone(images.tensor)
    assert images.tensor.shape[2:] == golden.INPUT_HW
    return SimpleNamespace(**locals())


def assert_close(found, wanted, probe=1):
    """Compare with every so many values of the file by the bar of parity."""
    values = torch.cat([x.flatten() for x in found])[::probe]
    wanted = wanted.flatten()
    assert values.shape == wanted.shape
    assert (values - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


@torch.no_grad()
def test_pyramid_and_rpn(case):
    maps = [case.maps[name] for name in LEVELS]
    assert_close(maps, case.expected["maps"], golden.PROBE["maps"])
    logits, deltas = case.model.proposal_generator.rpn_head(maps)
    assert_close(logits, case.expected["rpn_logits"], golden.PROBE["rpn"])
    assert_close(deltas, case.expected["rpn_deltas"], golden.PROBE["rpn"])


@torch.no_grad()
def test_proposals(case):
    found = case.model.proposal_generator(case.images, case.maps)[0][0]
    assert found.image_size == golden.IMAGE_HW
    boxes = add_last_pixel(found.proposal_boxes.tensor, -1.0)
    torch.testing.assert_close(boxes, case.expected["rois"], rtol=0, atol=1e-3)


@torch.no_grad()
def test_box_head(case):
    heads = case.model.roi_heads
    maps = [case.maps[name] for name in heads.box_in_features]
    pooled = heads.box_pooler(maps, [Boxes(case.expected["rois"].clone())])
    logits, deltas = heads.box_predictor(heads.box_head(pooled))
    # Their first class is the background, and has a box.
    assert_close([logits.roll(1, dims=1)], case.expected["class_logits"])
    assert_close([deltas], case.expected["box_deltas"][:, 4:])


@torch.no_grad()
def test_mask_head(case):
    if not case.variant.masks:
        pytest.skip("a model without masks")
    heads = case.model.roi_heads
    maps = [case.maps[name] for name in heads.mask_in_features]
    regions = heads.mask_pooler(maps, [Boxes(case.expected["mask_rois"].clone())])
    wanted, probe = case.expected["mask_logits"], golden.PROBE["mask_logits"]
    logits = heads.mask_head.layers(regions)
    # Theirs have a map of the background, too, of which the file has values nobody reads.
    with_background = torch.cat([torch.full_like(logits[:, :1], torch.nan), logits], dim=1)
    values = with_background.flatten()[::probe]
    read = ~values.isnan()
    assert len(values) == len(wanted)
    assert_close([values[read]], wanted[read])


@torch.no_grad()
def test_detections(case):
    found = case.model([case.item])[0]["instances"]
    expected = case.expected
    assert found.image_size == golden.ORIGINAL_HW
    assert len(found) == golden.DETECTIONS
    # No two scores are so close that the order could differ.
    assert torch.equal(found.pred_classes, expected["classes"].long())
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-5)
    boxes = add_last_pixel(found.pred_boxes.tensor, -1.0)
    torch.testing.assert_close(boxes, expected["boxes"], rtol=0, atol=5e-3)
    if not case.variant.masks:
        assert not found.has("pred_masks")
        return
    ends = expected["rle_lengths"].cumsum(0).tolist()
    counts = expected["rle"].numpy().tobytes()
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
