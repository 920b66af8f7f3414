"""Parity with the authors' code on seeded weights: raw outputs, targets, losses, detections.

The golden files were written by their code; ``docs/parity.md`` says how. The weights come under
their key names and go through the converter. Only the trunk is missing: its features are given.
"""

import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from methods.yolact import yolact_golden as golden

from instseg_ext.checkpoint import convert
from instseg_ext.methods.yolact.anchors import AnchorGrid
from instseg_ext.methods.yolact.arch import YOLACT, LossOptions
from instseg_ext.methods.yolact.fpn import YOLACTFPN
from instseg_ext.methods.yolact.head import YOLACTHead, to_reference_layout

LEVELS = ("p3", "p4", "p5", "p6", "p7")
FORMATS = [torch.contiguous_format, torch.channels_last]
LOSSES = ("loss_cls", "loss_box", "loss_mask", "loss_semantic", "loss_mask_iou")


class Given(Backbone):
    """A trunk that returns the seeded maps, whatever the image."""

    def __init__(self, maps):
        super().__init__()
        self.maps = dict(zip(("res3", "res4", "res5"), maps, strict=True))

    def output_shape(self):
        return {
            name: ShapeSpec(channels=x.shape[1], stride=2**level)
            for level, (name, x) in enumerate(self.maps.items(), start=3)
        }

    def forward(self, x):
        return self.maps


def build_model(variant):
    backbone = YOLACTFPN(Given(golden.features(variant)), out_channels=golden.WIDTH)
    grid = AnchorGrid(scales=variant.scales, ratios=golden.RATIOS, square=variant.square)
    head = YOLACTHead(
        backbone.output_shape(),
        in_features=LEVELS,
        num_anchors=grid.num_per_cell,
        num_classes=golden.CLASSES,
        num_protos=golden.PROTOS,
        width=golden.WIDTH,
        mask_iou=variant.mask_iou,
    )
    model = YOLACT(
        backbone=backbone,
        head=head,
        anchor_grid=grid,
        num_classes=golden.CLASSES,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        stretch_size=(variant.size, variant.size),
        loss_options=LossOptions(masks_to_train=golden.MASKS_TO_TRAIN),
    )
    ours, _ = convert(golden.weights(variant), "yolact")
    model.load_state_dict(ours)
    return model


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
    """Raw outputs of training, which have the semantic logits too; there are no batch norms."""
    trunk = case.model.backbone.bottom_up
    trunk.maps = {name: x.contiguous(memory_format=request.param) for name, x in trunk.maps.items()}
    case.model.to(memory_format=request.param).train()
    with torch.no_grad():
        return case.model.head(case.model.backbone(batch(case).tensor))


def batch(case):
    size = case.variant.size
    return ImageList(torch.zeros(1, 3, size, size), [(size, size)])


def instances(case):
    boxes, classes, crowd, masks = golden.ground_truth(case.variant)
    found = Instances((case.variant.size, case.variant.size))
    found.gt_boxes, found.gt_classes, found.gt_masks = Boxes(boxes), classes, BitMasks(masks)
    found.gt_is_crowd = crowd
    return found


def test_raw_outputs(case, raw):
    anchors, pixels = case.variant.probe, case.variant.proto_probe
    found = {name: x[0] for name, x in to_reference_layout(raw).items()}
    found |= {name: found[name][::anchors] for name in ("loc", "conf", "mask")}
    found["proto"] = found["proto"][::pixels, ::pixels]
    found["segm"] = found["segm"][:, ::pixels, ::pixels]
    found["anchors"] = case.model.anchors(raw)[::anchors]
    for name, values in found.items():
        wanted = case.expected[name]
        assert values.shape == wanted.shape, name
        assert (values - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min()), name


def test_targets(case, raw):
    found = case.model.targets(raw, batch(case), [instances(case)])[0]
    labels = case.expected["labels"].long()
    assert torch.equal(found.labels, labels)
    positive = (labels >= 0) & (labels < golden.CLASSES)
    assert torch.equal(found.matched[positive], case.expected["matched"].long())


def test_losses(case, raw):
    with torch.no_grad():
        found = case.model.losses(raw, batch(case), [instances(case)])
    assert set(found) == set(LOSSES) & set(case.expected)
    for name, value in found.items():
        torch.testing.assert_close(value, case.expected[name], rtol=1e-4, atol=0)


def test_detections(case, raw):
    height, width = golden.ORIGINAL_HW
    given = [{"height": height, "width": width}]
    found = case.model.inference(raw, batch(case), given)[0]
    expected = case.expected
    bits = np.unpackbits(expected["masks"].numpy(), axis=1)[:, : height * width]
    masks = torch.from_numpy(bits.reshape(-1, height, width)).bool()
    boxes = Boxes(expected["boxes"] * torch.tensor([width, height, width, height]))
    boxes.clip(golden.ORIGINAL_HW)
    assert len(found) == len(masks) == 100
    # No two scores are so close that the order could differ.
    assert torch.equal(found.pred_classes, expected["classes"].long())
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes.tensor, boxes.tensor, rtol=0, atol=1e-2)
    if case.variant.mask_iou:
        torch.testing.assert_close(found.mask_scores, expected["mask_scores"], rtol=0, atol=1e-4)
    different = (found.pred_masks ^ masks).sum(dim=(1, 2))
    union = (found.pred_masks | masks).sum(dim=(1, 2))
    # An IoU of 0.999, or a single pixel of a small mask.
    assert (different <= (0.001 * union).clamp(min=1)).all()
