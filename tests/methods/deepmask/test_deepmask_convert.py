"""The DeepMask authors' Torch files, and a port's, become our models."""

from __future__ import annotations

import pytest
import torch
from checkpoint.torch7_writer import file_bytes, layer, named
from methods.deepmask.deepmask_files import AuthorsModel, port_state
from methods.deepmask.deepmask_models import SHARP, TINY, config, model_of, picture

import instseg_ext
from instseg_ext.checkpoint import (
    ConversionError,
    InstSegCheckpointer,
    check_fit,
    convert,
    convert_with_variant,
    model_shapes,
    read_metadata,
    read_weights,
)
from instseg_ext.cli import main as cli

WIDE = ["MODEL.DEEPMASK.REDUCE_DIM", 128]  # the files' number of channels


@pytest.fixture(scope="module", params=["deepmask_R_50", "sharpmask_R_50"])
def model(request):
    """A small model with norms as the authors' code leaves them: nothing but scale and shift."""
    model = model_of(*WIDE, name=request.param).eval()
    torch.manual_seed(1)
    for name, value in model.state_dict().items():
        if ".norm." in name and name.endswith(("weight", "bias")):
            value.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            value.normal_()
    return model


def tree(model, **options):
    authors = AuthorsModel(model.state_dict(), **options)
    return authors.sharpmask() if hasattr(model.head, "refine") else authors.deepmask()


def write(tmp_path, content, **options):
    path = tmp_path / "model.t7"
    path.write_bytes(file_bytes({"model": content, "config": {"iSz": 32}}, **options))
    return path


@pytest.mark.parametrize("options", [{}, {"ready": True}], ids=["saved", "ready"])
def test_every_weight_comes_back(tmp_path, model, options):
    """The file as trained, and as made ready for whole images: linear layers and convolutions."""
    path = write(tmp_path, tree(model, **options), cuda=True)
    weights, report = convert(read_weights(str(path))["model"])
    expected = model.state_dict()
    assert set(weights) == set(expected)
    assert [n for n, value in weights.items() if not torch.equal(value, expected[n])] == []
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in weights.values())
    assert report.family == "deepmask-torch7"
    assert set(report.dropped.values()) <= {
        "work space of layers",
        "other names of layers in neths and netvs",
    }


def test_a_converted_file_proposes_what_the_model_does(tmp_path, model):
    path, output = write(tmp_path, tree(model)), tmp_path / "converted.pth"
    sharp = hasattr(model.head, "refine")
    name = f"DeepMask/{'sharpmask' if sharp else 'deepmask'}_R_50"
    words = [str(word) for word in (*TINY, *WIDE, *(SHARP if sharp else ()))]
    assert cli.main(["convert", "--from", "auto", "--config", name, *map(str, (path, output)),
                     *words]) == 0  # fmt: skip
    assert "DeepMask" in read_metadata(str(output))["config"]
    cfg = config(*WIDE, name=name.partition("/")[2])
    fresh = type(model)(cfg).eval()
    InstSegCheckpointer(fresh).load(str(output), checkpointables=[])
    with torch.no_grad():
        (found,), (expected,) = fresh([picture(50, 70)]), model([picture(50, 70)])
    assert torch.equal(found["instances"].scores, expected["instances"].scores)
    assert torch.equal(found["instances"].pred_masks, expected["instances"].pred_masks)


@pytest.mark.parametrize("name", ["deepmask_R_50", "sharpmask_R_50"])
def test_a_published_file_fits_the_published_config(name):
    """By its shapes; the names are those of the sheet: trunk[5..7], [9], [12], refs[4]."""
    shapes = model_shapes(instseg_ext.get_config(f"DeepMask/{name}"))
    state = {n: torch.empty(shape, device="meta") for n, shape in shapes.items()}
    authors = AuthorsModel(state)
    names = named(authors.sharpmask() if "sharp" in name else authors.deepmask())
    weights, report, variant = convert_with_variant(names)
    assert (variant.config, variant.opts) == (f"DeepMask/{name}", ())
    check_fit(weights, shapes, report)
    for old, new in {
        "trunk.modules.1.modules.2.weight": "backbone.stem.conv1.weight",
        "trunk.modules.2.a": "backbone.stem.conv1.norm.weight",
        "trunk.modules.6.modules.1.modules.1.modules.2.modules.2.b": (
            "backbone.res3.0.shortcut.norm.bias"
        ),
        "trunk.modules.12.weight": "head.encode.weight",
    }.items():
        assert report.mapped[old] == new
    assert ("refs.4.modules.6.weight" in report.mapped) == ("sharp" in name)


def test_sizes_that_are_not_published_are_told(model):
    names = named(tree(model))
    _, _, variant = convert_with_variant(names)
    expected = ["MODEL.DEEPMASK.INPUT_SIZE", 32]
    if hasattr(model.head, "refine"):
        expected += ["MODEL.SHARPMASK.DIM", 16]
    assert list(variant.opts) == [*expected, "MODEL.DEEPMASK.OUT_SIZE", 12]


def test_biases_of_convolutions_go_through_their_norms(model):
    """Some trainers of the ImageNet network leave biases in: b becomes b + a * bias."""
    names = named(tree(model))
    bias = torch.randn(8)
    names["trunk.modules.1.modules.2.bias"] = bias
    weights, report = convert(names)
    norm, own = "backbone.stem.conv1.norm", model.state_dict()
    expected = own[f"{norm}.bias"] + own[f"{norm}.weight"] * bias
    assert torch.allclose(weights[f"{norm}.bias"], expected)
    assert "backbone.stem.conv1.bias" not in weights
    assert report.mapped["trunk.modules.1.modules.2.bias"] == f"{norm}.bias"
    names["trunk.modules.1.modules.2.bias"] = torch.ones(3)
    with pytest.raises(ConversionError, match=r"conv1\.bias is \[3\] and its norm \[8\]"):
        convert(names)


def test_weights_that_no_net_has_are_refused(model):
    names = named(tree(model))
    one = torch.ones(1)
    with pytest.raises(ConversionError, match=r"trunk\.modules\.9\.weight repeats its elements"):
        convert({**names, "trunk.modules.9.weight": one.expand(2**40)})
    with pytest.raises(ConversionError, match=r"\[4, 130\]: it must have 128 columns"):
        convert({**names, "trunk.modules.12.weight": torch.ones(4, 130)})
    with pytest.raises(ConversionError, match=r"1 names of the file have no place.*extra"):
        convert({**names, **named(layer("Linear", weight=torch.ones(2, 2)), "extra")})


def test_the_port_fits_with_its_own_padding():
    """Its norms have statistics; its 3x3 convolutions pad without the edge."""
    shapes = model_shapes(instseg_ext.get_config("DeepMask/deepmask_R_50"))
    state = port_state({n: torch.empty(s, device="meta") for n, s in shapes.items()})
    weights, report, variant = convert_with_variant({f"module.{n}": v for n, v in state.items()})
    assert report.family == "deepmask-pytorch"
    assert variant.opts == ("MODEL.DEEPMASK.PAD_MODE", "reflect")
    check_fit(weights, shapes, report)
    assert set(report.dropped.values()) == {"counters of batch normalisation"}


def test_weights_of_the_port_come_back():
    model = model_of()
    state = model.state_dict()
    weights, _ = convert(port_state(state))
    assert all(torch.equal(weights[name], value) for name, value in state.items())
