"""The whole model: training, inference, nothing to look at (acceptance checks 12 and 15)."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from methods.panet.panet_toys import batch, narrow, no_boxes, pyramid

from instseg_ext.methods import panet
from instseg_ext.methods.panet.pooler import AllLevelPooler
from instseg_ext.modeling.poolers import RegionPooler

OBJECTS = ([(8, 8, 40, 40), (50, 10, 80, 50)], [(20, 5, 60, 45)])
FC2 = ["MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "MODEL.ROI_BOX_HEAD.NUM_FC", 2]
NORMS = ("MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")


def model_of(opts=()):
    torch.manual_seed(0)
    return build_model(narrow(opts))


def norms(kind):
    return [word for key in NORMS for word in (key, kind)]


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.grad is None]


def test_record():
    method = panet.METHOD
    assert method.name == "PANet"
    assert method.meta_architectures == ("PANetRCNN",)
    assert set(method.components) == {"PANetROIHeads", "PANetFusionMaskHead"}


def test_state_dict_has_the_parts_of_a_two_stage_model():
    model = model_of()
    heads = {name.split(".")[1] for name in model.state_dict() if name.startswith("roi_heads")}
    assert heads == {"box_head", "box_predictor", "mask_head"}
    assert "backbone.pan_down2.bias" in model.state_dict()
    assert "roi_heads.mask_head.conv1.3.norm.weight" in model.state_dict()


@pytest.mark.parametrize("opts", [[], FC2], ids=["4conv1fc", "2fc"])
def test_acceptance_check_15_a_step_on_two_images(opts):
    model = model_of(opts)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss_of():
        torch.manual_seed(1)  # the same anchors and regions
        return sum(model(batch(*OBJECTS)).values())

    before = loss_of()
    before.backward()
    heads = model.roi_heads
    firsts = [heads.mask_head.conv1, heads.box_head.fc1 if opts else heads.box_head.conv1]
    for layers in firsts:
        assert len(layers) == 4
        assert all(layer.weight.grad.any() for layer in layers)
    assert without_gradient(model) == []
    optimizer.step()
    assert float(loss_of().detach()) < float(before.detach())


@pytest.mark.parametrize("kind", ["GN", "BN", "SyncBN", ""])
def test_acceptance_check_12_no_foreground(kind):
    model = model_of(norms(kind))
    losses = model(batch([], []))
    assert all(torch.isfinite(value) for value in losses.values())
    assert float(losses["loss_mask"]) == 0
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


@pytest.mark.parametrize("opts", [[], FC2], ids=["4conv1fc", "2fc"])
def test_acceptance_check_12_no_proposals(opts):
    heads = model_of(opts).roi_heads
    x = heads.box_head(heads.box_pooler(pyramid(channels=32), no_boxes()))
    assert x.shape == (0, 64)
    sum(y.sum() for y in heads.box_predictor(x)).backward()
    branch = [*heads.box_head.parameters(), *heads.box_predictor.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in branch)


@pytest.mark.parametrize("output", ["bool", "rle"])
def test_acceptance_check_12_no_detections(output):
    model = model_of(["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, "INSTSEG.MASK_OUTPUT", output])
    result = model.eval()(batch(*OBJECTS))[0]["instances"]
    assert len(result) == 0
    if output == "bool":
        assert result.pred_masks.shape == (0, 64, 96)
        assert result.pred_masks.dtype == torch.bool


@torch.no_grad()
def test_detections_and_masks_of_given_boxes():
    model = copy.deepcopy(model_of()).eval()
    inputs = batch(*OBJECTS)
    results = model.inference(inputs, do_postprocess=False)
    assert [len(r) for r in results] == [6, 6]
    assert results[0].pred_masks.shape == (6, 1, 12, 12)
    again = model.inference(inputs, copy.deepcopy(results), do_postprocess=False)
    assert torch.equal(again[1].pred_masks, results[1].pred_masks)
    pasted = model(inputs)[0]["instances"]
    assert pasted.pred_masks.dtype == torch.bool
    assert pasted.pred_masks.shape == (len(pasted), 64, 96)


def test_bf16_on_the_cpu():
    model = model_of(["INSTSEG.PRECISION", "bf16"])
    losses = model(batch(*OBJECTS))
    assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        results = model.eval().inference(batch(*OBJECTS), do_postprocess=False)
    assert results[0].pred_masks.dtype == torch.float32
    assert results[0].scores.dtype == torch.float32


def test_boxes_alone():
    model = model_of(["MODEL.MASK_ON", False])
    assert sorted(model(batch(*OBJECTS))) == [
        "loss_box_reg", "loss_cls", "loss_rpn_cls", "loss_rpn_loc",
    ]  # fmt: skip
    assert not model.eval()(batch(*OBJECTS))[0]["instances"].has("pred_masks")


def test_other_heads_keep_regions_of_one_level():
    opts = ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
    heads = model_of(opts).roi_heads
    assert isinstance(heads.box_pooler, RegionPooler)
    assert isinstance(heads.mask_pooler, AllLevelPooler)


def test_mask_pooler_cannot_be_switched_off():
    with pytest.raises(ValueError, match=r"MODEL.ROI_MASK_HEAD.POOLER_TYPE must name a pooler"):
        model_of(["MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""])


def test_anchors_of_the_authors_can_be_chosen():
    model = model_of(["MODEL.ANCHOR_GENERATOR.NAME", "LegacyAnchorGenerator"])
    assert list(model.state_dict()) == list(model_of().state_dict())
    sizes = [
        tuple(cell[0, 2:].tolist())
        for cell in model.proposal_generator.anchor_generator.cell_anchors
    ]
    assert sizes == [(6, 3), (11, 6), (23, 12), (45, 22), (91, 46)]


@pytest.mark.parametrize("name", ["StandardROIHeads", "InstSegROIHeads"])
@pytest.mark.parametrize("off", [[], ["MODEL.MASK_ON", False]], ids=["mask", "box"])
def test_region_heads_of_one_level_are_refused(name, off):
    opts = ["MODEL.ROI_HEADS.NAME", name, *off]
    if not off:
        opts += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
    with pytest.raises(ValueError, match=f"set MODEL.ROI_HEADS.NAME to PANetROIHeads, not {name}"):
        model_of(opts)
