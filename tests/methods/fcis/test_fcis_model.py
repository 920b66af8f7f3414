"""The whole model: training, inference, nothing to look at (acceptance checks 11, 14 and 16)."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Instances
from methods.fcis.fcis_toys import batch, config, model_of
from methods.project import build

from instseg_ext import zoo
from instseg_ext.engine.optim import build_optimizer
from instseg_ext.layers.mask_voting import VotingRule
from instseg_ext.methods import fcis
from instseg_ext.modeling.dilated_resnet import FixedBatchNorm2d, UnpaddedStem

OBJECTS = ([(8, 8, 40, 40), (50, 10, 80, 50)], [(20, 5, 60, 45)])
NORM = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]


def test_record():
    method = fcis.METHOD
    assert method.name == "FCIS"
    assert method.meta_architectures == ("FCISRCNN",)


def test_a_model_with_fciss_proposals_alone_is_none_of_fcis():
    opts = ["MODEL.META_ARCHITECTURE", "InstSegRCNN", "MODEL.ROI_HEADS.NAME", "InstSegROIHeads"]
    assert zoo.method_of(config(*opts)).name == "MaskRCNN"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("META_ARCHITECTURE", "InstSegRCNN", "InstSegRCNN does not fit .* set it to FCISRCNN"),
        ("ROI_HEADS.NAME", "StandardROIHeads", r"Heads does not fit .* set it to FCISROIHeads"),
        ("ROI_HEADS.NAME", "MNCROIHeads", r"Heads does not fit .* set it to FCISROIHeads"),
        ("ROI_HEADS.IN_FEATURES", ["p9"], r"IN_FEATURES names 'p9'; the backbone has res4, res5"),
        ("RPN.IN_FEATURES", ["p9"], r"RPN\.IN_FEATURES names 'p9'; the backbone has res4, res5"),
        ("BACKBONE.NAME", "build_resnet_fpn_backbone", "one stride, .* build_fcis_resnet_backbone"),
        ("MASK_ON", False, r"FCISRCNN needs MODEL\.MASK_ON True"),
        ("FCIS.BG_IOU", [0.5], r"MODEL\.FCIS\.BG_IOU must be two rising numbers"),
    ],
)
def test_parts_that_do_not_fit_are_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        model_of(f"MODEL.{key}", value)


def test_state_dict_has_the_published_layers():
    names = set(model_of().state_dict())
    heads = {name for name in names if name.startswith("roi_heads.")}
    layers = ("conv_new", "cls_seg", "bbox")
    assert heads == {f"roi_heads.{x}.{p}" for x in layers for p in ("weight", "bias")}
    assert "proposal_generator.rpn_head.conv.weight" in names
    assert "backbone.res4.0.conv1.norm.running_var" in names


@pytest.mark.parametrize("ohem", [True, False])
def test_a_step_on_two_images(ohem):
    model = model_of("MODEL.FCIS.OHEM", ohem)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss_of():
        torch.manual_seed(1)  # the same anchors and regions
        return sum(model(batch(*OBJECTS)).values())

    before = loss_of()
    before.backward()
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == learned
    optimizer.step()
    assert float(loss_of().detach()) < float(before.detach())


def test_acceptance_check_16_no_objects():
    model = model_of(*NORM)
    losses = model(batch([], []))
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("output", ["bool", "rle"])
@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.FCIS.VOTE_MIN_SCORE", 1.0],
        ["MODEL.FCIS.MIN_DROP_SIZE", 1000.0],
        ["MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 1000],
    ],
    ids=["score", "candidates", "proposals"],
)
def test_acceptance_check_16_no_detections(output, opts):
    model = model_of(*opts, "INSTSEG.MASK_OUTPUT", output).eval()
    with torch.no_grad():
        result = model(batch(*OBJECTS))[0]["instances"]
    assert len(result) == 0
    if output == "bool":
        assert result.pred_masks.shape == (0, 64, 96)
        assert result.pred_masks.dtype == torch.bool


@pytest.mark.parametrize("vote", [True, False])
def test_detections_at_the_original_size(vote):
    model = model_of("MODEL.FCIS.VOTE", vote).eval()
    sample = {**batch(OBJECTS[0])[0], "height": 81, "width": 123}
    with torch.no_grad():
        found = model([sample])[0]["instances"]
    assert 0 < len(found) <= 100
    assert found.pred_masks.shape == (len(found), 81, 123)
    assert (found.scores >= 0.001).all()
    assert set(found.pred_classes.tolist()) <= {0, 1, 2}


@torch.no_grad()
def test_acceptance_check_11_a_second_round_of_the_same_changes_no_mask():
    """With zero deltas every voter is there twice, with half the weight."""
    results = []
    for rounds in (1, 2):
        model = model_of("MODEL.FCIS.ITER", rounds).eval()
        model.roi_heads.bbox.weight.zero_()
        results.append(model(batch(OBJECTS[0]))[0]["instances"])
    assert len(results[0]) == len(results[1]) > 0
    torch.testing.assert_close(results[0].scores, results[1].scores)
    assert (results[0].pred_masks != results[1].pred_masks).float().mean() < 1e-3


@torch.no_grad()
def test_candidates_come_out_without_postprocessing():
    model = model_of("MODEL.FCIS.MIN_DROP_SIZE", 0.0).eval()
    found = model.inference(batch(*OBJECTS), do_postprocess=False)
    assert [len(x) for x in found] == [80, 80]
    assert found[1].candidate_scores.shape == (80, 3)
    assert found[1].candidate_masks.shape == (80, 21, 21)


def test_rules_of_the_vote():
    rule = model_of("TEST.DETECTIONS_PER_IMAGE", 7).voting
    assert rule == VotingRule.fcis(max_detections=7)
    assert (rule.nms_threshold, rule.voter_iou, rule.mask_threshold) == (0.3, 0.5, 0.4)
    own = model_of("MODEL.FCIS.VOTE", False, "MODEL.FCIS.VOTE_NMS", 0.4).voting
    assert own == VotingRule.own_masks(nms_threshold=0.4, mask_threshold=0.4)


def test_boxes_of_the_authors():
    assert not model_of().legacy_boxes
    assert model_of("MODEL.FCIS.LEGACY_BOXES", True).legacy_boxes


def test_precomputed_proposals():
    model = model_of("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
    inputs = batch(*OBJECTS)
    for item in inputs:
        item["proposals"] = Instances(
            (64, 96),
            proposal_boxes=item["instances"].gt_boxes,
            objectness_logits=torch.zeros(len(item["instances"])),
        )
    assert sorted(model(inputs)) == ["loss_box_reg", "loss_cls", "loss_mask"]
    with torch.no_grad():
        assert len(model.eval()(inputs)[0]["instances"]) > 0


class TestBackbone:
    @pytest.mark.parametrize(("dilation", "strides"), [(1, (16, 32)), (2, (16, 16)), (4, (8, 8))])
    @pytest.mark.parametrize("depth", [18, 50])
    def test_acceptance_check_14_strides(self, depth, dilation, strides):
        opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES5_DILATION", dilation]
        opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]
        shapes = build(config(*opts)).backbone.output_shape()
        assert tuple(shapes[name].stride for name in ("res4", "res5")) == strides

    def test_acceptance_check_14_published_dilation(self):
        backbone = build(config()).backbone
        for block in backbone.res5:
            assert block.conv2.dilation == block.conv2.padding == (2, 2)
        for stage in (backbone.res2, backbone.res3, backbone.res4):
            assert all(block.conv2.dilation == (1, 1) for block in stage)
        # The stride is in the first convolution and the projection.
        assert backbone.res4[0].conv1.stride == backbone.res4[0].shortcut.stride == (2, 2)
        assert backbone.res5[0].shortcut.stride == (1, 1)

    @pytest.mark.parametrize("dilation", [1, 2, 4])
    def test_maps_have_the_promised_size(self, dilation):
        backbone = model_of("MODEL.RESNETS.RES5_DILATION", dilation).backbone
        found = backbone(torch.zeros(1, 3, 64, 96))
        for name, shape in backbone.output_shape().items():
            assert found[name].shape[2:] == (64 // shape.stride, 96 // shape.stride)

    def test_norms_learn_behind_the_frozen_stages(self):
        model = model_of()
        norms = {
            name: module
            for name, module in model.backbone.named_modules()
            if isinstance(module, FrozenBatchNorm2d)
        }
        assert {type(module) for module in norms.values()} == {FixedBatchNorm2d}
        for name, module in norms.items():
            frozen = name.startswith(("stem", "res2"))
            assert module.weight.requires_grad != frozen, name
            assert module.bias.requires_grad != frozen, name
        assert isinstance(model.backbone.stem, UnpaddedStem)

    def test_both_can_be_left_out(self):
        opts = ["MODEL.FCIS.LEGACY_STEM", False, "MODEL.FCIS.TRAIN_BN_AFFINE", False]
        backbone = model_of(*opts).backbone
        kinds = {type(m) for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d)}
        assert kinds == {FrozenBatchNorm2d}
        assert not isinstance(backbone.stem, UnpaddedStem)

    @pytest.mark.parametrize(
        ("opts", "message"),
        [
            (["MODEL.RESNETS.RES5_DILATION", 3], r"RES5_DILATION must be 1, 2 .* not 3"),
            (
                ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]],
                r"no deformable stages: set MODEL.RESNETS.DEFORM_ON_PER_STAGE",
            ),
        ],
    )
    def test_settings_that_make_no_sense(self, opts, message):
        with pytest.raises(ValueError, match=message):
            model_of(*opts)


def test_rate_of_the_head():
    cfg = config("SOLVER.BASE_LR", 0.001, "SOLVER.IMS_PER_BATCH", 8)
    model = model_of()
    rates = {p: g["lr"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    heads = model.roi_heads
    assert rates[heads.conv_new.weight] == rates[heads.conv_new.bias] == pytest.approx(0.003)
    assert rates[heads.cls_seg.weight] == rates[heads.bbox.bias] == pytest.approx(0.001)
