"""MNC's proposals: anchors of the published network, divisors, gradients through boxes."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import build_proposal_generator
from detectron2.structures import Boxes, ImageList, Instances

from instseg_ext.layers.gradient_limit import GradientLimit
from instseg_ext.methods.mnc.config import add_mnc_config
from instseg_ext.methods.mnc.rpn import MNCRPN
from instseg_ext.methods.mnc.sampling import SamplingOptions, anchor_overrides, sample_regions
from instseg_ext.modeling.legacy_anchors import legacy_cell_anchors

SIZE = (96, 128)
# (x1, y1, x2, y2) with x2 and y2 the last pixels, all sizes of a ratio before the next ratio.
PUBLISHED = [
    (-84, -40, 99, 55), (-176, -88, 191, 103), (-360, -184, 375, 199),
    (-56, -56, 71, 71), (-120, -120, 135, 135), (-248, -248, 263, 263),
    (-36, -80, 51, 95), (-80, -168, 95, 183), (-168, -344, 183, 359),
]  # fmt: skip


def test_anchors_are_those_of_the_published_network_in_another_order():
    """Check 15: anchor 3 * size + ratio is the published anchor 3 * ratio + size."""
    ours = legacy_cell_anchors(16, [128, 256, 512], [0.5, 1.0, 2.0]) + 8  # middle of the first cell
    published = torch.tensor(PUBLISHED) + torch.tensor([0, 0, 1, 1])
    order = [3 * ratio + size for size in range(3) for ratio in range(3)]
    assert ours.tolist() == published[order].tolist()


def test_the_difference_of_two_logits_is_their_softmax():
    """Check 15: what converted weights compute."""
    two = torch.randn(2, 50)
    torch.testing.assert_close((two[1] - two[0]).sigmoid(), two.softmax(dim=0)[1])


def build(std=0.3, **keys):
    torch.manual_seed(0)
    cfg = get_cfg()
    add_mnc_config(cfg)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "MNCRPN"
    cfg.MODEL.RPN.IN_FEATURES = ["map"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 30
    cfg.MODEL.RPN.BOUNDARY_THRESH = 0
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16, 32, 64]]
    for key, value in keys.items():
        cfg.MODEL.MNC[key] = value
    rpn = build_proposal_generator(cfg, {"map": ShapeSpec(channels=4, stride=8)})
    for weight in rpn.parameters():
        torch.nn.init.normal_(weight, std=std)
    return rpn


def batch():
    target = Instances(SIZE, gt_boxes=Boxes(torch.tensor([[8.0, 8, 60, 50], [70, 30, 120, 90]])))
    target.gt_classes = torch.tensor([2, 0])
    generator = torch.Generator().manual_seed(2)
    features = {"map": torch.randn((1, 4, 12, 16), generator=generator)}
    return ImageList(torch.zeros(1, 3, *SIZE), [SIZE]), features, [target]


def test_settings():
    rpn = build()
    assert isinstance(rpn, MNCRPN)
    assert rpn.normalizer == "labelled"
    assert not rpn.extra_pixel
    assert build(LEGACY_BOXES=True).extra_pixel


def test_state_dict_is_that_of_detectron2():
    names = {f"rpn_head.{part}.{kind}" for part in ("conv", "objectness_logits", "anchor_deltas")
             for kind in ("weight", "bias")}  # fmt: skip
    assert set(build().state_dict()) == names


@pytest.mark.parametrize("live", [True, False])
def test_later_losses_reach_the_deltas_through_boxes_alone(event_storage, live):
    """Check 16: with the bound there is a small gradient, without live boxes there is none."""
    rpn, (images, features, targets) = build(), batch()
    limit = GradientLimit(1 / 512) if live else None
    proposals, state = rpn.propose(images, features, limit)
    options = SamplingOptions(num_classes=3)
    (sampled,) = sample_regions(proposals, targets, options)
    overrides = anchor_overrides([sampled], proposals)
    losses = rpn.losses(state, targets, overrides)
    regions = (sampled.boxes.sin() * 100).sum()  # as if pooled there
    (sum(losses.values()) * 0 + regions).backward()
    gradient = rpn.rpn_head.anchor_deltas.bias.grad
    if live:
        rows = int((~sampled.is_gt).sum())
        assert 0 < gradient.abs().max() <= rows / 512
    else:
        assert not gradient.any()
    assert not rpn.rpn_head.objectness_logits.weight.grad.any()


def test_sampled_anchors_are_labelled(event_storage):
    """The labels of the sample are those of its anchors, where these are inside the image."""
    rpn, (images, features, targets) = build(std=0.05), batch()
    proposals, state = rpn.propose(images, features)
    sampled = sample_regions(proposals, targets, SamplingOptions(num_classes=3))
    overrides = anchor_overrides(sampled, proposals)
    seen = []
    plain = rpn._image_losses
    rpn._image_losses = lambda *args: seen.append(args[3]) or plain(*args)
    rpn.losses(state, targets, overrides)
    usable = rpn._usable(Boxes.cat(state.anchors), SIZE)
    for index, value in ((overrides[0].background, 0), (overrides[0].foreground, 1)):
        assert len(index)
        labels = seen[0][index]
        assert (labels[usable[index]] == value).all()
        assert (labels[~usable[index]] == -1).all()


def test_forward_proposes_and_trains(event_storage):
    rpn, (images, features, targets) = build(), batch()
    proposals, losses = rpn(images, features, targets)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
    assert len(proposals[0]) <= 30
    rpn.eval()
    proposals, losses = rpn(images, features)
    assert losses == {}
    assert set(proposals[0].get_fields()) == {
        "proposal_boxes", "objectness_logits", "anchor_index"
    }  # fmt: skip
