"""The MultiPathNet authors' released net becomes our model."""

from __future__ import annotations

import re

import pytest
import torch
from checkpoint.torch7_writer import file_bytes, named
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from methods.multipathnet.multipathnet_files import PREDICTOR, ReleasedNet

import instseg_ext
from instseg_ext.checkpoint import (
    ConversionError,
    check_fit,
    convert,
    convert_with_variant,
    model_shapes,
    read_weights,
)

NAME = "MultiPathNet/fast_rcnn_integral_R_18_coco"
TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0),
    "MODEL.MULTIPATH.MASK_SOURCE", "none",
]  # fmt: skip
MEAN, STD = torch.tensor([0.0, 0.01, -0.02, 0.1]), torch.tensor([0.125, 0.2, 0.25, 0.5])


def is_folded(name):
    return name.startswith(("backbone.stem", "backbone.res2"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_model(instseg_ext.get_config(NAME, TINY)).eval()
    for name, value in model.state_dict().items():
        if name.endswith(".norm.bias") or (name.endswith(".norm.weight") and not is_folded(name)):
            value.uniform_(0.5, 1.5)
        elif ".bbox_pred." in name or ".cls_score." in name:
            value.normal_(std=0.1)
        # The first classifier sees background everywhere.
        if name.endswith("cls_score.0.weight"):
            value.zero_()
        if name.endswith("cls_score.0.bias"):
            value[-1] = 20.0
    return model


def names_of(model, **options):
    return named(ReleasedNet(model.state_dict(), MEAN, STD, **options).net())


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("early", [False, True], ids=["", "inner"])
def test_every_weight_comes_back(model, wrapped, early):
    """Trained on one GPU or several; with the first form of the container without gradient."""
    names = names_of(model, wrapped=wrapped)
    if early:
        above = "modules.1." * (3 if wrapped else 2)
        names = {re.sub(f"^{above}modules.1.", f"{above}inner.", n): v for n, v in names.items()}
        assert any(".inner." in n for n in names)
    weights, report = convert(names)
    expected = model.state_dict()
    assert report.family == "multipathnet-torch7"
    assert set(weights) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, atol=1e-6), name
    assert set(report.mapped) | set(report.dropped) == set(names)
    assert "went into the weights of the boxes" in report.dropped.values()


def test_the_published_net_fits_its_config():
    cfg = instseg_ext.get_config(NAME)
    shapes = model_shapes(cfg)
    state = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
    meta = torch.empty(4, device="meta")
    names = named(ReleasedNet(state, meta, meta).net())
    weights, report, variant = convert_with_variant(names)
    assert (variant.config, variant.num_classes) == (NAME, 80)
    assert variant.opts == ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0))
    check_fit(weights, shapes, report)


def test_a_file_of_torch_is_recognised(model, tmp_path):
    """Check 11: the first class of the file is the last one here, the background.

    A picture without anything in it is background to the converted model.
    """
    path = tmp_path / "net.t7"
    path.write_bytes(file_bytes(ReleasedNet(model.state_dict(), MEAN, STD).net()))
    content = read_weights(str(path))["model"]
    classifier = "modules.4.modules.1.modules.1.bias"
    assert content[classifier][0] == 20
    weights, _ = convert(content)
    assert weights[f"{PREDICTOR}.cls_score.0.bias"][3] == 20
    assert torch.equal(weights[f"{PREDICTOR}.cls_score.0.bias"][:3], content[classifier][1:])
    cfg = instseg_ext.get_config(NAME, [*TINY, "MODEL.MULTIPATH.IOU_THRESHOLDS", [0.5]])
    fresh = build_model(cfg).eval()
    fresh.load_state_dict(
        {n: v for n, v in weights.items() if ".cls_score." not in n or ".cls_score.0." in n}
    )
    proposals = Instances((64, 64), proposal_boxes=Boxes(torch.tensor([[4.0, 4, 40, 40]])))
    proposals.objectness_logits = torch.zeros(1)
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    with torch.no_grad():
        (output,) = fresh([{"image": image, "proposals": proposals, "height": 64, "width": 64}])
    assert output["instances"].scores.max() < 1e-3


def test_boxes_that_make_no_sense_are_refused(model):
    names = names_of(model)
    boxes, mean = "modules.4.modules.2.weight", "modules.6.modules.2.mean"
    with pytest.raises(ConversionError, match=r"must have 4 rows per class"):
        convert({**names, boxes: names[boxes][:-1].clone()})
    with pytest.raises(ConversionError, match=r"not four means and deviations"):
        convert({**names, mean: torch.ones(3)})
    del names[mean], names["modules.6.modules.2.std"]
    weights, _ = convert(names)
    assert torch.equal(weights[f"{PREDICTOR}.bbox_pred.weight"], names[boxes][4:])
