"""PANet's box and mask heads (acceptance checks 5 to 9)."""

import weakref

import pytest
import torch
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.roi_heads import build_box_head, build_mask_head
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import BitMasks, Boxes, Instances
from methods.panet.panet_toys import config, count, narrow, no_boxes, randomise_norms, regions
from torch import nn
from torch.nn import functional as F

from instseg_ext.methods.panet.pooler import PooledRegions

FC2 = ["MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "MODEL.ROI_BOX_HEAD.NUM_FC", 2]
SHAPE = ShapeSpec(channels=8, height=4, width=4)


def box_head(opts=()):
    head = build_box_head(narrow(opts), SHAPE)
    randomise_norms(head)
    return head.eval()


def mask_head(opts=()):
    head = build_mask_head(narrow(opts), SHAPE)
    randomise_norms(head)
    return head.eval()


def names(head):
    return {name.rsplit(".", 1)[0] for name, _ in head.named_parameters()}


# --- structure ------------------------------------------------------------------------------------


def on_meta(build, opts, side):
    cfg = config(opts)
    with torch.device("meta"):
        return build(cfg, ShapeSpec(channels=256, height=side, width=side))


@pytest.mark.parametrize(
    ("opts", "ours", "single"), [([], 16_978_432, 15_207_424), (FC2, 52_444_160, 13_899_776)]
)
def test_acceptance_check_7_parameters_of_box_heads(opts, ours, single):
    head = on_meta(build_box_head, opts, 7)
    assert count(head) == ours
    first = head.fc1 if opts else head.conv1
    norms = count(head.fc1_norm) if opts else 0
    assert count(head) - 3 * (count(first) + norms) // 4 == single
    assert head.output_shape == ShapeSpec(channels=1024)


def test_acceptance_check_7_parameters_of_the_mask_head():
    head = on_meta(build_mask_head, [], 14)
    assert count(head) - count(head.predictor) == 24_950_032
    assert count(head.fc) == 19_669_776
    assert tuple(head.fc.weight.shape) == (784, 25088)
    assert tuple(head.predictor.weight.shape) == (80, 256, 1, 1)


def test_acceptance_check_7_names():
    levels = range(4)
    conv1 = {f"conv1.{i}" for i in levels}
    expected = conv1 | {"conv2", "conv3", "conv4"}
    box = box_head(["MODEL.ROI_BOX_HEAD.NUM_CONV", 4])
    assert names(box) == expected | {f"{n}.norm" for n in expected} | {"fc1"}
    assert names(box_head(FC2)) == {
        *(f"fc1.{i}" for i in levels), *(f"fc1_norm.{i}" for i in levels), "fc2", "fc2_norm",
    }  # fmt: skip
    fcn = expected | {f"{n}.norm" for n in expected} | {"deconv", "predictor"}
    branch = {"conv4_fc", "conv4_fc.norm", "conv5_fc", "conv5_fc.norm", "fc"}
    assert names(mask_head()) == fcn | branch
    assert names(mask_head(["MODEL.PANET.FC_FUSION", False])) == fcn
    # Convolutions before a norm have no bias.
    assert box.conv1[0].bias is None


def test_start_of_training():
    head = mask_head()
    assert float(head.predictor.weight.detach().std()) == pytest.approx((2 / 3) ** 0.5, rel=0.2)
    assert float(head.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not any(layer.bias.any() for layer in (head.fc, head.deconv, head.predictor))


# --- adaptive feature pooling ---------------------------------------------------------------------


def loop(head, pooled, fusion="max", order=range(4)):
    """The first layer of a head, level by level, as it is written down."""
    outputs = []
    for i in order:
        x = pooled.level(i)
        if hasattr(head, "conv1"):
            layer = head.conv1[i]
            y, norm = F.conv2d(x, layer.weight, layer.bias, padding=1), layer.norm
        else:
            y = head.fc1[i](x.flatten(1))[:, :, None, None]
            norm = None if head.fc1_norm is None else head.fc1_norm[i]
        outputs.append((y if norm is None else norm(y)).relu())
    stacked = torch.stack(outputs)
    fused = stacked.max(0).values if fusion == "max" else stacked.sum(0)
    return fused if hasattr(head, "conv1") else fused.flatten(1)


def first_layer(head, pooled):
    return head.conv1(pooled) if hasattr(head, "conv1") else head.fc1(pooled, head.fc1_norm)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", [[], FC2], ids=["conv", "fc"])
@pytest.mark.parametrize("norm", ["GN", "", "BN"])
@pytest.mark.parametrize("fusion", ["max", "sum"])
def test_acceptance_checks_5_and_6_first_layer_equals_the_loop(fusion, norm, kind, training):
    opts = [*kind, "MODEL.ROI_BOX_HEAD.NORM", norm, "MODEL.PANET.FUSION", fusion]
    head, pooled = box_head(opts).train(training).double(), regions(dtype=torch.float64)
    ours, theirs = first_layer(head, pooled), loop(head, pooled, fusion)
    torch.testing.assert_close(ours, theirs)
    assert float((ours > 0).float().mean()) > 0.1
    first = "fc1" if kind else "conv1"
    parameters = [p for n, p in head.named_parameters() if n.startswith(first)]
    weight = torch.randn_like(ours)
    mine = torch.autograd.grad((ours * weight).sum(), parameters)
    wanted = torch.autograd.grad((theirs * weight).sum(), parameters)
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [[], FC2], ids=["conv", "fc"])
def test_acceptance_check_5_order_of_levels_does_not_matter(kind):
    head, pooled = box_head(kind), regions()
    before = head(pooled)
    order = [2, 0, 3, 1]
    mixed = PooledRegions(
        [pooled.maps[i] for i in order], pooled.boxes, [pooled.poolers[i] for i in order]
    )
    assert not torch.allclose(head(mixed), before, atol=1e-3)
    lists = [head.conv1] if hasattr(head, "conv1") else [head.fc1, head.fc1_norm]
    for modules in lists:
        parts = list(modules)
        for i, j in enumerate(order):
            modules[i] = parts[j]
    assert torch.equal(head(mixed), before)


@pytest.mark.parametrize("num_conv", [1, 2])
@pytest.mark.parametrize("num_fc", [0, 1])
def test_whole_box_head_with_convolutions(num_conv, num_fc):
    opts = ["MODEL.ROI_BOX_HEAD.NUM_CONV", num_conv, "MODEL.ROI_BOX_HEAD.NUM_FC", num_fc]
    head, pooled = box_head(opts), regions()
    x = loop(head, pooled)
    if num_conv == 2:
        x = head.conv2.norm(F.conv2d(x, head.conv2.weight, padding=1)).relu()
    if num_fc:
        x = head.fc1(x.flatten(1)).relu()
    torch.testing.assert_close(head(pooled), x)
    shape = ShapeSpec(channels=64) if num_fc else ShapeSpec(channels=32, height=4, width=4)
    assert head.output_shape == shape


def test_whole_2fc_head():
    head, pooled = box_head(FC2), regions()
    expected = head.fc2_norm(head.fc2(loop(head, pooled))).relu()
    torch.testing.assert_close(head(pooled), expected)


def test_at_inference_one_pooled_level_is_alive(monkeypatch):
    made, alive = [], []
    pool = PooledRegions.level

    def level(self, index):
        alive.append(sum(reference() is not None for reference in made))
        out = pool(self, index)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(PooledRegions, "level", level)
    for head in (box_head(), box_head(FC2), mask_head()):
        made.clear()
        with torch.no_grad():
            first_layer(head, regions())
        assert len(made) == 4
    assert alive == [0] * 12


def test_heads_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="NUM_CONV and NUM_FC must not both be 0"):
        box_head(["MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "MODEL.ROI_BOX_HEAD.NUM_FC", 0])
    with pytest.raises(ValueError, match=r"ROI_MASK_HEAD.NUM_CONV must be at least 2 .* not 1"):
        mask_head(["MODEL.ROI_MASK_HEAD.NUM_CONV", 1])
    for build in (box_head, mask_head):
        with pytest.raises(ValueError, match=r"MODEL.PANET.FUSION must be one of max, sum, not 'm"):
            build(["MODEL.PANET.FUSION", "mean"])
    with pytest.raises(TypeError, match=r"set MODEL.ROI_HEADS.NAME to PANetROIHeads"):
        box_head()(torch.zeros(2, 8, 4, 4))


# --- mask head ------------------------------------------------------------------------------------


def without_branch(head, pooled):
    """The logits of the fully convolutional branch alone."""
    x = head.conv4(head.conv3(head.conv2(head.conv1(pooled))))
    return head.predictor(head.deconv(x).relu())


@torch.no_grad()
def test_acceptance_check_8_fully_connected_branch():
    head, pooled = mask_head(), regions()
    plain = without_branch(head, pooled)
    assert tuple(plain.shape) == (5, 3, 8, 8)
    nn.init.normal_(head.fc.weight)
    nn.init.normal_(head.fc.bias)
    added = head.layers(pooled) - plain
    assert added.min() >= -1e-5
    assert added.max() > 0.1
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-5, rtol=1e-5)

    stem = head.conv3(head.conv2(head.conv1(pooled)))
    fc_map = head.fc(head.conv5_fc(head.conv4_fc(stem)).flatten(1)).relu()
    torch.testing.assert_close(added[:, 0], fc_map.view(5, 8, 8), atol=1e-5, rtol=1e-5)

    head.fc.weight.zero_()
    for value, expected in ((-1.0, 0.0), (2.0, 2.0)):
        head.fc.bias.fill_(value)
        assert torch.equal(head.layers(pooled), plain + expected)
    head.fc.bias.zero_()
    head.fc.bias[8 * 3 + 5] = 1.0
    lit = torch.zeros(8, 8)
    lit[3, 5] = 1
    assert torch.equal(head.layers(pooled), plain + lit)


@torch.no_grad()
def test_branch_without_relu_lowers_logits():
    head, pooled = mask_head(["MODEL.PANET.FC_FUSION_RELU", False]), regions()
    head.fc.weight.zero_()
    head.fc.bias.fill_(-1.0)
    assert torch.equal(head.layers(pooled), without_branch(head, pooled) - 1)


@torch.no_grad()
def test_head_without_branch():
    head, pooled = mask_head(["MODEL.PANET.FC_FUSION", False]), regions()
    assert torch.equal(head.layers(pooled), without_branch(head, pooled))


@torch.no_grad()
def test_acceptance_check_9_loss_of_a_perfect_map():
    head, pooled = (
        mask_head(),
        regions(boxes=[Boxes(torch.tensor([[8.0, 8, 40, 40]])), *no_boxes(1)]),
    )
    for p in head.predictor.parameters():
        p.zero_()
    head.fc.weight.zero_()
    head.fc.bias.copy_(torch.eye(8).flatten() * 50)
    logits = head.layers(pooled)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    inside = (y >= 8) & (y < 40) & (x >= 8) & (x < 40) & ((y - 8) // 4 == (x - 8) // 4)
    losses = []
    for label in range(3):
        truth = Instances((64, 96), gt_classes=torch.tensor([label]))
        truth.gt_masks, truth.proposal_boxes = BitMasks(inside[None]), pooled.boxes[0]
        losses.append(float(mask_rcnn_loss(logits, [truth, truth[:0]])))
    # 8 of 64 cells are certain, the others at one half.
    assert losses == [pytest.approx(56 / 64 * 0.693147, rel=1e-4)] * 3


@pytest.mark.parametrize("fc_fusion", [True, False])
@torch.no_grad()
def test_inference_computes_the_predicted_class_only(fc_fusion):
    head, pooled = mask_head(["MODEL.PANET.FC_FUSION", fc_fusion]), regions()
    nn.init.normal_(head.predictor.bias)
    every = head.layers(pooled)
    classes = [torch.tensor([2, 0, 1]), torch.tensor([1, 1])]
    head.predictor.register_forward_hook(lambda *arguments: pytest.fail("all classes computed"))
    results = head(pooled, [Instances((64, 96), pred_classes=c) for c in classes])
    assert [tuple(r.pred_masks.shape) for r in results] == [(3, 1, 8, 8), (2, 1, 8, 8)]
    expected = every[torch.arange(5), cat(classes)].sigmoid()
    masks = cat([r.pred_masks for r in results])[:, 0]
    torch.testing.assert_close(masks, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_masks_without_class():
    head, pooled = mask_head(["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True]), regions()
    assert head.predictor.out_channels == 1
    labels = torch.tensor([2, 0, 1, 1, 1])
    result = head(pooled, [Instances((64, 96), pred_classes=labels)])[0]
    torch.testing.assert_close(result.pred_masks, head.layers(pooled).sigmoid())


@pytest.mark.parametrize("num_conv", [2, 3])
def test_other_depths(num_conv):
    head, pooled = mask_head(["MODEL.ROI_MASK_HEAD.NUM_CONV", num_conv]), regions()
    assert {f"conv{num_conv}_fc", f"conv{num_conv + 1}_fc"} < names(head)
    assert head.layers(pooled).shape == (5, 3, 8, 8)
