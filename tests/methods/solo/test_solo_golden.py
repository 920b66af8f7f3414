"""Parity with the authors' code on seeded weights: raw outputs, targets, losses, detections.

The golden file was written by their code; ``docs/parity.md`` says how.
"""

import pathlib

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from methods.solo import solo_golden as golden
from torch import nn

from instseg_ext.methods.solo.arch import SOLOv2
from instseg_ext.methods.solo.grid_head import flatten_cells
from instseg_ext.methods.solo.head import SOLOv2Head
from instseg_ext.methods.solo.targets import CellGrid, make_targets

LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(scope="module")
def expected():
    path = pathlib.Path(__file__).parent / "data" / "solov2_golden.npz"
    assert path.stat().st_size <= 300_000
    with np.load(path) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.fixture(scope="module")
def model():
    grid = CellGrid(golden.GRIDS, (8, 8, 16, 32, 32), golden.RANGES)
    head = SOLOv2Head(
        {name: ShapeSpec(channels=golden.IN_DIM, stride=s) for name, s in LEVELS.items()},
        in_features=tuple(LEVELS),
        strides=grid.strides,
        num_grids=grid.num_grids,
        num_classes=golden.CLASSES,
        num_convs=golden.NUM_CONVS,
        width=golden.WIDTH,
        kernel_dim=golden.KERNEL_DIM,
        mask_width=golden.MASK_WIDTH,
    )
    backbone = nn.Module()
    model = SOLOv2(
        backbone=backbone,
        head=head,
        grid=grid,
        num_classes=golden.CLASSES,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    theirs = golden.weights(golden.shapes())
    model.load_state_dict({golden.to_ours(key): value for key, value in theirs.items()})
    return model.eval()


def raw_outputs(model, memory_format):
    maps = [m.contiguous(memory_format=memory_format) for m in golden.features()]
    with torch.no_grad():
        return model.to(memory_format=memory_format).head(dict(zip(LEVELS, maps, strict=True)))


def instances():
    boxes, classes, masks = golden.ground_truth()
    found = Instances(golden.IMAGE_HW)
    found.gt_boxes, found.gt_classes, found.gt_masks = Boxes(boxes), classes, BitMasks(masks)
    return found


def unpack(packed, shape):
    bits = np.unpackbits(packed.numpy(), axis=1)[:, : int(np.prod(shape))]
    return torch.from_numpy(bits.reshape(-1, *shape))


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_raw_outputs(model, expected, memory_format):
    raw = raw_outputs(model, memory_format)
    pairs = {
        "category_logits": flatten_cells(raw.category_logits)[0],
        "kernels": flatten_cells(raw.kernels)[0],
        "mask_features": raw.mask_features[0],
    }
    for name, found in pairs.items():
        spread = expected[name].max() - expected[name].min()
        assert (found - expected[name]).abs().max() <= 1e-4 * spread, name


def test_targets(model, expected):
    boxes, classes, masks = golden.ground_truth()
    mask_hw = tuple(side // 4 for side in golden.INPUT_HW)
    found = make_targets(
        boxes,
        classes,
        masks,
        input_hw=golden.INPUT_HW,
        mask_sizes={4: mask_hw},
        grid=model.grid,
        num_classes=golden.CLASSES,
    )
    assert torch.equal(found.labels, expected["labels"].long())

    def listed(cells, maps):
        return sorted(
            (int(c), m.numpy().astype(np.uint8).tobytes()) for c, m in zip(cells, maps, strict=True)
        )

    theirs = listed(expected["pair_cells"], unpack(expected["pair_masks"], mask_hw))
    assert listed(found.cells, found.masks[4][found.instances]) == theirs


def test_losses(model, expected):
    raw = raw_outputs(model, torch.channels_last)
    images = ImageList(torch.zeros(1, 3, *golden.INPUT_HW), [golden.IMAGE_HW])
    losses = model.losses(raw, images, [instances()])
    torch.testing.assert_close(losses["loss_mask"], expected["loss_mask"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["loss_cls"], expected["loss_cls"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_detections(model, expected, memory_format):
    raw = raw_outputs(model, memory_format)
    images = ImageList(torch.zeros(1, 3, *golden.INPUT_HW), [golden.IMAGE_HW])
    height, width = golden.ORIGINAL_HW
    found = model.inference(raw, images, [{"height": height, "width": width}])[0]
    masks = unpack(expected["masks"], golden.ORIGINAL_HW).bool()
    assert len(found) == len(masks) > 30
    free = set(range(len(found)))
    for score, label, mask in zip(expected["scores"], expected["classes"], masks, strict=True):
        match = next(
            j
            for j in sorted(free)
            if found.pred_classes[j] == label
            and abs(found.scores[j] - score) <= 1e-4
            and _iou(found.pred_masks[j], mask) >= 0.999
        )
        free.remove(match)
    assert not free


def _iou(first, second):
    union = (first | second).sum().item()
    return (first & second).sum().item() / union if union else 1.0
