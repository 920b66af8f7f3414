"""The whole model: gradients between stages, nothing to look at (acceptance checks 16 and 17)."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from methods.mnc.mnc_toys import C4, OBJECTS, batch, config, model_of, proposals_of, randomise

from instseg_ext.methods import mnc
from instseg_ext.methods.mnc import arch
from instseg_ext.methods.mnc.arch import MNCRCNN
from instseg_ext.methods.mnc.roi_heads import MNCROIHeads

NAMES = {f"loss_{kind}" for kind in ("mask", "cls", "seg_cls", "box_reg")}
RPN = {"loss_rpn_cls", "loss_rpn_loc"}


def suffixed(*suffixes):
    return {f"{name}_{suffix}" for name in NAMES for suffix in suffixes}


def losses_of(model, inputs, seed=1):
    torch.manual_seed(seed)
    with EventStorage():
        return model(inputs)


def test_record():
    assert mnc.METHOD.name == "MNC"
    assert mnc.METHOD.meta_architectures == ("MNCRCNN",)


def test_names_of_parameters():
    heads = {name.partition(".")[2] for name in model_of().state_dict() if "roi_heads" in name}
    expected = [
        *("mask_head.fc1", "mask_head.predictor", "box_tower.fc1", "box_tower.fc2"),
        *("mask_tower.fc1", "mask_tower.fc2", "cls_score", "seg_cls_score", "bbox_pred"),
    ]
    assert heads == {f"{name}.{part}" for name in expected for part in ("weight", "bias")}


@pytest.mark.parametrize("opts", [[], C4], ids=["FPN", "C4"])
def test_a_step_lowers_the_losses_of_all_stages(opts):
    model = model_of(opts)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = losses_of(model, batch(*OBJECTS))
    assert set(before) == RPN | suffixed("s3", "s5")
    sum(before.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    after = losses_of(model, batch(*OBJECTS))
    assert sum(after.values()).item() < sum(before.values()).item()


def test_three_stages():
    model = model_of(["MODEL.MNC.TRAIN_STAGES", 3, "MODEL.MNC.NUM_STAGES", 3])
    assert set(losses_of(model, batch(*OBJECTS))) == RPN | suffixed("s3")
    with torch.no_grad():
        found = model.eval().inference(batch(*OBJECTS), do_postprocess=False)
    assert [len(x) for x in found] == [12, 12]


def box_gradients(losses, layer):
    return torch.autograd.grad(losses, layer.weight, allow_unused=True, retain_graph=True)[0]


def test_acceptance_check_16_masks_and_classes_train_the_boxes_of_stage_1():
    model = randomise(model_of())
    layer = model.proposal_generator.rpn_head.anchor_deltas
    losses = losses_of(model, batch(*OBJECTS))
    for suffix in ("s3", "s5"):
        gradient = box_gradients(sum(losses[name] for name in suffixed(suffix)), layer)
        assert gradient.abs().max() > 0
        assert gradient.isfinite().all()
    # stage 5 trains the boxes of stage 3 beside their own loss
    own = sum(losses[name] for name in suffixed("s5") if "box_reg" not in name)
    seen = model.roi_heads.bbox_pred
    through_boxes = box_gradients(own, seen)
    assert through_boxes[:-4].abs().max() > 0
    assert not through_boxes[-4:].any()


def test_acceptance_check_16_without_box_gradients_they_do_not():
    model = randomise(model_of(["MODEL.MNC.BOX_GRAD", False]))
    losses = losses_of(model, batch(*OBJECTS))
    total = sum(losses[name] for name in suffixed("s3", "s5"))
    assert box_gradients(total, model.proposal_generator.rpn_head.anchor_deltas) is None
    own = sum(losses[name] for name in suffixed("s5") if "box_reg" not in name)
    assert box_gradients(own, model.roi_heads.bbox_pred) is None


def test_acceptance_check_16_the_bound_is_that_of_one_image_and_follows_loss_scaling(monkeypatch):
    """What reaches the deltas is at most 1/512 for one image, whatever the trainer scales by."""
    model = randomise(model_of())
    limits = []
    original = model.roi_heads.box_limit
    monkeypatch.setattr(
        model.roi_heads, "box_limit", lambda n: limits.append(original(n)) or limits[-1]
    )
    gradients = []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        losses = losses_of(model, batch(*OBJECTS))
        (sum(losses[name] for name in suffixed("s3", "s5")) * scale).backward()
        gradients.append(model.proposal_generator.rpn_head.anchor_deltas.weight.grad / scale)
    assert [limit.largest for limit in limits] == [1 / 1024] * 2
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("objects", [([],), ([], OBJECTS[0])], ids=["none", "one of two"])
def test_acceptance_check_17_images_without_objects(objects):
    model = model_of()
    losses = losses_of(model, batch(*objects))
    assert all(torch.isfinite(value) for value in losses.values())
    if len(objects) == 1:
        assert float(losses["loss_mask_s3"]) == float(losses["loss_mask_s5"]) == 0
        assert float(losses["loss_box_reg_s3"]) == 0
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_acceptance_check_17_no_foreground():
    model = model_of(["MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.0, "MODEL.MNC.TRAIN_STAGES", 3])
    losses = losses_of(model, batch(*OBJECTS))
    assert float(losses["loss_mask_s3"]) == float(losses["loss_box_reg_s3"]) == 0
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("mix", [True, False])
def test_anchors_take_the_labels_of_their_regions(monkeypatch, mix):
    model = model_of(["MODEL.MNC.MIX_INDEX", mix])
    given = []
    original = model.proposal_generator.losses

    def losses(state, targets, overrides=None):
        given.append(overrides)
        return original(state, targets, overrides)

    monkeypatch.setattr(model.proposal_generator, "losses", losses)
    losses_of(model, batch(*OBJECTS))
    if not mix:
        assert given == [None]
        return
    assert [len(image) for image in given] == [2]
    assert sum(len(record.background) for record in given[0]) > 0


@pytest.mark.parametrize("training", [True, False])
def test_loaded_proposals(training):
    model = model_of(["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"])
    assert model.proposal_generator is None
    inputs = batch(OBJECTS[0])
    inputs[0]["proposals"] = proposals_of([[6, 6, 42, 38], [48, 8, 84, 54]])
    if training:
        losses = losses_of(model, inputs)
        assert set(losses) == suffixed("s3", "s5")
        sum(losses.values()).backward()
    else:
        with torch.no_grad():
            assert len(model.eval().inference(inputs, do_postprocess=False)[0]) == 4


@pytest.mark.parametrize("output", ["bool", "rle"])
@torch.no_grad()
def test_detections(output):
    model = randomise(model_of(["INSTSEG.MASK_OUTPUT", output])).eval()
    inputs = batch(*OBJECTS)
    inputs[0]["height"], inputs[0]["width"] = 32, 48
    found = [result["instances"] for result in model(inputs)]
    assert len(found[0]) > 0
    assert found[0].image_size == (32, 48)
    if output == "bool":
        assert found[0].pred_masks.shape == (len(found[0]), 32, 48)
        assert found[0].pred_masks.dtype == torch.bool
    else:
        assert len(found[0].pred_masks_rle) == len(found[0])


@torch.no_grad()
def test_without_votes_each_detection_has_its_own_mask():
    voted, own = (randomise(model_of(["MODEL.MNC.VOTE", vote])).eval() for vote in (True, False))
    one, two = (model(batch(*OBJECTS))[0]["instances"] for model in (voted, own))
    assert own.voting.voter_iou is None
    candidates = own.inference(batch(*OBJECTS), do_postprocess=False)[0]
    distance = torch.cdist(two.pred_boxes.tensor, candidates.candidate_boxes.tensor)
    assert distance.min(dim=1).values.max() < 1e-3
    assert not torch.equal(one.pred_boxes.tensor[:3], two.pred_boxes.tensor[:3])


@torch.no_grad()
def test_shortest_sides_are_those_of_the_original_image():
    model = model_of(["MODEL.MNC.MIN_SIDE", 4.0]).eval()
    inputs = batch(*OBJECTS)
    inputs[0]["height"], inputs[0]["width"] = 32, 48
    images = model.preprocess_image(inputs)
    assert images.min_sides == [8.0, 4.0]
    first, second = model.proposal_generator(images, model.backbone(images.tensor))[0]
    for found, side in ((first, 8), (second, 4)):
        sides = found.proposal_boxes.tensor[:, 2:] - found.proposal_boxes.tensor[:, :2]
        assert sides.min() >= side


def test_bf16_on_the_cpu():
    model = model_of(["INSTSEG.PRECISION", "bf16"])
    losses = losses_of(model, batch(*OBJECTS))
    assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        found = model.eval().inference(batch(*OBJECTS), do_postprocess=False)[0]
    assert found.candidate_masks.dtype == found.candidate_scores.dtype == torch.float32


def test_pictures_of_training_show_boxes_without_graph(monkeypatch):
    model = model_of()
    model.vis_period = 1
    shown = []
    monkeypatch.setattr(model, "visualize_training", lambda inputs, found: shown.extend(found))
    losses_of(model, batch(*OBJECTS))
    assert len(shown) == 2
    assert not shown[0].proposal_boxes.tensor.requires_grad


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "must be MNCRPN or PrecomputedProposals, not RPN"),
        ("MODEL.MNC.NUM_STAGES", 4, r"MODEL\.MNC\.NUM_STAGES must be 3 or 5, not 4"),
        ("MODEL.MNC.TOWER", "fc6", r"MODEL\.MNC\.TOWER must be one of fc, res5, not 'fc6'"),
        ("MODEL.MNC.WARP_MODE", "max", r"MODEL\.MNC\.WARP_MODE must be one of single, maxsample"),
        ("MODEL.MNC.EXT_WARP", "14", r"MODEL\.MNC\.EXT_WARP must be one of same, direct14"),
        ("MODEL.MNC.WARP_SIZE", 20, r"MODEL\.MNC\.WARP_SIZE must be a multiple of POOL_SIZE 14"),
        ("MODEL.MNC.POOL_SIZE", 7, r"MODEL\.MNC\.POOL_SIZE must be even, not 7"),
        ("MODEL.MNC.MASK_SIZE", 0, r"MODEL\.MNC\.MASK_SIZE must be positive"),
        ("MODEL.MNC.BOX_GRAD_CLIP", 0.0, r"MODEL\.MNC\.BOX_GRAD_CLIP must be positive"),
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, "MNC has boxes of each class"),
        ("MODEL.META_ARCHITECTURE", "InstSegRCNN", "InstSegRCNN does not fit .* to MNCRCNN"),
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "RCNN does not fit .* set it to MNCRCNN"),
        ("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "Heads does not fit .* to MNCROIHeads"),
        ("MODEL.ROI_HEADS.NAME", "FCISROIHeads", "Heads does not fit .* set it to MNCROIHeads"),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p9"], "IN_FEATURES names 'p9'; .* has p2, p3, p4"),
        ("MODEL.ROI_HEADS.IN_FEATURES", [], "IN_FEATURES is empty; the backbone has p2, p3, p4"),
        ("MODEL.RPN.IN_FEATURES", ["p9"], r"RPN\.IN_FEATURES names 'p9'; .* has p2, p3, p4"),
        ("MODEL.MASK_ON", False, r"MNCRCNN needs MODEL\.MASK_ON True and .*KEYPOINT_ON False"),
        ("MODEL.KEYPOINT_ON", True, r"MNCRCNN needs MODEL\.MASK_ON True and .*KEYPOINT_ON False"),
    ],
)
def test_what_is_not_allowed_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        model_of([key, value])


def test_own_architectures_and_heads_may_be_derived(monkeypatch):
    for registry, parent in ((META_ARCH_REGISTRY, MNCRCNN), (ROI_HEADS_REGISTRY, MNCROIHeads)):
        own = type(f"Own{parent.__name__}", (parent,), {})
        monkeypatch.setitem(registry._obj_map, own.__name__, own)
    # configs are checked against the methods known here before a model is built
    cfg = config(["MODEL.ROI_HEADS.NAME", "OwnMNCROIHeads"])
    cfg.MODEL.META_ARCHITECTURE = "OwnMNCRCNN"
    model = build_model(cfg)
    assert type(model).__name__ == "OwnMNCRCNN"
    assert type(model.roi_heads).__name__ == "OwnMNCROIHeads"


def test_graph_is_cut_from_copies_only():
    boxes = proposals_of([[0, 0, 4, 4]], boxes_require_grad=True)
    (plain,) = arch._without_graph([boxes])
    assert not plain.proposal_boxes.tensor.requires_grad
    assert boxes.proposal_boxes.tensor.requires_grad
