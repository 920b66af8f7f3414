"""The meta-architecture: from raw outputs to instances, from ground truth to losses."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch import nn

import instseg_ext
from instseg_ext.methods.yolact.box_coding import encode, to_corners
from instseg_ext.methods.yolact.head import YOLACTOutputs

TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.YOLACT.WIDTH", 16,
    "MODEL.YOLACT.NUM_CLASSES", 3,
    "MODEL.YOLACT.NUM_PROTOS", 2,
    "INSTSEG.STRETCH", [64, 64],
    "MODEL.YOLACT.ANCHOR_SCALES", [[8.0], [16.0], [32.0], [48.0], [64.0]],
]  # fmt: skip
SIDE = 64
PROTO = 16


@pytest.fixture(scope="module")
def make_model():
    def make(*opts):
        torch.manual_seed(0)
        return build_model(instseg_ext.get_config("YOLACT/nuclei_yolact_R_18", [*TINY, *opts]))

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model().eval()


@pytest.fixture(scope="module")
def scoring_model(make_model):
    return make_model("MODEL.YOLACT.MASK_IOU.ENABLED", True).eval()


def images_of(num=1):
    return ImageList(torch.zeros(num, 3, SIDE, SIDE), [(SIDE, SIDE)] * num)


def raw_of(model, detections, prototypes):
    """Return raw outputs of one image that hold exactly some detections.

    Args:
        model: tells the anchors.
        detections: (anchor, class, logit, box or None for the anchor's own, coefficients).
        prototypes: (2, 16, 16).
    """
    sizes = ((8, 8), (4, 4), (2, 2), (1, 1), (1, 1))
    num = 3 * sum(h * w for h, w in sizes)
    logits = torch.zeros(1, num, 4)
    logits[..., -1] = 20
    deltas, coefficients = torch.zeros(1, num, 4), torch.zeros(1, num, 2)
    raw = YOLACTOutputs(deltas, logits, coefficients, prototypes[None], None, sizes)
    anchors = model.anchors(raw)
    for anchor, label, logit, box, weights in detections:
        logits[0, anchor] = torch.tensor([0.0, 0, 0, 0])
        logits[0, anchor, label] = logit
        if box is not None:
            deltas[0, anchor] = encode(torch.tensor(box), anchors[anchor])
        coefficients[0, anchor] = torch.tensor(weights)
    return raw


def constant(value):
    return torch.full((2, PROTO, PROTO), value)


def infer(model, raw, height=48, width=80):
    return model.inference(raw, images_of(), [{"height": height, "width": width}])[0]


def test_mask_is_the_upsampled_window_of_its_box(model):
    box = [0.25, 0.3, 0.6, 0.8]
    raw = raw_of(model, [(10, 1, 5.0, box, [1.0, 0.0])], constant(30.0))
    found = infer(model, raw)
    best = found[found.scores > 0.5]
    assert best.pred_classes.tolist() == [1]
    low = torch.zeros(1, 1, PROTO, PROTO)
    # Rows from 0.3 * 16 - 1 = 3.8 to 0.8 * 16 + 1 = 13.8, columns from 3 to 10.6.
    low[..., 4:14, 3:11] = 1
    expected = F.interpolate(low, (48, 80), mode="bilinear", align_corners=False)[0, 0] > 0.5
    assert torch.equal(best.pred_masks[0], expected)
    wanted = torch.tensor(box) * torch.tensor([80, 48, 80, 48])
    torch.testing.assert_close(best.pred_boxes.tensor[0], wanted, rtol=1e-4, atol=1e-4)


def test_negative_coefficients_give_an_empty_mask(model):
    raw = raw_of(model, [(10, 1, 5.0, [0.25, 0.3, 0.6, 0.8], [-1.0, 0.0])], constant(30.0))
    found = infer(model, raw)
    assert len(found)
    assert not found.pred_masks.any()


def test_masks_go_straight_to_the_original_size(model):
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.randn(2, PROTO, PROTO, generator=generator).relu() * 3
    raw = raw_of(model, [(10, 0, 5.0, [0.0, 0.0, 1.0, 1.0], [0.9, -0.8])], prototypes)
    found = infer(model, raw, 480, 640)
    low = (prototypes[0] * 0.9 - prototypes[1] * 0.8).sigmoid()
    direct = F.interpolate(low[None, None], (480, 640), mode="bilinear", align_corners=False)[0, 0]
    certain = (direct - 0.5).abs() > 1e-5
    assert torch.equal(found.pred_masks[0][certain], (direct > 0.5)[certain])
    twice = F.interpolate(low[None, None], (SIDE, SIDE), mode="bilinear", align_corners=False)
    twice = F.interpolate(twice, (480, 640), mode="bilinear", align_corners=False)[0, 0]
    assert not torch.equal(found.pred_masks[0], twice > 0.5)


def test_boxes_are_clipped_and_boxes_outside_are_dropped(model):
    raw = raw_of(
        model,
        [
            (10, 0, 5.0, [-0.2, 0.2, 0.5, 1.4], [1.0, 0.0]),
            (20, 1, 5.0, [1.1, 0.2, 1.4, 0.5], [1.0, 0.0]),
        ],
        constant(30.0),
    )
    found = infer(model, raw)
    best = found[found.scores > 0.5]
    assert best.pred_classes.tolist() == [0]
    expected = torch.tensor([[0.0, 0.2 * 48, 40.0, 48.0]])
    torch.testing.assert_close(best.pred_boxes.tensor, expected, rtol=1e-4, atol=1e-3)
    assert (found.pred_boxes.tensor[:, 2] > found.pred_boxes.tensor[:, 0]).all()


def test_a_box_of_almost_infinite_width_is_clipped(model):
    raw = raw_of(model, [(10, 1, 5.0, [0.25, 0.3, 0.6, 0.8], [1.0, 0.0])], constant(30.0))
    raw.box_deltas[0, 10, 2] = 440.0  # e ** 88: finite, but not when scaled to 80 pixels
    found = infer(model, raw)
    best = found[found.scores > 0.5]
    expected = torch.tensor([[0.0, 0.3 * 48, 80.0, 0.8 * 48]])
    torch.testing.assert_close(best.pred_boxes.tensor, expected, rtol=1e-4, atol=1e-3)


def test_no_candidate_gives_no_instance(model, scoring_model):
    for each in (model, scoring_model):
        found = infer(each, raw_of(each, [], constant(1.0)))
        assert len(found) == 0
        assert found.pred_masks.shape == (0, 48, 80)
        assert found.pred_boxes.tensor.shape == (0, 4)
    assert found.mask_scores.shape == (0,)


def test_score_threshold_is_strict(make_model):
    probability = torch.tensor([2.0, 0, 0, 0]).softmax(0)[0].item()
    raw_args = [(10, 0, 2.0, None, [1.0, 0.0])], constant(1.0)
    below = torch.nextafter(torch.tensor(probability), torch.tensor(0.0)).item()
    for threshold, expected in ((probability, 0), (below, 1)):
        model = make_model("MODEL.YOLACT.SCORE_THRESH", threshold).eval()
        found = model.detections(raw_of(model, *raw_args))[0]
        assert len(set(found.anchors.tolist())) == expected


@pytest.mark.parametrize("field", ["class_logits", "box_deltas", "coefficients"])
def test_an_anchor_with_a_value_that_is_not_finite_is_left_out(model, field):
    raw = raw_of(
        model,
        [(10, 0, 5.0, None, [1.0, 0.0]), (30, 1, 4.0, None, [1.0, 0.0])],
        constant(1.0),
    )
    getattr(raw, field)[0, 10, 0] = torch.nan
    found = model.detections(raw)[0]
    assert set(found.anchors.tolist()) == {30}


def test_mask_scores_rank_masks_and_nothing_else(model, scoring_model):
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(2, PROTO, PROTO, generator=generator).relu() * 3
    chosen = [
        (10, 1, 5.0, [0.1, 0.1, 0.5, 0.6], [1.0, -0.3]),
        (50, 2, 3.0, [0.5, 0.4, 0.9, 0.9], [0.5, 0.8]),
    ]
    with torch.no_grad():
        scoring_model.head.mask_iou.pred.bias.copy_(torch.tensor([0.25, 0.5, 1.5]))
    plain = infer(model, raw_of(model, chosen, prototypes))
    scored = infer(scoring_model, raw_of(scoring_model, chosen, prototypes))
    assert not plain.has("mask_scores")
    assert torch.equal(scored.scores, plain.scores)
    assert torch.equal(scored.pred_classes, plain.pred_classes)
    assert torch.equal(scored.pred_masks, plain.pred_masks)
    masks = torch.zeros(len(scored), 1, PROTO, PROTO)
    raw = raw_of(scoring_model, chosen, prototypes)
    found = scoring_model.detections(raw)[0]
    for mask, box, weights in zip(masks, found.boxes, found.coefficients, strict=True):
        low, high = (box[:2] * PROTO - 1).ceil().clamp(min=0), (box[2:] * PROTO + 1).ceil()
        rows, cols = (slice(int(low[i]), int(high[i])) for i in (1, 0))
        mask[:, rows, cols] = (prototypes * weights[:, None, None]).sum(0).sigmoid()[rows, cols]
    with torch.no_grad():
        quality = scoring_model.head.mask_iou(masks)
    expected = found.scores * quality[torch.arange(len(found.scores)), found.classes]
    torch.testing.assert_close(scored.mask_scores, expected)
    # Nothing bounds the predicted IoU from above.
    assert (
        scored.mask_scores[scored.pred_classes == 2] > scored.scores[scored.pred_classes == 2]
    ).all()


def objects(boxes, classes, crowd=None):
    gt = Instances((SIDE, SIDE))
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    gt.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    gt.gt_classes = torch.tensor(classes, dtype=torch.int64)
    gt.gt_masks = BitMasks(masks)
    if crowd is not None:
        gt.gt_is_crowd = torch.tensor(crowd)
    return gt


def training_raw(model, num=1):
    features = model.backbone(torch.zeros(num, 3, SIDE, SIDE))
    return model.train().head(features)


def test_crowds_make_anchors_neutral_and_join_no_loss(make_model):
    model = make_model()
    raw = training_raw(model)
    boxes, classes = [(8, 8, 24, 24), (32, 0, 64, 64)], [1, 2]
    with_crowd = objects(boxes, classes, [False, True])
    without = objects(boxes[:1], classes[:1])
    (found,) = model.targets(raw, images_of(), [with_crowd])
    (plain,) = model.targets(raw, images_of(), [without])
    positive = (plain.labels >= 0) & (plain.labels < 3)
    assert torch.equal(found.labels[positive], plain.labels[positive])
    corners = to_corners(model.anchors(raw))
    inside = (corners[:, 0] > 0.55) & (corners[:, 2] < 0.95) & (corners[:, 1] > 0)
    inside &= corners[:, 3] < 1
    assert inside.any()
    assert (found.labels[inside] == -1).all()
    assert (plain.labels[inside] == 3).all()
    losses, expected = (model.losses(raw, images_of(), [gt]) for gt in (with_crowd, without))
    for name in ("loss_box", "loss_mask", "loss_semantic"):
        torch.testing.assert_close(losses[name], expected[name])


def test_losses_are_divided_by_the_positive_anchors_of_the_batch(make_model):
    model = make_model()
    raw = training_raw(model, 2)
    images = [objects([(8, 8, 24, 24)], [1]), objects([(30, 20, 60, 62), (2, 40, 20, 60)], [0, 2])]
    both = model.losses(raw, images_of(2), images)
    parts, counts = [], []
    for n, gt in enumerate(images):
        one = YOLACTOutputs(*(x[n : n + 1] for x in raw[:5]), raw.level_sizes)
        parts.append(model.losses(one, images_of(), [gt]))
        labels = model.targets(one, images_of(), [gt])[0].labels
        counts.append(int(((labels >= 0) & (labels < 3)).sum()))
    for name in ("loss_cls", "loss_box", "loss_mask"):
        total = sum(part[name] * count for part, count in zip(parts, counts, strict=True))
        torch.testing.assert_close(both[name], total / sum(counts))
    mean = sum(part["loss_semantic"] for part in parts) / 2
    torch.testing.assert_close(both["loss_semantic"], mean)


@pytest.mark.parametrize("scoring", [False, True])
def test_a_batch_without_objects_trains_and_reaches_every_parameter(make_model, scoring):
    model = make_model("MODEL.YOLACT.MASK_IOU.ENABLED", scoring)
    losses = model.losses(training_raw(model, 2), images_of(2), [objects([], [])] * 2)
    assert set(losses) == {"loss_cls", "loss_box", "loss_mask", "loss_semantic"} | (
        {"loss_mask_iou"} if scoring else set()
    )
    assert all(losses[name] == 0 for name in losses if name != "loss_semantic")
    sum(losses.values()).backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []


@pytest.mark.parametrize(
    ("choice", "images", "frozen"),
    [("auto", 5, True), ("auto", 6, False), ("always", 8, True), ("never", 1, False)],
)
def test_batch_norms_are_kept_when_too_few_images_share_them(make_model, choice, images, frozen):
    model = make_model(
        "MODEL.YOLACT.FREEZE_BN", choice, "SOLVER.IMS_PER_BATCH", images, "MODEL.RESNETS.NORM", "BN"
    )
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.training != frozen
        assert norm.weight.requires_grad != frozen
    before = norms[0].running_mean.clone()
    model.backbone(torch.rand(2, 3, SIDE, SIDE))
    assert torch.equal(norms[0].running_mean, before) == frozen


def test_config_errors_name_the_key(make_model):
    with pytest.raises(ValueError, match=r"INSTSEG.STRETCH must be .*\[0, 0\]"):
        make_model("INSTSEG.STRETCH", [0, 0])
    with pytest.raises(ValueError, match=r"MODEL.YOLACT.IN_FEATURES has 4 entries"):
        make_model("MODEL.YOLACT.IN_FEATURES", ["p3", "p4", "p5", "p6"])
    with pytest.raises(ValueError, match=r"MODEL.YOLACT.FREEZE_BN"):
        make_model("MODEL.YOLACT.FREEZE_BN", "sometimes")


def test_only_mask_scoring_has_a_score_of_its_own_for_masks():
    from instseg_ext.zoo import method_of

    for name, expected in (
        ("YOLACT/yolact_R_50_550", {}),
        ("YOLACT/yolact_plus_R_50_550", {"segm_score_field": "mask_scores"}),
    ):
        cfg = instseg_ext.get_config(name, ["MODEL.DEVICE", "cpu"])
        assert dict(method_of(cfg).evaluator_hints(cfg)) == expected


@pytest.mark.parametrize("levels", [3, 4, 6])
def test_the_pyramid_ends_at_the_coarsest_level_with_anchors(make_model, levels):
    names = [f"p{3 + i}" for i in range(levels)]
    scales = [[8.0 * (i + 1)] for i in range(levels)]
    model = make_model("MODEL.YOLACT.IN_FEATURES", names, "MODEL.YOLACT.ANCHOR_SCALES", scales)
    assert list(model.backbone.output_shape()) == names


def test_levels_that_do_not_exist_are_named(make_model):
    names = ["p2", "p3", "p4", "p5", "p6"]
    with pytest.raises(ValueError, match=r"MODEL\.YOLACT\.IN_FEATURES.*p2"):
        make_model("MODEL.YOLACT.IN_FEATURES", names)
