"""Parity with the authors' code on seeded weights: raw outputs, targets, losses, detections.

The golden files were written by their code; ``docs/parity.md`` says how. The weights come under
their key names and go through the converter.
"""

import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from methods.solo import solo_golden as golden
from torch import nn

from instseg_ext.checkpoint import convert
from instseg_ext.methods.solo.arch import SOLO, SOLOv2
from instseg_ext.methods.solo.decoupled_head import DecoupledSOLOHead
from instseg_ext.methods.solo.grid_head import flatten_cells
from instseg_ext.methods.solo.head import SOLOv2Head
from instseg_ext.methods.solo.location_head import VanillaSOLOHead
from instseg_ext.methods.solo.targets import CellGrid
from instseg_ext.modeling.towers import DeformOptions

LEVELS = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
FORMATS = [torch.contiguous_format, torch.channels_last]
HEADS = {
    "vanilla": (SOLO, VanillaSOLOHead, {}),
    "decoupled": (SOLO, DecoupledSOLOHead, {}),
    "decoupled_light": (SOLO, DecoupledSOLOHead, {"shared_tower": True}),
    "solov2": (
        SOLOv2,
        SOLOv2Head,
        {"kernel_dim": golden.KERNEL_DIM, "mask_width": golden.MASK_WIDTH},
    ),
}


def build_model(variant):
    architecture, head, options = HEADS[variant.kind]
    grid = CellGrid(golden.GRIDS, golden.STRIDES, golden.RANGES)
    everywhere = variant.deform == "all"
    model = architecture(
        backbone=nn.Module(),
        head=head(
            {name: ShapeSpec(channels=golden.IN_DIM, stride=s) for name, s in LEVELS.items()},
            in_features=tuple(LEVELS),
            strides=grid.strides,
            num_grids=grid.num_grids,
            num_classes=golden.CLASSES,
            num_convs=golden.NUM_CONVS,
            width=golden.WIDTH,
            deform=DeformOptions(variant.deform, everywhere, everywhere),
            **options,
        ),
        grid=grid,
        num_classes=golden.CLASSES,
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    ours, _ = convert(golden.weights(variant), "solo-authors")
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
    maps = [m.contiguous(memory_format=request.param) for m in golden.features()]
    case.model.to(memory_format=request.param)
    with torch.no_grad():
        return case.model.head(dict(zip(LEVELS, maps, strict=True)))


def batch():
    return ImageList(torch.zeros(1, 3, *golden.INPUT_HW), [golden.IMAGE_HW])


def instances():
    boxes, classes, masks = golden.ground_truth()
    found = Instances(golden.IMAGE_HW)
    found.gt_boxes, found.gt_classes, found.gt_masks = Boxes(boxes), classes, BitMasks(masks)
    return found


def unpack(packed, shape):
    bits = np.unpackbits(packed.numpy(), axis=1)[:, : int(np.prod(shape))]
    return torch.from_numpy(bits.reshape(-1, *shape))


def test_raw_outputs(case, raw):
    found = {"category_logits": flatten_cells(raw.category_logits)[0]}
    if case.variant.kind == "solov2":
        found |= {"kernels": flatten_cells(raw.kernels)[0], "mask_features": raw.mask_features[0]}
    else:
        cells = torch.arange(0, case.model.grid.num_cells, golden.PROBE_STEP)
        with torch.no_grad():
            found["mask_probs"] = case.model.head.masks(raw, [cells])[0]
    for name, values in found.items():
        wanted = case.expected[name]
        assert (values - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min()), name


def test_targets(case, raw):
    found = case.model.targets(raw, batch(), [instances()])[0]
    assert torch.equal(found.labels, case.expected["labels"].long())
    if case.variant.kind == "solov2":
        pairs = zip(found.cells, found.masks[4][found.instances], strict=True)
    else:
        # One mask per cell, of half the stride of the cell's level; the file holds all at stride 4.
        strides = case.model.grid.per_cell(golden.STRIDES, torch.device("cpu")).long() // 2
        pairs = (
            (
                cell,
                _repeat(found.masks[int(strides[cell])][found.winners[cell]], strides[cell] // 4),
            )
            for cell in (found.winners >= 0).nonzero().squeeze(1)
        )
    mask_hw = tuple(side // 4 for side in golden.INPUT_HW)
    wanted = zip(
        case.expected["pair_cells"], unpack(case.expected["pair_masks"], mask_hw), strict=True
    )
    assert _listed(pairs) == _listed(wanted)


def _repeat(mask, times):
    return mask.repeat_interleave(times, 0).repeat_interleave(times, 1)


def _listed(pairs):
    return sorted((int(cell), mask.numpy().astype(np.uint8).tobytes()) for cell, mask in pairs)


def test_losses(case, raw):
    with torch.no_grad():
        found = case.model.losses(raw, batch(), [instances()])
    for name in ("loss_mask", "loss_cls"):
        torch.testing.assert_close(found[name], case.expected[name], rtol=1e-4, atol=0)


def test_detections(case, raw):
    height, width = golden.ORIGINAL_HW
    found = case.model.inference(raw, batch(), [{"height": height, "width": width}])[0]
    masks = unpack(case.expected["masks"], golden.ORIGINAL_HW).bool()
    assert len(found) == len(masks) > 30
    free = set(range(len(found)))
    wanted = zip(case.expected["scores"], case.expected["classes"], masks, strict=True)
    for score, label, mask in wanted:
        match = next(
            j
            for j in sorted(free)
            if found.pred_classes[j] == label
            and abs(found.scores[j] - score) <= 1e-4
            and _equal(found.pred_masks[j], mask)
        )
        free.remove(match)
    assert not free


def _equal(first, second):
    """Tell whether the IoU is 0.999 or more, or a single pixel differs (of a small mask)."""
    different, union = (first ^ second).sum().item(), (first | second).sum().item()
    return different <= max(1, 0.001 * union)
