"""Parity with the authors' code on seeded weights: raw outputs, targets, losses, detections.

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
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from methods.polarmask import polarmask_golden as golden

from instseg_ext.checkpoint import convert
from instseg_ext.methods.polarmask.arch import PolarMask
from instseg_ext.methods.polarmask.assign import AssignOptions
from instseg_ext.methods.polarmask.fpn import PolarMaskFPN
from instseg_ext.methods.polarmask.head import PolarMaskHead, to_reference_layout
from instseg_ext.methods.polarmask.inference import InferenceOptions

TRUNK = ("res3", "res4", "res5")
LEVELS = ("p3", "p4", "p5", "p6", "p7")
FORMATS = [torch.contiguous_format, torch.channels_last]
# Ours by their name.
LOSSES = {
    "loss_cls": "loss_cls",
    "loss_bbox": "loss_box",
    "loss_mask": "loss_mask",
    "loss_centerness": "loss_centerness",
}


class Given(Backbone):
    """A trunk that returns the seeded maps, whatever the image."""

    def __init__(self):
        super().__init__()
        self.maps = dict(zip(TRUNK, golden.features(), strict=True))

    def output_shape(self):
        return {
            name: ShapeSpec(channels=self.maps[name].shape[1], stride=stride)
            for name, stride in zip(TRUNK, golden.STRIDES, strict=False)
        }

    def forward(self, x):
        return self.maps


def build_model(variant):
    width = golden.WIDTH
    backbone = PolarMaskFPN(
        Given(),
        TRUNK,
        width,
        size_divisibility=128,
        top_block=LastLevelP6P7(width, width, in_feature="p5"),
    )
    head = PolarMaskHead(
        backbone.output_shape(),
        in_features=LEVELS,
        num_classes=golden.CLASSES,
        num_convs=golden.NUM_CONVS,
        width=width,
        num_rays=golden.RAYS,
        deform=variant.deform,
    )
    model = PolarMask(
        backbone=backbone,
        head=head,
        num_classes=golden.CLASSES,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        assign_options=AssignOptions(
            strides=golden.STRIDES, size_ranges=(64.0, 128.0, 256.0, 512.0)
        ),
        inference_options=InferenceOptions(
            nms_pre=golden.NMS_PRE, nms_on="mask" if variant.mask_nms else "box"
        ),
    )
    ours, _ = convert(golden.weights(variant), "polarmask")
    model.load_state_dict(ours)
    return model.eval()


@pytest.fixture(scope="module", params=golden.VARIANTS)
def case(request):
    path = pathlib.Path(__file__).parent / "data" / f"{request.param}_golden.npz"
    assert path.stat().st_size <= 300_000
    with np.load(path) as file:
        expected = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    variant = golden.VARIANTS[request.param]
    return SimpleNamespace(variant=variant, expected=expected, model=build_model(variant))


@pytest.fixture(scope="module", params=FORMATS, ids=["contiguous", "channels_last"])
def raw(request, case):
    trunk = case.model.backbone.bottom_up
    trunk.maps = {name: x.contiguous(memory_format=request.param) for name, x in trunk.maps.items()}
    case.model.to(memory_format=request.param)
    with torch.no_grad():
        return case.model.head(case.model.backbone(batch().tensor))


def batch():
    return ImageList(torch.zeros(1, 3, *golden.INPUT_HW), [golden.IMAGE_HW])


def instances():
    boxes, classes, masks = golden.ground_truth()
    found = Instances(golden.IMAGE_HW)
    found.gt_boxes, found.gt_classes = Boxes(boxes), classes
    height, width = golden.IMAGE_HW
    found.gt_masks = BitMasks(masks[:, :height, :width])
    return found


def decode(case):
    """Return the (D, H, W) masks of the file."""
    ends = case.expected["rle_lengths"].cumsum(0).tolist()
    counts = case.expected["rle"].numpy().tobytes()
    rles = [
        {"size": list(golden.ORIGINAL_HW), "counts": counts[start:end]}
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return torch.from_numpy(mask_util.decode(rles)).permute(2, 0, 1).bool()


def test_raw_outputs(case, raw):
    for name, levels in to_reference_layout(raw).items():
        values = torch.cat([x[0].permute(1, 2, 0).flatten(0, 1) for x in levels])
        values, wanted = values[:: case.variant.probe], case.expected[name]
        assert values.shape == wanted.shape, name
        assert (values - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min()), name


def test_targets(case, raw):
    found = case.model.targets(raw, batch(), [instances()])
    labels = case.expected["labels"].long()
    assert torch.equal(found.labels[0], labels)
    assert torch.equal(found.positives.index, (labels < golden.CLASSES).nonzero().squeeze(1))
    assert torch.equal(found.positives.boxes, case.expected["box_targets"])
    rays = case.expected["ray_targets"]
    assert torch.equal(found.rays == 1e-6, rays == 1e-6)
    torch.testing.assert_close(found.rays, rays, rtol=2e-7, atol=0)


def test_losses(case, raw):
    with torch.no_grad():
        found = case.model.losses(raw, batch(), [instances()])
    assert set(found) == set(LOSSES.values())
    for theirs, name in LOSSES.items():
        torch.testing.assert_close(found[name], case.expected[theirs], rtol=1e-4, atol=0)


def test_detections(case, raw):
    height, width = golden.ORIGINAL_HW
    found = case.model.inference(raw, batch(), [{"height": height, "width": width}])[0]
    expected, masks = case.expected, decode(case)
    assert len(found) == len(masks) == 100
    # No two scores are so close that the order could differ.
    assert torch.equal(found.pred_classes, expected["classes"].long())
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-4)
    # Theirs end at the last pixel, ours after it.
    boxes = expected["boxes"] + torch.tensor([0.0, 0.0, 1.0, 1.0])
    torch.testing.assert_close(found.pred_boxes.tensor, boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.pred_polygons, expected["polygons"], rtol=0, atol=1e-3)
    different = (found.pred_masks ^ masks).sum(dim=(1, 2))
    union = (found.pred_masks | masks).sum(dim=(1, 2))
    # An IoU of 0.999, or a single pixel of a small mask.
    assert (different <= (0.001 * union).clamp(min=1)).all()
