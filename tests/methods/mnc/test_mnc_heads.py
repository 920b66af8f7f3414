"""Region heads: who teaches the masks, and two passes that agree (acceptance checks 8, 11, 14)."""

import pytest
import torch
from methods.mnc.mnc_toys import OBJECTS, batch, model_of, proposals_of, randomise

from instseg_ext.methods.mnc import roi_heads

BOXES = [[6, 6, 42, 38], [10, 12, 36, 44], [48, 8, 84, 54], [0, 40, 30, 64], [60, 30, 96, 64]]


def setting(opts=(), num_images=1):
    """Heads of differing classes and moving boxes, features and ground truth of one image."""
    model = randomise(model_of(["MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0, *opts]))
    inputs = batch(*OBJECTS[:num_images])
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
    return model.roi_heads, features, [item["instances"] for item in inputs]


def test_acceptance_check_8_masks_without_their_object_are_not_taught_by_classes(monkeypatch):
    heads, features, targets = setting()
    samples = heads.sample([proposals_of(BOXES)], targets)
    number = samples[0].num_foreground
    assert 2 <= number < len(samples[0])
    labels = samples[0].labels.clone()
    labels[0] = heads.num_classes  # the mask of the first object misses it
    monkeypatch.setattr(heads, "_seg_labels", lambda *_: labels)
    logits = []
    heads.mask_head.register_forward_hook(lambda *call: logits.append(call[2]))
    losses = heads._train_pass(features, samples, targets, "s3")[1]
    taught = labels < heads.num_classes
    by_classes = sum(losses[f"loss_{name}_s3"] for name in ("cls", "seg_cls", "box_reg"))
    (gradient,) = torch.autograd.grad(by_classes, logits, retain_graph=True)
    assert gradient.flatten(1).any(dim=1).tolist() == taught.tolist()
    (gradient,) = torch.autograd.grad(losses["loss_mask_s3"], logits)
    own = gradient.flatten(1).any(dim=1)
    assert own.tolist() == [True] * number + [False] * (len(own) - number)


@torch.no_grad()
def test_acceptance_check_11_boxes_that_stay_repeat_three_stages():
    heads, features, _ = setting()
    heads.eval()
    heads.bbox_pred.weight.zero_()
    five = heads.detect(features, [proposals_of(BOXES)])[0]
    heads.options = heads.options.__class__(num_stages=3)
    three = heads.detect(features, [proposals_of(BOXES)])[0]
    assert (len(three), len(five)) == (5, 10)
    twice = three.cat([three, three])
    torch.testing.assert_close(five.candidate_boxes.tensor, twice.candidate_boxes.tensor)
    torch.testing.assert_close(five.candidate_masks, twice.candidate_masks)
    torch.testing.assert_close(five.candidate_scores, twice.candidate_scores)


@torch.no_grad()
def test_acceptance_check_11_votes_of_repeated_candidates_are_the_same():
    model = randomise(model_of(["MODEL.MNC.VOTE_MIN_SCORE", 0.3])).eval()
    model.roi_heads.bbox_pred.weight.zero_()
    inputs = batch(*OBJECTS)
    five = [result["instances"] for result in model(inputs)]
    model.roi_heads.options = model.roi_heads.options.__class__(num_stages=3)
    three = [result["instances"] for result in model(inputs)]
    assert sum(map(len, three)) > 3
    for found, expected in zip(five, three, strict=True):
        assert torch.equal(found.pred_classes, expected.pred_classes)
        assert torch.equal(found.pred_masks, expected.pred_masks)
        torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("denormalize", [True, False])
@torch.no_grad()
def test_acceptance_check_14_boxes_of_stage_4_in_training_and_evaluation(denormalize):
    opts = ["MODEL.MNC.BRIDGE_DENORM_TRAIN", denormalize, "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT"]
    heads, features, targets = setting([*opts, False])
    heads.seg_cls_score.bias[-1] = -100  # a foreground class is chosen in both
    samples = heads.sample([proposals_of(BOXES)], targets)
    outputs, _ = heads._train_pass(features, samples, targets, "s3")
    (again,) = heads._bridge(samples, targets, outputs, None)
    in_training = torch.empty_like(again.boxes)
    in_training[again.proposal_index] = again.boxes
    given = proposals_of(samples[0].boxes.tolist())
    found = heads.eval().detect(features, [given])[0]
    in_evaluation = found.candidate_boxes.tensor[len(given) :]
    assert not torch.allclose(in_evaluation, given.proposal_boxes.tensor, atol=0.1)
    assert torch.allclose(in_training, in_evaluation, atol=1e-4) == denormalize


def test_losses_of_a_batch_are_means_of_its_images():
    heads, features, targets = setting(num_images=2)
    boxes = [proposals_of(BOXES), proposals_of(BOXES[1:4])]
    samples = heads.sample(boxes, targets)
    together = heads.losses(features, samples, targets)
    alone = [
        heads.losses({k: v[i : i + 1] for k, v in features.items()}, samples[i : i + 1], [target])
        for i, target in enumerate(targets)
    ]
    for name, value in together.items():
        expected = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_regions_by_parts_are_the_regions_together(monkeypatch):
    heads, features, _ = setting()
    together = heads.eval().detect(features, [proposals_of(BOXES)])[0]
    monkeypatch.setattr(roi_heads, "_CHUNK_BYTES", 2 * 16 * 14 * 14 * 4)  # two at a time
    parts = heads.detect(features, [proposals_of(BOXES)])[0]
    torch.testing.assert_close(parts.candidate_masks, together.candidate_masks)
    torch.testing.assert_close(parts.candidate_scores, together.candidate_scores)
    torch.testing.assert_close(parts.candidate_boxes.tensor, together.candidate_boxes.tensor)


@torch.no_grad()
def test_stage_4_can_be_pooled_as_in_the_published_test_network():
    same, features, _ = setting()
    direct = setting(["MODEL.MNC.EXT_WARP", "direct14"])[0]
    one, two = (h.eval().detect(features, [proposals_of(BOXES)])[0] for h in (same, direct))
    assert torch.equal(one.candidate_masks[:5], two.candidate_masks[:5])
    assert torch.equal(one.candidate_boxes.tensor, two.candidate_boxes.tensor)
    assert not torch.allclose(one.candidate_masks[5:], two.candidate_masks[5:])
    pooler = direct.second_pooler.level_poolers[0]
    assert (pooler.samples, tuple(pooler.output_size)) == (1, (14, 14))


@torch.no_grad()
def test_legacy_boxes_are_pooled_without_their_last_pixel():
    heads, features, _ = setting(["MODEL.MNC.LEGACY_BOXES", True])
    boxes = torch.tensor(BOXES, dtype=torch.float32)
    regions = heads.masks(features, [boxes], heads.pooler)[0]
    plain = setting()[0]
    boxes[:, 2:] -= 1
    assert torch.equal(regions, plain.masks(features, [boxes], plain.pooler)[0])


@torch.no_grad()
def test_no_proposals():
    heads, features, _ = setting()
    found = heads.eval().detect(features, [proposals_of([])])[0]
    assert len(found) == 0
    assert found.candidate_masks.shape == (0, 21, 21)
    assert found.candidate_scores.shape == (0, 3)


@torch.no_grad()
def test_candidates_that_are_no_numbers_are_dropped():
    heads, features, _ = setting()
    heads.eval().bbox_pred.bias.fill_(torch.nan)
    assert len(heads.detect(features, [proposals_of(BOXES)])[0]) == 10  # boxes stay
    heads.seg_cls_score.bias.fill_(torch.nan)
    assert len(heads.detect(features, [proposals_of(BOXES)])[0]) == 0
